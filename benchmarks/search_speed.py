"""The search of all assignments through the prefix tree, against trying each by itself.

    python benchmarks/search_speed.py --output search.json

Both measure every assignment of the same clips with the bundled tokenizer, in one run; their tables must agree.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import aim, command_line, describe_machine, interleaved, print_aims, write_json
from transformers import HfArgumentParser

import evatok_hf
from evatok_hf import EvatokModel, load_perceptual
from evatok_hf.perceptual import PERCEPTUAL_NAMES
from evatok_hf.search import brute_force, search_assignments
from evatok_hf.streaming import ClipConfig, collate, evaluation_clips, to_float


@dataclass
class Arguments:
    data: str = field(
        default=str(Path(evatok_hf.__file__).parent / "assets"),
        metadata={"help": "Folder of videos; by default the sample that comes along."},
    )
    model: str = field(default=f"{evatok_hf.default_checkpoint()}/tokenizer", metadata={"help": "Tokenizer."})
    clips: int = field(default=2, metadata={"help": "Clips searched, from the first videos."})
    perceptual: str = field(
        default="perceptual-effnet-lite0", metadata={"help": f"Metric: {', '.join(PERCEPTUAL_NAMES)}."}
    )
    nodes_per_batch: int = field(default=8, metadata={"help": "Clips searched at once."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def __post_init__(self):
        if self.clips < 1 or self.nodes_per_batch < 1:
            raise ValueError("--clips and --nodes_per_batch must be at least 1.")


def compare(model: EvatokModel, video: torch.Tensor, metric: Any, nodes_per_batch: int) -> dict[str, float]:
    """Seconds of both ways over clips (N, F, 3, H, W), and the largest difference of what they measured."""
    tables: dict[str, torch.Tensor] = {}

    def search() -> None:
        tables["search"] = search_assignments(model, video, metric, nodes_per_batch, progress=True).table()

    def one_by_one() -> None:
        tables["brute force"] = brute_force(model, video, metric, nodes_per_batch, progress=True)

    timings = interleaved({"search": search, "brute force": one_by_one}, model.device, repeats=1, warmups=0)
    seconds, brute_seconds = timings["search"].least, timings["brute force"].least
    return {
        "clips": len(video),
        "seconds": seconds,
        "brute_force_seconds": brute_seconds,
        "ratio": seconds / brute_seconds,
        "largest_difference": float((tables["search"] - tables["brute force"]).abs().max()),
    }


def main(argv: list[str] | None = None) -> dict:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    model = EvatokModel.from_pretrained(args.model, dtype=torch.float32).eval()
    clip = ClipConfig(num_frames=model.config.num_frames, image_size=model.config.image_size)
    items = list(evaluation_clips(args.data, clip, args.clips))[: args.clips]
    if not items:
        raise ValueError(f"no clip of {clip.num_frames} frames is in {args.data}; name a folder of longer videos.")
    video = to_float(collate(items)["pixel_values_videos"])
    row = compare(model, video, load_perceptual(args.perceptual), args.nodes_per_batch)
    print(
        f"{row['clips']} clips, {len(model.config.assignment_space)} assignments: prefix tree "
        f"{row['seconds']:.1f} s, one by one {row['brute_force_seconds']:.1f} s, at most "
        f"{row['largest_difference']:.1e} apart"
    )
    report = {
        "command": command_line("search_speed.py", argv),
        "machine": describe_machine(model.device, model.dtype),
        "settings": asdict(args),
        **row,
        "aims": {"search_over_brute_force": aim(row["ratio"], at_most=0.35)},
    }
    print_aims(report["aims"])
    if args.output:
        write_json(report, args.output)
    return report


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
