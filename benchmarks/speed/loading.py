"""Whether clips come as fast as training takes them: the loader alone, and the part of a training step that waits.

    python benchmarks/speed/loading.py --data VIDEOS --output loading.json

The loader decodes, cuts and batches clips as the configuration says, with as many worker processes as each of
`--num_workers`. Then `training/train_tokenizer.py` runs with the same configuration, loaders and all on the same cores,
and tells which part of its steps' time it waited for clips (`data_wait` of its log). The first half of the steps,
in which videos are opened and caches filled, does not count.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from evatok_hf.data.streaming import ClipStream, collate
from evatok_hf.interrupts import run_script

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.machine import aim, command_line, describe_machine, print_aims, print_table, write_json
from training.common.arguments import parse_arguments, parse_sources
from training.tokenizer.arguments import TokenizerArguments


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Folder of videos, tar shards or Hub data set, as --train_data takes it."})
    config: str = field(default="tokenizer_tiny", metadata={"help": "Name in training/configs."})
    mixed_precision: str = field(default="auto", metadata={"help": "As of training; auto: as the device has it."})
    num_workers: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Worker processes to compare."})
    clips: int = field(default=256, metadata={"help": "Clips that the loader alone is timed on."})
    steps: int = field(default=24, metadata={"help": "Steps of the training runs; the first half warms up."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def __post_init__(self):
        if min(self.num_workers) < 0:
            raise ValueError(f"--num_workers must be 0 or more, got {self.num_workers}.")
        if self.clips < 1 or self.steps < 2:
            raise ValueError("--clips must be at least 1 and --steps 2, of which the first half warms up.")
        if not self.path.is_file():
            known = sorted(path.stem for path in self.path.parent.glob("*.yaml"))
            raise ValueError(f"--config must be one of {', '.join(known)}, got {self.config!r}.")

    @property
    def path(self) -> Path:
        return ROOT / "training" / "configs" / f"{self.config}.yaml"


def loading_rate(data: str, settings: TokenizerArguments, workers: int, clips: int) -> float:
    """Clips a second of the loader alone, from its first batch on."""
    clip = settings.clip_config(settings.model_config())
    stream = ClipStream(parse_sources([data]), settings.train_split, clip, shuffle_buffer=settings.shuffle_buffer)
    size = max(1, settings.batch_size // max(1, workers))
    batches = iter(DataLoader(stream, size, num_workers=workers, collate_fn=collate))
    # What the workers read ahead while the first batch is waited for would otherwise come for nothing.
    for _ in range(1 + 2 * workers):
        next(batches)
    started, rounds = time.perf_counter(), -(-clips // size)
    for _ in range(rounds):
        next(batches)
    return rounds * size / (time.perf_counter() - started)


def train(args: Arguments, workers: int, folder: Path) -> dict:
    """Clips a second and the part of the time that waited for them, of the second half of a training run."""
    options = {
        "config": args.path,
        "train_data": args.data,
        "output_dir": folder,
        "mixed_precision": args.mixed_precision,
        "num_workers": workers,
        "steps": args.steps,
        "log_every": args.steps // 2,
        "save_every": args.steps,
    }
    command = [sys.executable, str(ROOT / "training" / "train_tokenizer.py")]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{shlex.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if "data_wait" in line][-1]
    return {name: last[name] for name in ("clips_per_second", "data_wait")}


def main(argv: list[str] | None = None) -> dict:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    settings, _ = parse_arguments(
        TokenizerArguments, "", ["--config", str(args.path), "--train_data", args.data, "--output_dir", "unused"]
    )
    rows = []
    for workers in args.num_workers:
        rate = loading_rate(args.data, settings, workers, args.clips)
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"num_workers": workers, "loader_clips_per_second": rate, **train(args, workers, Path(folder))})
    table = [["workers", "loader alone, clips/s", "training, clips/s", "of a step waiting"]]
    for row in rows:
        rates = [f"{row[name]:.3g}" for name in ("loader_clips_per_second", "clips_per_second")]
        table.append([row["num_workers"], *rates, f"{row['data_wait']:.1%}"])
    print_table(table)
    report = {
        "command": command_line("speed/loading.py", argv),
        "machine": describe_machine(torch.device("cpu"), torch.float32),
        "settings": asdict(args),
        "batch_size": settings.batch_size,
        "rows": rows,
        "aims": {"data_wait": aim(min(row["data_wait"] for row in rows), at_most=0.10)},
    }
    print(f"{args.config}, batches of {settings.batch_size}; the aim is for the best number of workers")
    print_aims(report["aims"])
    if args.output:
        write_json(report, args.output)
    return report


if __name__ == "__main__":
    run_script(main)
