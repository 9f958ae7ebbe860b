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

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evatok_hf import EvatokModel
from evatok_hf.allocation.search import search_assignments
from evatok_hf.data.curated import SHARDS, features, make_rows
from evatok_hf.data.shard_folder import ShardFolder
from evatok_hf.data.streaming import to_float
from evatok_hf.interrupts import run_script
from evatok_hf.metrics.perceptual import PERCEPTUAL_NAMES, load_perceptual
from evatok_hf.video.source_files import printable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evatok_hf.hub.data_cards import hub_ids, versions
from training.cards.curation_card import finish
from training.common.arguments import choose_precision, parse_sources, source_names
from training.common.fields import option
from training.make_data.clip_shards import ShardOptions, ShardRun


@dataclass(kw_only=True)
class CurateArguments(ShardOptions):
    """Options of curation."""

    tokenizer: str = option("Checkpoint or Hub id of the proxy tokenizer.")
    clips: int = option("Clips in all (paper: 100000).", 100_000)
    freeze_probability: float = option("How often a clip stands still from a random frame of it on.", 0.0)
    # Figures
    perceptual: str = option(f"One of {', '.join(PERCEPTUAL_NAMES)}.", "lpips-vgg")
    perceptual_weights: str | None = option("Local torchvision backbone for LPIPS.", None)
    mixed_precision: str = option(
        "no, or bf16: quicker, and figures differ a little from those of float32; auto: bf16 where the "
        "device computes in it.",
        "no",
    )
    branches: int = option(
        "Lengths tried after every prefix of lengths, drawn at random; 0: all of them. 2 of 5 take a "
        "twentieth of the time: for more clips than can be measured in full.",
        0,
    )
    nodes_per_batch: int = option("Clips searched at once.", 8)
    lower: float = option("Percentile of all distances at which quality is 1.", 1.0)
    upper: float = option("Percentile of all distances at which quality is 0.", 99.0)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "clips", "nodes_per_batch")
        self.one_of(perceptual=PERCEPTUAL_NAMES)
        self.mixed_precision = choose_precision(self.mixed_precision, self.cpu, ("no", "bf16"))
        if not 0 <= self.lower < self.upper <= 100:
            raise ValueError(
                f"--lower and --upper must satisfy 0 <= lower < upper <= 100, got {self.lower, self.upper}."
            )


def settings(args: CurateArguments, model: EvatokModel) -> dict:
    """All that the shards depend on beside what `ShardRun` knows. More clips may be asked for later."""
    names = ("split", "strides", "scale", "freeze_probability", "clips_per_video", "seed", "perceptual")
    names += ("mixed_precision", "shard_size", "branches", "nodes_per_batch")
    mix = parse_sources(args.train_data)
    return {
        "sources": [printable(name) for name, _ in mix],
        "weights": [weight for _, weight in mix],
        **{name: getattr(args, name) for name in names},
        "proxy_fingerprint": model.fingerprint(),
    }


def main(argv: list[str] | None = None) -> Path:
    run = ShardRun(CurateArguments, "curate", __doc__, SHARDS, argv)
    args, device = run.args, run.accelerator.device
    model = EvatokModel.from_pretrained(args.tokenizer, dtype=torch.float32).eval().to(device)
    config = model.config
    run.open(config)
    run.begin(settings(args, model), lambda: features(model.assignment_space))
    total = run.share(args.clips)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    metric = load_perceptual(args.perceptual, args.perceptual_weights).to(device, dtype)

    def measure(batch: dict[str, Any], first: int) -> list[dict[str, Any]]:
        key = int.from_bytes(f"{args.seed} {run.rank} {first}".encode(), "big") % 2**62
        result = search_assignments(
            model,
            to_float(batch["pixel_values_videos"].to(device)),
            metric,
            args.nodes_per_batch,
            dtype=dtype,
            branches=args.branches or None,
            generator=torch.Generator().manual_seed(key),
        )
        return make_rows(batch, result)

    def write(shards: ShardFolder, facts: dict[str, Any]) -> None:
        facts |= {
            "versions": versions(),
            "datasets": hub_ids(*source_names(args.train_data)),
            "clip": {"num_frames": config.num_frames, "image_size": config.image_size},
            "block_lengths": list(config.block_lengths),
            "num_blocks": config.num_blocks,
            "percentiles": [args.lower, args.upper],
            "clips": args.clips if args.minutes is None else None,
        }
        finish(run.folder, run.settings, facts, shards.causes, shards.seconds)
        shards.close()

    run.fill([run.read()], measure, args.nodes_per_batch, total)
    return run.finish(write)


if __name__ == "__main__":
    run_script(main)
