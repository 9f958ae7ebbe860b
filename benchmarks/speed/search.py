"""The search of all assignments through the prefix tree, against trying each by itself.

    python benchmarks/speed/search.py --output search.json

Both measure every assignment of the same clips with the tokenizer of evatok-tiny, in one run; their tables must agree.
"Of the peak" is the time that their operations, those of the metric among them, take at the speed of a matrix product
of the same run, over the time taken.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import Benchmark, Options, aim
from benchmarks.common.clips import METRIC, SAMPLE, read_clips
from benchmarks.common.machine import describe_machine, interleaved, matmul_peak
from benchmarks.common.pictures import OTHER, OWN
from evatok_hf import EvatokConfig, EvatokModel, bundled_checkpoints
from evatok_hf.allocation.search import brute_force, search_assignments
from evatok_hf.metrics import load_perceptual
from evatok_hf.metrics.perceptual import PerceptualDistance
from training.common.fields import option
from training.common.flops import counted, search_flops

AT_ONCE = 8  # clips


@dataclass(kw_only=True)
class Arguments(Options):
    data: str = option("Folder of videos; by default the sample that comes along.", str(SAMPLE))
    model: str = option("Tokenizer.", lambda: f"{bundled_checkpoints()['evatok-tiny']}/tokenizer")
    clips: int = option("Clips searched, from the first videos.", 2)

    def __post_init__(self):
        self.at_least(1, "clips")


def operations(config: EvatokConfig, metric: PerceptualDistance) -> tuple[float, float]:
    """Of measuring every assignment of a clip, by the tree and one by one; the metric sees each block of each node."""
    frame = (1, config.num_channels, config.image_size, config.image_size)
    distance = counted(lambda: copy.deepcopy(metric).to("meta"), frame, frame)
    assignments, lengths = len(config.assignment_space), len(config.block_lengths)
    blocks = sum(lengths**t for t in range(1, config.num_blocks + 1)), config.num_blocks * assignments
    measured = (count * config.frames_per_block * distance / 2 for count in blocks)
    return tuple(ours + theirs for ours, theirs in zip(search_flops(config), measured, strict=True))


def compare(model: EvatokModel, video: torch.Tensor, metric: PerceptualDistance) -> dict[str, float]:
    """Seconds of both ways over clips (N, F, 3, H, W), and the largest difference of what they measured."""
    tables: dict[str, torch.Tensor] = {}

    def search() -> None:
        tables["search"] = search_assignments(model, video, metric, AT_ONCE, progress=True).table()

    def one_by_one() -> None:
        tables["brute force"] = brute_force(model, video, metric, AT_ONCE, progress=True)

    timings = interleaved({"search": search, "brute force": one_by_one}, model.device, repeats=1, warmups=0)
    (seconds,), (brute_seconds,) = timings.values()
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


def measure(args: Arguments) -> dict[str, Any]:
    model = EvatokModel.from_pretrained(args.model, dtype=torch.float32).eval()
    video = read_clips(args.data, model.config, args.clips).floats[: args.clips]
    row = compare(model, video, load_perceptual(METRIC))
    what = "time to measure all assignments of a clip by the tree over one by one"
    return {
        "machine": describe_machine(model.device, model.dtype),
        "assignments": len(model.config.assignment_space),
        **row,
        "aims": {"search_over_brute_force": aim(what, row["ratio"], "<=", 0.35)},
    }


def show(report: dict[str, Any]) -> str:
    return (
        f"{report['clips']} clips, all {report['assignments']} assignments: {report['seconds']:.1f} s by the tree "
        f"({report['of_peak']:.0%} of the peak), {report['brute_force_seconds']:.1f} s one by one "
        f"({report['brute_force_of_peak']:.0%}); what they measure is at most {report['largest_difference']:.0e} apart."
    )


def panel(axis: Any, report: dict[str, Any]) -> None:
    axis.bar(["prefix tree", "one by one"], [report["seconds"], report["brute_force_seconds"]], color=[OWN, OTHER])
    axis.set(title=f"all assignments of {report['clips']} clips", ylabel="seconds")


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    main.run()
