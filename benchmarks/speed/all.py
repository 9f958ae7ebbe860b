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
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from transformers import HfArgumentParser

from benchmarks.common.machine import command_line, describe_machine, print_aims, write_json
from benchmarks.speed.figures import draw
from benchmarks.speed.page import MARKS, results
from evatok_hf.interrupts import run_script
from training.common.result_pages import check_page, update_page

FOLDER = Path(__file__).resolve().parents[1]
# In the order in which they run. Where a GPU is used, so by those that can.
PARTS = {
    "tokenizer": "speed/tokenizer.py",
    "sampling": "speed/sampling.py",
    "search": "speed/search.py",
    "loading": "speed/loading.py",
    "memory": "quality/long_video.py",
    "bulk": "speed/bulk.py",
}


@dataclass
class Arguments:
    data: str | None = field(
        default=None,
        metadata={"help": "Folder of videos, for real clips' lengths and for `loading`, which needs it."},
    )
    output: str = field(default="out/speed", metadata={"help": "Folder for the reports and the picture."})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"Of {', '.join(PARTS)}."})
    device: str = field(default="auto", metadata={"help": "cpu or cuda; auto: the GPU where there is one."})
    quick: bool = field(default=False, metadata={"help": "Small sizes, to see that all runs; no figure means a thing."})
    page: str | None = field(
        default=None,
        metadata={"help": "Page of the documentation that gets the results, and beside it the picture."},
    )
    again: bool = field(default=False, metadata={"help": "Run parts whose report is there already, too."})

    def __post_init__(self):
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ValueError(f"--parts must be some of {', '.join(PARTS)}, got {' '.join(unknown)}.")
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
    if part == "sampling":
        if args.quick:
            return ["--preset", "tiny", "--length", "8", "--batch_sizes", "1", "--implementations", "eager", "static"]
        return ["--preset", "327m", "--device", "cuda", "--dtype", "bfloat16", "--int8"] if gpu else []
    if part == "search":
        return ["--clips", "1"] if args.quick else []
    if part == "loading":
        quick = ["--clips", "16", "--steps", "4", "--num_workers", "1"]
        return ["--data", str(args.data), *(quick if args.quick else [])]
    if part == "memory":
        return ["--seconds", "2", "4"] if args.quick else []
    return ["--clips", "128", "--shard_size", "16", "--loop_clips", "32"] if args.quick else []


def run(part: str, args: Arguments, path: Path) -> dict | None:
    """The report of a part, or None where it failed, which is told."""
    if args.again or not path.is_file():
        command = ["python", f"benchmarks/{PARTS[part]}", *options(part, args), "--output", str(path)]
        print(f"\n{part}: {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, str(FOLDER / PARTS[part]), *command[2:]])
        if done.returncode:
            print(f"{part} failed with exit code {done.returncode}, see above", file=sys.stderr)
            return None
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads(path.read_text())


def main(argv: list[str] | None = None) -> dict:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}; choose another --output.") from error
    if args.page:
        check_page(Path(args.page), MARKS)
    reports = {part: run(part, args, folder / f"{part}.json") for part in PARTS if part in args.parts}
    failed = [part for part, report in reports.items() if report is None]
    reports = {part: report for part, report in reports.items() if report is not None}
    aims = {name: row for report in reports.values() for name, row in report["aims"].items()}
    report = {
        "command": command_line("speed/all.py", argv),
        "machine": describe_machine(torch.device(args.device), torch.float32),
        "settings": asdict(args),
        "aims": aims,
        "parts": reports,
    }
    print()
    print_aims(aims)
    write_json(report, folder / "speed.json")
    draw(report, folder / "speed.png")
    print(f"\n{folder / 'speed.json'} and {folder / 'speed.png'} are written")
    if args.page:
        page = Path(args.page)
        update_page(page, MARKS, results(report, f"{page.stem}.png"))
        draw(report, page.with_suffix(".png"))
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; the same command runs them again and keeps what is there.")
    return report


if __name__ == "__main__":
    run_script(main)
