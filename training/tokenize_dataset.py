"""Turns a data set of videos into a data set of tokens, which a generator learns.

    accelerate launch training/tokenize_dataset.py --tokenizer CHECKPOINT --train_data VIDEOS --output_dir tokens

Writes under --output_dir, shard by shard, `data/*.parquet`, which `datasets.load_dataset` reads: a row a view (clip) of
a video, with the tokens of its blocks, and with --known_frames those of what is shown in frame prediction. At the end
`tokens.json` with what a generator has to know, the data set card and its picture. A run that was killed goes on after
its last shard with --resume true and gives the same shards. With --push_to_hub the finished data set also goes to the
Hub.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader

from evatok_hf import VideoTokenizer
from evatok_hf.allocation import DATASET_STRATEGIES, Allocation
from evatok_hf.data.clip_sources import Source, listed, source_state
from evatok_hf.data.shard_folder import ShardFolder
from evatok_hf.data.streaming import ClipConfig, collate
from evatok_hf.data.token_dataset import SHARDS, SUMMARY, features, make_rows, shard_settings
from evatok_hf.hub.data_cards import check_licence
from evatok_hf.hub.tokens_card import finish
from evatok_hf.interrupts import run_script
from evatok_hf.tokenize.clip_tokens import ClipTokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.common.arguments import check_launch, describe_machine, parse_arguments, parse_sources
from training.common.hub_push import HubDataset, HubDatasetArguments
from training.common.run import time_left
from training.make_data.clip_shards import CountedStream, ShardRun, read

logger = logging.getLogger("tokenize_dataset")


@dataclass
class TokenizeArguments(HubDatasetArguments):
    """Options of making tokens."""

    train_data: list[str] = field(
        metadata={"help": "Folders, WebDataset globs or Hub data sets; SOURCE=WEIGHT mixes several by weight."}
    )
    output_dir: str = field(metadata={"help": "Folder of the data set; one for each split."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Checkpoint or Hub id of the tokenizer, with its router; the bundled one."}
    )
    split: str = field(default="train", metadata={"help": "Split of the sources."})
    # Views
    epochs: int | None = field(
        default=None, metadata={"help": "How many times each video comes up (1, where --clips is not given)."}
    )
    clips: int | None = field(
        default=None, metadata={"help": "Clips in all, instead of --epochs; sources are then mixed by weight."}
    )
    minutes: float | None = field(
        default=None, metadata={"help": "Finish with the clips that there are after so many minutes."}
    )
    clips_per_video: int = field(default=4, metadata={"help": "Views of a video each time it comes up."})
    views: str = field(
        default="random",
        metadata={
            "help": "random, or fixed: the centre, not mirrored, evenly spaced, with the first stride, for test splits."
        },
    )
    strides: list[int] = field(default_factory=lambda: [1], metadata={"help": "Frame strides to draw from."})
    scale: list[float] = field(
        default_factory=lambda: [1.0, 1.0], metadata={"help": "Side of the square crop over the short side: lo hi."}
    )
    random_position: bool = field(default=False, metadata={"help": "Crop anywhere rather than at the centre."})
    flip_probability: float = field(default=0.5, metadata={"help": "How often a view is mirrored left to right."})
    random_start: bool = field(default=True, metadata={"help": "Start anywhere rather than evenly spaced."})
    shuffle_buffer: int = field(default=256, metadata={"help": "Undecoded examples that streams are shuffled among."})
    # Tokens
    strategy: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(DATASET_STRATEGIES)}; by default the router, without one uniform."},
    )
    quality: float | None = field(default=None, metadata={"help": "Weight of quality, 0 to 2, of the router (1.2)."})
    uniform: int | None = field(default=None, metadata={"help": "The same tokens for every block."})
    lengths: str | None = field(default=None, metadata={"help": "Tokens of each block, such as 128,32,16,64."})
    budget_per_clip: int | None = field(default=None, metadata={"help": "At most so many tokens for each clip."})
    known_frames: int | None = field(
        default=None,
        metadata={"help": "Also make the condition of frame prediction: so many frames, the last one held (LARP: 5)."},
    )
    batch_size: int = field(default=32, metadata={"help": "Clips encoded at once.", "aliases": ["--batch_clips"]})
    # Bookkeeping
    shard_size: int = field(default=1024, metadata={"help": "Clips of a shard; what a kill can lose."})
    num_workers: int = field(default=1, metadata={"help": "Loader processes a process."})
    seed: int = field(default=0, metadata={"help": "Seed of the views."})
    resume: bool = field(default=False, metadata={"help": "Go on in --output_dir after the last shard."})
    licence: str = field(default="other", metadata={"help": "Licence of the data set, for its card (Hub id)."})
    sources_note: str = field(default="", metadata={"help": "Where the videos come from and their licences (card)."})
    cpu: bool = field(default=False, metadata={"help": "Compute on the CPU even where there is a GPU."})

    def __post_init__(self):
        super().__post_init__()
        check_licence(self.licence)
        for name in ("epochs", "clips", "clips_per_video", "batch_size", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise ValueError(f"--minutes must be more than 0, got {self.minutes}.")
        if self.views not in ("random", "fixed"):
            raise ValueError(f"--views must be random or fixed, got {self.views!r}.")
        if self.epochs is not None and self.clips is not None:
            raise ValueError("give either --epochs or --clips, not both.")
        if self.views == "fixed" and (self.clips is not None or self.epochs not in (None, 1)):
            raise ValueError("--views fixed takes every video once; leave --clips and --epochs out.")
        weights = [weight for _, weight in parse_sources(self.train_data)]
        if self.clips is None and any(weight != 1 for weight in weights):
            raise ValueError("weights of sources need --clips; --epochs takes every video equally often.")
        if self.epochs is None and self.clips is None:
            self.epochs = 1
        self.allocation()

    def allocation(self) -> Allocation:
        """How lengths are chosen. Raises ValueError for an unknown strategy, or options that contradict each other."""
        told = {"quality": self.quality, "budget_per_clip": self.budget_per_clip}
        return Allocation.from_options(self.strategy, self.lengths, self.uniform, DATASET_STRATEGIES, **told)

    def clip(self, tokenizer: VideoTokenizer) -> ClipConfig:
        return ClipConfig(
            num_frames=tokenizer.model.config.num_frames,
            image_size=tokenizer.model.config.image_size,
            strides=tuple(self.strides),
            scale=tuple(self.scale),
            random_position=self.random_position,
            flip_probability=self.flip_probability,
            random_start=self.random_start,
            clips_per_video=self.clips_per_video,
        )


def join_classes(sources: Sequence[Source]) -> list[str]:
    """The classes of all sources together, in alphabetical order as those of a single folder."""
    return sorted({name for source in sources for name in source.classes})


def join_labels(batch: dict[str, Any], sources: Sequence[Source], classes: list[str]) -> torch.Tensor:
    """The labels of a batch, which index the classes of their own source, as those of all sources, (B,).

    Raises:
        ValueError: a label without a name beside sources whose labels have names.
    """
    labels = []
    for origin, label in zip(batch["origin"].tolist(), batch["label"].tolist(), strict=True):
        names = sources[origin].classes
        if label >= 0 and classes and not names:
            raise ValueError(
                f"{sources[origin].name} has labels without names and cannot be mixed with sources that have names; "
                "make its tokens by themselves."
            )
        labels.append(classes.index(names[label]) if label >= 0 and names else label)
    return torch.tensor(labels)


def epoch_passes(stream: CountedStream, loader: DataLoader, epochs: int) -> Iterator[Iterator[dict[str, Any]]]:
    """The rest of the epoch that the stream is in, then the others.

    Raises:
        ValueError: the stream is beyond them.
    """
    first = stream.state_dict()["epoch"]
    if first >= epochs:
        raise ValueError(f"there are clips of {first + 1} epochs already; ask for as many, or for more.")
    for epoch in range(first, epochs):
        stream.set_epoch(epoch)
        yield read(loader)


def tokenize(args: TokenizeArguments, run: ShardRun, encode: ClipTokens, processes: int) -> None:
    """This process's part of the clips, shard after shard."""
    stream, classes = run.stream, run.shards.settings["classes"]
    loader = DataLoader(stream, batch_size=1, num_workers=args.num_workers, collate_fn=collate)
    total = expected = None
    if args.epochs is None:
        total, passes = run.share(args.clips, processes), [read(loader)]
    else:
        passes = epoch_passes(stream, loader, args.epochs)
        videos = [listed(source) for source in stream.sources]
        if None not in videos:
            expected = sum(map(len, videos)) * args.clips_per_video * args.epochs // processes

    def compute(batch: dict[str, Any], first: int) -> list[dict[str, Any]]:
        tokens = encode(batch["pixel_values_videos"])
        return make_rows({**batch, "label": join_labels(batch, stream.sources, classes)}, tokens)

    until = None if args.minutes is None else time.monotonic() + time_left(args.minutes)
    run.fill(passes, compute, args.batch_size, total, expected, until)


def main(argv: list[str] | None = None) -> Path:
    args, _ = parse_arguments(TokenizeArguments, __doc__, argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    # Processes meet only at the end, and one may be hours behind another.
    accelerator = Accelerator(cpu=args.cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    check_launch(accelerator)
    folder = Path(args.output_dir)
    if not args.resume and SHARDS.begun(folder):
        raise ValueError(f"{folder} holds tokens; use --resume true or another --output_dir.")
    hub = HubDataset(args, accelerator.is_main_process)
    tokenizer = VideoTokenizer.from_pretrained(args.tokenizer, device=str(accelerator.device))
    allocation = args.allocation().bind(tokenizer.model, tokenizer.router)
    encode = ClipTokens(allocation, args.known_frames)
    rank, processes, machine = accelerator.process_index, accelerator.num_processes, describe_machine(accelerator)
    mix, clips = parse_sources(args.train_data), args.clip(tokenizer)
    stream = CountedStream(
        mix,
        args.split,
        clips,
        seed=args.seed,
        rank=rank,
        world_size=processes,
        shuffle_buffer=args.shuffle_buffer,
        repeat=args.epochs is None,
        training=args.views == "random",
    )
    classes, counted = join_classes(stream.sources), "clips" if args.epochs is None else "epochs"
    # More clips or epochs may be asked for later.
    settings = shard_settings(mix, counted, args, clips, allocation, classes) | {
        "shuffle_buffer": args.shuffle_buffer,
        "num_workers": args.num_workers,
        "processes": processes,
        "source_state": source_state(stream.sources),
    }
    columns = None
    if find_spec("datasets"):
        columns = features(tokenizer.model.config.num_blocks, classes, args.known_frames is not None)
    noted = machine if accelerator.is_main_process else None
    run = ShardRun(ShardFolder(SHARDS, folder, settings, columns, args.shard_size, rank, noted), rank, stream)
    tokenize(args, run, encode, processes)
    made = int(accelerator.gather(torch.tensor([run.done], device=accelerator.device)).sum())
    if accelerator.is_main_process:
        facts = {
            "command": shlex.join(["training/tokenize_dataset.py", *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine,
            "licence": args.licence,
            "sources_note": args.sources_note,
            "epochs": args.epochs,
            "clips": made,
        }
        try:
            finish(ShardFolder(SHARDS, folder, settings), tokenizer, facts)
        except ValueError as error:
            raise ValueError(
                f"the tokens are not whole ({error}); if machines wrote to different folders, copy all shards into one "
                "and run again with --resume true."
            ) from error
        logger.info("wrote %s", folder / SUMMARY)
    accelerator.end_training()
    hub.finish(folder)
    return folder


if __name__ == "__main__":
    run_script(main)
