"""The search of all assignments through the prefix tree, against trying each by itself.

    python benchmarks/speed/search.py --output search.json

Both measure every assignment of the same clips with the bundled tokenizer, in one run; their tables must agree.
"Of the peak" is the time that their operations, those of the metric among them, take at the speed of a matrix product
of the same run, over the time taken.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser

import evatok_hf
from evatok_hf import EvatokConfig, EvatokModel
from evatok_hf.allocation.search import brute_force, search_assignments
from evatok_hf.data.streaming import ClipConfig, collate, evaluation_clips, to_float
from evatok_hf.interrupts import run_script
from evatok_hf.metrics import load_perceptual
from evatok_hf.metrics.perceptual import PERCEPTUAL_NAMES, PerceptualDistance

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.machine import (
    aim,
    command_line,
    describe_machine,
    interleaved,
    matmul_peak,
    print_aims,
    write_json,
)
from training.common.flops import search_flops


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


def operations(config: EvatokConfig, metric: PerceptualDistance) -> tuple[float, float]:
    """Of measuring every assignment of a clip, by the tree and one by one; the metric sees each block of each node."""
    frame = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        metric(frame, frame)
    assignments, lengths = len(config.assignment_space), len(config.block_lengths)
    blocks = sum(lengths**t for t in range(1, config.num_blocks + 1)), config.num_blocks * assignments
    measured = (count * config.frames_per_block * counter.get_total_flops() / 2 for count in blocks)
    return tuple(ours + theirs for ours, theirs in zip(search_flops(config), measured, strict=True))


def compare(
    model: EvatokModel, video: torch.Tensor, metric: PerceptualDistance, nodes_per_batch: int
) -> dict[str, float]:
    """Seconds of both ways over clips (N, F, 3, H, W), and the largest difference of what they measured."""
    tables: dict[str, torch.Tensor] = {}

    def search() -> None:
        tables["search"] = search_assignments(model, video, metric, nodes_per_batch, progress=True).table()

    def one_by_one() -> None:
        tables["brute force"] = brute_force(model, video, metric, nodes_per_batch, progress=True)

    timings = interleaved({"search": search, "brute force": one_by_one}, model.device, repeats=1, warmups=0)
    seconds, brute_seconds = timings["search"].least, timings["brute force"].least
    peak = matmul_peak(model.device, model.dtype)
    tree, each = (len(video) * count / peak for count in operations(model.config, metric))  # seconds at the peak
    return {
        "clips": len(video),
        "of_peak": tree / seconds,
        "brute_force_of_peak": each / brute_seconds,
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
        f"{row['seconds']:.1f} s ({row['of_peak']:.0%} of the peak), one by one {row['brute_force_seconds']:.1f} s "
        f"({row['brute_force_of_peak']:.0%}), at most {row['largest_difference']:.1e} apart"
    )
    report = {
        "command": command_line("speed/search.py", argv),
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
    run_script(main)
