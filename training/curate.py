"""Stage 2: measures what every assignment does to each clip of a data set, with a trained proxy tokenizer.

    accelerate launch training/curate.py --config training/configs/curate_tiny.yaml \
        --tokenizer runs/proxy/tokenizer --train_data VIDEOS --output_dir curated

Writes under --output_dir, shard by shard, `data/*.parquet`, which `datasets.load_dataset` reads: a row a clip, with its
perceptual distance, PSNR and squared error under every assignment, and those of every block that the search computed.
At the end `curation.json` with the bounds of the distance, the data set card and its pictures. A run that was killed
goes on after its last shard with --resume true and gives the same shards. With --push_to_hub the finished data set also
goes to the Hub.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader

from evatok_hf import EvatokModel
from evatok_hf.allocation.search import search_assignments
from evatok_hf.data.clip_sources import source_state
from evatok_hf.data.curated import SHARDS, SUMMARY, features, make_rows
from evatok_hf.data.shard_folder import ShardFolder
from evatok_hf.data.streaming import ClipConfig, collate, to_float
from evatok_hf.interrupts import run_script
from evatok_hf.metrics.perceptual import PERCEPTUAL_NAMES, load_perceptual
from evatok_hf.video.source_files import printable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evatok_hf.hub.data_cards import check_licence, hub_ids, versions
from training.cards.curation_card import finish
from training.common.arguments import check_launch, choose_precision, describe_machine, parse_arguments, parse_sources
from training.common.hub_push import HubDataset, HubDatasetArguments
from training.common.run import time_left
from training.make_data.clip_shards import CountedStream, ShardRun, read

logger = logging.getLogger("curate")


@dataclass
class CurateArguments(HubDatasetArguments):
    """Options of curation."""

    tokenizer: str = field(metadata={"help": "Checkpoint or Hub id of the proxy tokenizer."})
    train_data: list[str] = field(
        metadata={"help": "Folders, WebDataset globs or Hub data sets; SOURCE=WEIGHT mixes several by weight."}
    )
    output_dir: str = field(metadata={"help": "Folder of the data set."})
    split: str = field(default="train", metadata={"help": "Split of the sources."})
    clips: int = field(default=100_000, metadata={"help": "Clips in all (paper: 100000)."})
    minutes: float | None = field(
        default=None, metadata={"help": "Finish with the clips that there are after so many minutes."}
    )
    # Clips
    strides: list[int] = field(default_factory=lambda: [1], metadata={"help": "Frame strides to draw from."})
    scale: list[float] = field(
        default_factory=lambda: [1.0, 1.0], metadata={"help": "Side of the square crop over the short side: lo hi."}
    )
    freeze_probability: float = field(
        default=0.0, metadata={"help": "How often a clip stands still from a random frame of it on."}
    )
    clips_per_video: int = field(default=1, metadata={"help": "Clips cut from a video each time it comes up."})
    shuffle_buffer: int = field(default=256, metadata={"help": "Undecoded examples that streams are shuffled among."})
    num_workers: int = field(default=1, metadata={"help": "Loader processes a process."})
    # Figures
    perceptual: str = field(default="lpips-vgg", metadata={"help": f"One of {', '.join(PERCEPTUAL_NAMES)}."})
    perceptual_weights: str | None = field(default=None, metadata={"help": "Local torchvision backbone for LPIPS."})
    mixed_precision: str = field(
        default="no",
        metadata={
            "help": "no, or bf16: quicker, and figures differ a little from those of float32; auto: bf16 where the "
            "device computes in it."
        },
    )
    branches: int = field(
        default=0,
        metadata={
            "help": "Lengths tried after every prefix of lengths, drawn at random; 0: all of them. 2 of 5 take a "
            "twentieth of the time: for more clips than can be measured in full."
        },
    )
    nodes_per_batch: int = field(default=8, metadata={"help": "Clips searched at once."})
    lower: float = field(default=1.0, metadata={"help": "Percentile of all distances at which quality is 1."})
    upper: float = field(default=99.0, metadata={"help": "Percentile of all distances at which quality is 0."})
    # Bookkeeping
    shard_size: int = field(default=64, metadata={"help": "Clips of a shard; what a kill can lose."})
    seed: int = field(default=0, metadata={"help": "Seed of the clips."})
    resume: bool = field(default=False, metadata={"help": "Go on in --output_dir after the last shard."})
    licence: str = field(default="other", metadata={"help": "Licence of the data set, for its card (Hub id)."})
    sources_note: str = field(default="", metadata={"help": "Where the clips come from and their licences (card)."})
    cpu: bool = field(default=False, metadata={"help": "Compute on the CPU even where there is a GPU."})

    def __post_init__(self):
        super().__post_init__()
        check_licence(self.licence)
        for name in ("clips", "clips_per_video", "nodes_per_batch", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise ValueError(f"--minutes must be more than 0, got {self.minutes}.")
        if self.perceptual not in PERCEPTUAL_NAMES:
            raise ValueError(f"--perceptual must be one of {list(PERCEPTUAL_NAMES)}, got {self.perceptual!r}.")
        self.mixed_precision = choose_precision(self.mixed_precision, self.cpu, ("no", "bf16"))
        if not 0 <= self.lower < self.upper <= 100:
            raise ValueError(
                f"--lower and --upper must satisfy 0 <= lower < upper <= 100, got {self.lower, self.upper}."
            )

    def clip(self, model: EvatokModel) -> ClipConfig:
        return ClipConfig(
            num_frames=model.config.num_frames,
            image_size=model.config.image_size,
            strides=tuple(self.strides),
            scale=tuple(self.scale),
            freeze_probability=self.freeze_probability,
            clips_per_video=self.clips_per_video,
        )


def settings(args: CurateArguments, model: EvatokModel, world_size: int, workers: int) -> dict:
    """All that the shards depend on; resuming with other settings is refused. More clips may be asked for later."""
    names = ("split", "strides", "scale", "freeze_probability", "clips_per_video", "shuffle_buffer", "seed")
    names += ("perceptual", "mixed_precision", "shard_size", "branches", "nodes_per_batch")
    return {
        "sources": [printable(name) for name, _ in parse_sources(args.train_data)],
        "weights": [weight for _, weight in parse_sources(args.train_data)],
        **{name: getattr(args, name) for name in names},
        "proxy_fingerprint": model.fingerprint(),
        "processes": world_size,
        "num_workers": workers,
    }


def curate(args: CurateArguments, accelerator: Accelerator, model: EvatokModel, run: ShardRun) -> None:
    """This process's share of the clips, shard after shard."""
    total = run.share(args.clips, accelerator.num_processes)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    metric = load_perceptual(args.perceptual, args.perceptual_weights).to(accelerator.device, dtype)

    def measure(batch: dict[str, Any], first: int) -> list[dict[str, Any]]:
        key = int.from_bytes(f"{args.seed} {run.rank} {first}".encode(), "big") % 2**62
        result = search_assignments(
            model,
            to_float(batch["pixel_values_videos"].to(accelerator.device)),
            metric,
            args.nodes_per_batch,
            dtype=dtype,
            branches=args.branches or None,
            generator=torch.Generator().manual_seed(key),
        )
        return make_rows(batch, result)

    loader = DataLoader(run.stream, batch_size=1, num_workers=args.num_workers, collate_fn=collate)
    until = None if args.minutes is None else time.monotonic() + time_left(args.minutes)
    run.fill([read(loader)], measure, args.nodes_per_batch, total, until=until)


def main(argv: list[str] | None = None) -> Path:
    args, _ = parse_arguments(CurateArguments, __doc__, argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    # Processes meet only at the end, and one may be hours behind another.
    accelerator = Accelerator(cpu=args.cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    check_launch(accelerator)
    folder = Path(args.output_dir)
    if not args.resume and SHARDS.begun(folder):
        raise ValueError(f"{folder} holds curated clips; use --resume true or another --output_dir.")
    hub = HubDataset(args, accelerator.is_main_process)
    model = EvatokModel.from_pretrained(args.tokenizer, dtype=torch.float32).eval().to(accelerator.device)
    rank, machine = accelerator.process_index, describe_machine(accelerator)
    stream = CountedStream(
        parse_sources(args.train_data),
        args.split,
        args.clip(model),
        seed=args.seed,
        rank=rank,
        world_size=accelerator.num_processes,
        shuffle_buffer=args.shuffle_buffer,
    )
    given = settings(args, model, accelerator.num_processes, args.num_workers)
    given["source_state"] = source_state(stream.sources)
    columns = features(model.assignment_space) if find_spec("datasets") else None
    noted = machine if accelerator.is_main_process else None
    run = ShardRun(ShardFolder(SHARDS, folder, given, columns, args.shard_size, rank, noted), rank, stream)
    curate(args, accelerator, model, run)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        facts = {
            "command": shlex.join(["training/curate.py", *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine,
            "versions": versions(),
            "datasets": hub_ids(*(name for name, _ in parse_sources(args.train_data))),
            "licence": args.licence,
            "sources_note": args.sources_note,
            "clip": {"num_frames": model.config.num_frames, "image_size": model.config.image_size},
            "block_lengths": list(model.config.block_lengths),
            "num_blocks": model.config.num_blocks,
            "percentiles": [args.lower, args.upper],
            "clips": args.clips if args.minutes is None else None,
        }
        shards = ShardFolder(SHARDS, folder, given)
        finish(folder, given, facts, shards.causes, shards.seconds)
        shards.close()
        logger.info("wrote %s", folder / SUMMARY)
    accelerator.end_training()
    hub.finish(folder)
    return folder


if __name__ == "__main__":
    run_script(main)
