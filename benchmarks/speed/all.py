"""All of the speed benchmarks, one after the other: one table of aims, one picture, one JSON file.

    python benchmarks/speed/all.py --data VIDEOS --output out/speed

Each part is a benchmark of this folder with its own command, which is printed, and leaves its JSON file under
`--output`. A part whose file is there is not run again, so that a run that was stopped goes on (`--again` forgets
them). Half an hour of two idle cores; keep the machine quiet meanwhile.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from benchmarks.common.benchmark import ROOT, Benchmark, Options, about_machine
from benchmarks.common.machine import describe_machine
from evatok_hf.interrupts import run_script
from evatok_hf.pictures.figures import pyplot, save_figure
from training.common.fields import option

# In the order in which they run: module and title. Where a GPU is used, so by those that can.
PARTS = {
    "tokenizer": ("speed.tokenizer", "Encoding and decoding"),
    "sampling": ("speed.sampling", "Drawing clips"),
    "search": ("speed.search", "Every assignment of a clip"),
    "loading": ("speed.loading", "Loading while training"),
    "memory": ("quality.long_video", "Long videos"),
    "bulk": ("speed.bulk", "Many videos"),
}


@dataclass(kw_only=True)
class Arguments(Options):
    data: str | None = option("Folder of videos, for real clips' lengths and for `loading`, which needs it.", None)
    output: str = option("Folder for the reports and the picture.", "out/speed")
    parts: list[str] = option(f"Of {', '.join(PARTS)}.", list(PARTS))
    device: str = option("cpu or cuda; auto: the GPU where there is one.", "auto")
    quick: bool = option("Small sizes, to see that all runs; no figure means a thing.", False)
    again: bool = option("Run parts whose report is there already, too.", False)

    def __post_init__(self):
        self.one_of(parts=PARTS)
        if self.data is None and "loading" in self.parts:
            raise ValueError("part `loading` needs --data VIDEOS; or name the other --parts.")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"


def options(part: str, args: Arguments) -> list[str]:
    """What a part is run with."""
    gpu = args.device == "cuda"
    if part == "tokenizer":
        given = ["--device", args.device, *(["--lengths_from", args.data] if args.data else [])]
        return given + (["--preset", "tiny", "--quick"] if args.quick else ["--batch_size", "16"] if gpu else [])
    if part == "sampling" and not args.quick:
        return ["--preset", "327m", "--device", "cuda", "--dtype", "bfloat16", "--int8"] if gpu else []
    quick = {
        "sampling": "--preset tiny --length 8 --batch_sizes 1 --implementations eager static",
        "search": "--clips 1",
        "loading": "--clips 16 --steps 4 --num_workers 1",
        "memory": "--seconds 2 4",
        "bulk": "--clips 128 --shard_size 16 --loop_clips 32",
    }
    given = ["--data", str(args.data)] if part == "loading" else []
    return given + (quick[part].split() if args.quick else [])


def run(part: str, args: Arguments) -> dict[str, Any] | None:
    """The report of a part, or None where it failed, which is told."""
    path = Path(args.output, f"{part}.json")
    if args.again or not path.is_file():
        script = f"benchmarks/{PARTS[part][0].replace('.', '/')}.py"
        command = [*options(part, args), "--output", str(path)]
        print(f"\n{part}: {shlex.join(['python', script, *command])}", flush=True)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, str(ROOT / script), *command])
        if done.returncode:
            print(f"{part} failed with exit code {done.returncode}, see above", file=sys.stderr)
            return None
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads(path.read_text())


def measure(args: Arguments) -> dict[str, Any]:
    reports = {part: run(part, args) for part in PARTS if part in args.parts}
    done = {part: report for part, report in reports.items() if report is not None}
    return {
        "machine": describe_machine(torch.device(args.device), torch.float32),
        "aims": {name: row for report in done.values() for name, row in report["aims"].items()},
        "parts": done,
        "failed": [part for part in reports if part not in done],
    }


def module(part: str) -> ModuleType:
    """Of a part: some need packages that others do not."""
    return import_module(f"benchmarks.{PARTS[part][0]}")


def show(report: dict[str, Any]) -> str:
    parts = [
        f"### {PARTS[part][1]}\n\n{about_machine(told)}\n\n{module(part).show(told)}"
        for part, told in report["parts"].items()
    ]
    return "\n\n".join(parts)


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG with a panel for each part that the report has."""
    plt, parts = pyplot(), report["parts"]
    if not parts:
        return
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.8 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(parts) :]:
        axis.remove()
    for axis, (part, told) in zip(axes.flat[: len(parts)], parts.items(), strict=True):
        module(part).panel(axis, told)
        axis.grid(alpha=0.3)
    about = report["machine"]
    figure.suptitle(f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}", fontsize=9)
    save_figure(figure, path)


benchmark = Benchmark(Arguments, measure, show, "speed", draw)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    report = benchmark(argv)
    if failed := report["failed"]:
        raise ValueError(f"{', '.join(failed)} failed; the same command runs them again and keeps what is there.")
    return report


if __name__ == "__main__":
    run_script(main)
