"""Bulk tokenizing against a plain loop, and what a worker costs that dies on the way.

    python benchmarks/speed/bulk.py --output bulk.json

Makes small videos (or takes those of --data) and tokenizes them three times: by a loop in this one process, by
`evatok tokenize-dataset`, and so once more with a worker killed in the middle. The last two must give equal shards, in
which every clip is once; their throughput is set against the loop's times the number of workers. The loop runs before,
between and after them, and each is set against the mean of its two neighbours, since machines have better and worse
minutes. "with start" counts from the command to the finished data set; "steady" from the first shard to the last, when
the workers are there.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import Benchmark, Options, aim
from benchmarks.common.machine import describe_machine, matmul_peak
from benchmarks.common.pictures import OTHER, OWN
from evatok_hf import VideoTokenizer
from evatok_hf.allocation import Allocation
from evatok_hf.bulk.engine import BulkOptions, Progress, tokenize_source
from evatok_hf.data.clip_cutting import ClipConfig
from evatok_hf.data.streaming import ClipStream, collate, to_float
from evatok_hf.data.token_dataset import SHARDS
from evatok_hf.models.files_evatok import read_json
from evatok_hf.tokenize.clip_tokens import ClipTokens
from evatok_hf.video.read import write_video
from evatok_hf.video.source_files import VIDEO_SUFFIXES, list_files
from training.common.fields import option
from training.common.flops import router_flops, tokenizer_flops
from training.common.result_pages import markdown

BATCH = 32


@dataclass(kw_only=True)
class Arguments(Options):
    clips: int = option("How many clips in all.", 2000)
    data: str | None = option("Folder of videos; some are made without.", None)
    loop_clips: int = option("Clips that the loop is timed on.", 256)
    shard_size: int = option("Clips of a shard.", 64)

    def __post_init__(self):
        self.at_least(1, "clips", "loop_clips", "shard_size")


def make_videos(folder: Path, count: int) -> None:
    """Videos of 48 frames, 96 x 128: squares that move over a gradient, each in its own way."""
    y, x = np.mgrid[0:96, 0:128].astype(np.float32)
    for index in range(count):
        rng = np.random.default_rng(index)
        place, speed, colour = rng.uniform(0, 80, 2), rng.uniform(-3, 3, 2), rng.integers(0, 256, 3)
        frames = np.empty((48, 96, 128, 3), np.uint8)
        frames[...] = (np.stack([x * rng.uniform(0, 2), y * rng.uniform(0, 2), x + y], -1) % 256).astype(np.uint8)
        for number, frame in enumerate(frames):
            top, left = (int(value) % 72 for value in place + number * speed)
            frame[top : top + 24, left : left + 24] = colour
        write_video(folder / f"{index:05d}.mp4", frames, 25)


def time_loop(source: str, tokenizer: VideoTokenizer, clips: ClipConfig, least: int) -> float:
    """Clips a second of one process that decodes and encodes so many in turn, after a batch that warms it up."""
    torch.set_num_threads(1)
    stream = ClipStream(source, config=clips, repeat=False)
    encode = ClipTokens(Allocation().bind(tokenizer.model, tokenizer.router))
    count, started = -BATCH, 0.0
    for batch in DataLoader(stream, BATCH, collate_fn=collate, drop_last=True):
        encode(to_float(batch["pixel_values_videos"]))
        count += BATCH
        if count == 0:
            started = time.perf_counter()
        if count >= least:
            break
    if count <= 0:
        raise ValueError(f"the loop needs at least {2 * BATCH} clips to be timed on; give more videos.")
    return count / (time.perf_counter() - started)


def run(
    source: str, folder: Path, tokenizer: VideoTokenizer, options: BulkOptions, total: int, kill: bool
) -> dict[str, Any]:
    """Tokenizes; kills a worker when half of the clips are there, if told to."""
    shards: list[tuple[float, int]] = []  # when how many clips were in shards
    killed = False

    def watch(progress: Progress) -> None:
        nonlocal killed
        if progress.clips:
            shards.append((time.perf_counter(), progress.clips))
        if kill and not killed and progress.clips >= total // 2:
            processes = psutil.Process().children(recursive=True)
            next(filter(is_worker, processes)).kill()
            killed = True

    command, started = "benchmarks/speed/bulk.py", time.perf_counter()
    summary = tokenize_source(source, folder, lambda: tokenizer, Allocation(), options, command, watch)
    seconds = time.perf_counter() - started
    if kill and not killed:
        raise ValueError("no worker was killed; give more clips.")
    (begun, few), (ended, many) = shards[0], shards[-1]
    return {
        "worker_killed": kill,
        "clips": summary["clips"],
        "seconds": round(seconds, 1),
        "clips_per_second_with_start": summary["clips"] / seconds,
        "clips_per_second_steady": (many - few) / max(1e-9, ended - begun),
        "machine": summary["machine"],
    }


def check(folder: Path, undisturbed: Path, source: str, clips: ClipConfig, skipped: int) -> None:
    """Raises ValueError unless every clip of every video is there once, and both folders have equal shards."""
    found = Counter()
    for path in SHARDS.list(folder):
        if path.read_bytes() != (undisturbed / "data" / path.name).read_bytes():
            raise ValueError(f"{path.name} differs with and without a worker killed.")
        found.update(pq.read_table(path, columns=["source"])["source"].to_pylist())
    if len(SHARDS.list(folder)) != len(SHARDS.list(undisturbed)):
        raise ValueError("there are fewer shards with a worker killed than without.")
    videos = {example.key for example in ClipStream(source, config=clips).sources[0].examples(None, 0, 0, 0, 1)}
    wrong = {name: count for name, count in found.items() if count != clips.clips_per_video}
    if wrong or not found.keys() <= videos or len(videos - found.keys()) != skipped:
        raise ValueError(f"not every clip is there once: {wrong or sorted(videos - found.keys())[:5]}.")


def operations(folder: Path, tokenizer: VideoTokenizer) -> float:
    """Of choosing and encoding a clip, on average over the data set."""
    lengths = np.concatenate([np.stack(pq.read_table(path)["lengths"].to_numpy()) for path in SHARDS.list(folder)])
    encoding = np.mean([tokenizer_flops(tokenizer.model.config, row)[0] for row in lengths.tolist()])
    return float(encoding) + router_flops(tokenizer.router.config)


def measure(args: Arguments) -> dict[str, Any]:
    load, workers = os.getloadavg()[0], len(os.sched_getaffinity(0))
    tokenizer = VideoTokenizer.from_pretrained("evatok-tiny")
    config = tokenizer.model.config
    clips = ClipConfig(config.num_frames, config.image_size, clips_per_video=4)
    options = BulkOptions(clips=clips, shard_size=args.shard_size)
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), args.data
        if source is None:
            source = str(folder / "videos")
            Path(source).mkdir()
            make_videos(Path(source), -(-args.clips // clips.clips_per_video))
        loops = [time_loop(source, tokenizer, clips, args.loop_clips)]
        total = len(list_files(source, VIDEO_SUFFIXES)) * clips.clips_per_video
        rows = []
        for kill in (False, True):
            rows.append(run(source, folder / f"{kill}", tokenizer, options, total, kill))
            loops.append(time_loop(source, tokenizer, clips, args.loop_clips))
        skipped = read_json(folder / "True" / "tokens.json")["skipped"]
        check(folder / "True", folder / "False", source, clips, sum(skipped.values()))
        flops = operations(folder / "True", tokenizer)
    torch.set_num_threads(workers)
    peak = matmul_peak(torch.device("cpu"), tokenizer.model.dtype)
    for row, around in zip(rows, pairwise(loops), strict=True):
        row["of_peak"] = flops * row["clips_per_second_steady"] / peak
        for kind in ("steady", "with_start"):
            row[f"of_the_loops_{kind}"] = row[f"clips_per_second_{kind}"] / (sum(around) / 2 * workers)
    what = "many videos: throughput over that of a loop times the number of workers"
    return {
        "machine": describe_machine(torch.device("cpu"), tokenizer.model.dtype),
        "load_before": load,
        "tokenizer": tokenizer.name,
        "workers": workers,
        "threads": 1,
        "loop_clips_per_second": loops,
        "tflop_per_clip": flops / 1e12,
        "rows": rows,
        "every_clip_once": True,
        "aims": {"throughput_of_the_loops": aim(what, rows[0]["of_the_loops_steady"], ">=", 0.85)},
    }


def is_worker(process: psutil.Process) -> bool:
    try:
        return "MapWorker" in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def show(report: dict[str, Any]) -> str:
    loops = " / ".join(f"{loop * report['workers']:.1f}" for loop in report["loop_clips_per_second"])
    rows = [[f"loop in one process, times {report['workers']}, before / between / after", loops, "", "", ""]]
    for row in report["rows"]:
        what = "a worker killed in the middle" if row["worker_killed"] else "undisturbed"
        speeds = [f"{row[f'clips_per_second_{kind}']:.1f}" for kind in ("steady", "with_start")]
        shares = [f"{row[name]:.0%}" for name in ("of_the_loops_steady", "of_peak")]
        rows.append([f"`evatok tokenize-dataset`, {what}", *speeds, *shares])
    headers = ["", "clips/s", "with start and end", "of the loops", "of the peak, choosing and encoding"]
    count = report["rows"][1]["clips"]
    return f"{markdown(headers, rows)}\n\n{count:,} clips, each once, and equal shards with and without the kill."


def panel(axis: Any, report: dict[str, Any]) -> None:
    workers, loops = report["workers"], report["loop_clips_per_second"]
    bars = {f"loop\ntimes {workers}": sum(loops) / len(loops) * workers}
    for row in report["rows"]:
        bars["bulk,\na worker killed" if row["worker_killed"] else "bulk"] = row["clips_per_second_steady"]
    axis.bar(list(bars), list(bars.values()), color=[OTHER, OWN, OWN])
    axis.set(title="many videos", ylabel="clips a second")


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    main.run()
