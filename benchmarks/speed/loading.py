"""Speed of loading clips beside training: the loader alone, and the part of a training step that waits.

    python benchmarks/speed/loading.py --data VIDEOS --output loading.json

The loader decodes, cuts and batches clips as the configuration says, with as many worker processes as each of
`--num_workers`. Then `training/train_tokenizer.py` runs with the same configuration, loaders and all on the same cores,
and tells which part of its steps' time it waited for clips (`data_wait` of its log). The first half of the steps,
in which videos are opened and caches filled, does not count.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import Benchmark, Options, aim, table
from benchmarks.common.machine import describe_machine
from benchmarks.common.pictures import LIMIT, OWN
from benchmarks.speed.training_runs import CONFIGS, train
from evatok_hf.data.streaming import ClipStream, collate
from training.common.arguments import parse_arguments, parse_sources
from training.common.fields import option
from training.tokenizer.arguments import TokenizerArguments


@dataclass(kw_only=True)
class Arguments(Options):
    data: str = option("Folder of videos, tar shards or Hub data set, as --train_data takes it.")
    config: str = option("Name in training/configs.", "tokenizer_tiny")
    num_workers: list[int] = option("Worker processes to compare.", [0, 1, 2])
    clips: int = option("Clips that the loader alone is timed on.", 256)
    steps: int = option("Steps of the training runs; the first half warms up.", 24)

    def __post_init__(self):
        for least, name in enumerate(("num_workers", "clips", "steps")):
            self.at_least(least, name)
        self.one_of(config=CONFIGS)


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


def measure(args: Arguments) -> dict[str, Any]:
    words = ["--config", str(CONFIGS[args.config]), "--train_data", args.data, "--output_dir", "unused"]
    settings, _ = parse_arguments(TokenizerArguments, "", words)
    rows = []
    for workers in args.num_workers:
        rate = loading_rate(args.data, settings, workers, args.clips)
        with tempfile.TemporaryDirectory() as folder:
            given = {"train_data": args.data, "num_workers": workers, "mixed_precision": "auto"}
            last = train(args.config, args.steps, Path(folder), **given)
        if last is None:
            raise ValueError(f"there is too little memory for training {args.config}; name a smaller --config.")
        told = {name: last[name] for name in ("clips_per_second", "data_wait")}
        rows.append({"num_workers": workers, "loader_clips_per_second": rate} | told)
    what = "part of a training step that waits for clips, by the best number of workers"
    return {
        "machine": describe_machine(torch.device("cpu"), torch.float32),
        "batch_size": settings.batch_size,
        "rows": rows,
        "aims": {"data_wait": aim(what, min(row["data_wait"] for row in rows), "<=", 0.10)},
    }


def show(report: dict[str, Any]) -> str:
    columns = [
        ("loader processes", "{num_workers}"),
        ("loader alone, clips/s", "{loader_clips_per_second:.3g}"),
        ("training, clips/s", "{clips_per_second:.3g}"),
        ("of a step waiting", "{data_wait:.1%}"),
    ]
    return table(columns, report["rows"])


def panel(axis: Any, report: dict[str, Any]) -> None:
    rows = report["rows"]
    axis.bar([str(row["num_workers"]) for row in rows], [100 * row["data_wait"] for row in rows], color=OWN)
    axis.axhline(10, color=LIMIT, linewidth=1)
    axis.set(title="training", xlabel="loader processes", ylabel="% of a step waiting for clips")


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    main.run()
