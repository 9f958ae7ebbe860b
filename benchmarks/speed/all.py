"""All of the speed benchmarks, one after the other: one table of aims, one picture, one JSON file.

    python benchmarks/speed/all.py --data VIDEOS --output out/speed

Each part is a benchmark of this folder with its own command, which is printed, and leaves its JSON file under
`--output`. A part whose file is there is not run again, so that a run that was stopped goes on. Half an hour of two
idle cores; keep the machine quiet meanwhile.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from benchmarks.common.benchmark import ROOT, Benchmark, Options, about_machine
from benchmarks.common.machine import describe_machine
from evatok_hf.interrupts import run_script
from evatok_hf.models.checkpoint_evatok import resolve_device
from evatok_hf.pictures.figures import pyplot, save_figure
from training.common.fields import option

# In the order in which they run: module, title, and options for --quick.
PARTS = {
    "tokenizer": ("speed.tokenizer", "Encoding and decoding", "--preset tiny --quick"),
    "sampling": (
        "speed.sampling",
        "Drawing clips",
        "--preset tiny --length 8 --batch_sizes 1 --implementations eager static",
    ),
    "search": ("speed.search", "Every assignment of a clip", "--clips 1"),
    "loading": ("speed.loading", "Loading while training", "--clips 16 --steps 4 --num_workers 1"),
    "memory": ("quality.long_video", "Long videos", "--seconds 2 4"),
    "bulk": ("speed.bulk", "Many videos", "--clips 256 --shard_size 16 --loop_clips 32"),
}
# Of those that can use a GPU.
ON_A_GPU = {
    "tokenizer": "--batch_size 16",
    "sampling": "--preset 327m --device cuda --dtype bfloat16" + (" --int8" if find_spec("torchao") else ""),
}


@dataclass(kw_only=True)
class Arguments(Options):
    data: str | None = option("Folder of videos, for real clips' lengths and for `loading`, which needs it.", None)
    output: str = option("Folder for the reports and the picture.", "out/speed")
    parts: list[str] = option(f"Of {', '.join(PARTS)}.", list(PARTS))
    device: str = option("cpu or cuda; auto: the GPU where there is one.", "auto")
    quick: bool = option("Small sizes, to see that all runs; no figure means a thing.", False)

    def __post_init__(self):
        self.one_of(parts=PARTS)
        if self.data is None and "loading" in self.parts:
            raise ValueError("part `loading` needs --data VIDEOS; or name the other --parts.")
        self.device = str(resolve_device(self.device))


def options(part: str, args: Arguments) -> list[str]:
    """The command-line options of a part."""
    given = ["--device", args.device] if part == "tokenizer" else []
    if args.data and part in ("tokenizer", "loading"):
        given += ["--lengths_from" if part == "tokenizer" else "--data", args.data]
    more = PARTS[part][2] if args.quick else ON_A_GPU.get(part, "") if args.device == "cuda" else ""
    return given + more.split()


def run(part: str, args: Arguments) -> dict[str, Any] | None:
    """The report of a part, or None where it failed, which is told."""
    path = Path(args.output, f"{part}.json")
    if not path.is_file():
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
    wanted = [part for part in PARTS if part in args.parts]
    done = {part: report for part in wanted if (report := run(part, args)) is not None}
    return {
        "machine": describe_machine(torch.device(args.device), torch.float32),
        "aims": {name: row for report in done.values() for name, row in report["aims"].items()},
        "parts": done,
        "failed": [part for part in wanted if part not in done],
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
    parts = report["parts"]
    if not parts:
        return
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    figure = pyplot().figure(figsize=(5 * columns, 3.8 * rows), layout="constrained")
    for place, (part, told) in enumerate(parts.items(), start=1):
        axis = figure.add_subplot(rows, columns, place)
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
