"""Processor time of reading 16 frames of ordinary videos, beside another version of the package.

    python benchmarks/speed/reading.py --before OTHER_CHECKOUT/src --output reading.json

Measured, each version in a process of its own that has read other videos before, both in turn so that other work on
the machine hits them alike: a video that was never read is opened, its frames are counted, and 16 of them are read as
training does (every fourth, from the least on, by PyAV) or as encoding does (the first 16). `again` is the same file
once more. Videos are 320 x 240 with 150 frames, made on the spot.

Prints a table and writes JSON: the least of all rounds in milliseconds, and the ratio.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import ROOT, Benchmark, Options
from training.common.fields import option
from training.common.result_pages import markdown

ROUNDS = 30
TASKS = ("training", "again", "encoding")
WORKER = """
import itertools, sys, time
try:
    from evatok_hf.video import open_video
except ImportError:  # an older version
    from evatok_hf import open_video
for line in sys.stdin:
    task, path = line.rstrip("\\n").split(" ", 1)
    began = time.process_time()
    if task == "encoding":
        with open_video(path) as video:
            next(video.iter_chunks(16))
    else:
        with open_video(path, reader="pyav") as video:
            start = video.num_frames // 2
            video.read(range(start, start + 64, 4))
    print(time.process_time() - began, flush=True)
"""
NAMES = ("h264.mp4", "h264.mkv", "hevc.mp4", "vp9.webm", "mpeg4.avi", "mpeg1.mpg", "h264.ts", "animated.gif")


@dataclass(kw_only=True)
class Arguments(Options):
    before: str | None = option("Folder src of the other version.", None)


def make_videos(folder: Path) -> dict[str, Path]:
    """One of each of `NAMES`, as `tests/helpers/odd_videos.py` makes them but larger and with some noise."""
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    import numpy as np
    from odd_videos import H264, HEVC
    from video_samples import encode, moving_frames

    frames = moving_frames(150, 240, 320) // 2
    frames += np.random.default_rng(0).integers(0, 6, frames.shape, dtype=np.uint8)
    codecs = {
        "h264": ("libx264", "yuv420p", {**H264, "crf": "23"}),
        "hevc": ("libx265", "yuv420p", HEVC),
        "vp9": ("libvpx-vp9", "yuv420p", {"g": "20", "b": "500k", "deadline": "realtime", "cpu-used": "8"}),
        "mpeg4": ("mpeg4", "yuv420p", {"bf": "2", "g": "20", "qmin": "4", "qmax": "4"}),
        "mpeg1": ("mpeg1video", "yuv420p", {"bf": "2", "g": "20", "qmin": "4", "qmax": "4"}),
        "animated": ("gif", "rgb8", {}),
    }
    for name in NAMES:
        codec, pixels, options = codecs[name.split(".")[0]]
        encode(folder / name, frames, codec, pixels, 25, options)
    return {name: folder / name for name in NAMES}


def compare(sources: dict[str, Path], folder: Path) -> list[dict]:
    """A row for each video and task, and for all videos together."""
    videos = make_videos(folder)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    workers = {}
    for name, source in sources.items():
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        workers[name] = subprocess.Popen([sys.executable, "-c", WORKER], env=environment, **pipes)
    least: dict[tuple[str, str, str], float] = defaultdict(lambda: float("inf"))
    for turn in range(-2, ROUNDS):  # two to warm up
        for (video, path), (version, worker), task in product(videos.items(), workers.items(), TASKS):
            fresh = folder / f"{version}_{turn}_{task.replace('again', 'training')}_{video}"
            if task != "again":  # which is the file of "training"
                os.link(path, fresh)
            worker.stdin.write(f"{task} {fresh}\n")
            taken = 1000 * float(worker.stdout.readline())
            if turn >= 0:
                least[video, task, version] = min(least[video, task, version], taken)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    for task, version in product(TASKS, sources):
        least["all", task, version] = sum(least[video, task, version] for video in videos)
    rows = []
    for video, task in product((*videos, "all"), TASKS):
        taken = {version: least[video, task, version] for version in sources}
        row = {"video": video, "task": task, **{f"{version}_ms": round(ms, 2) for version, ms in taken.items()}}
        if "before" in taken:
            row["ratio"] = round(taken["now"] / taken["before"], 3)
        rows.append(row)
    return rows


def measure(args: Arguments) -> dict[str, Any]:
    sources = {"now": ROOT / "src"} | ({"before": Path(args.before)} if args.before else {})
    with tempfile.TemporaryDirectory() as folder:
        return {"rows": compare(sources, Path(folder))}


def show(report: dict[str, Any]) -> str:
    return markdown([name.replace("_", ", ") for name in report["rows"][0]], [row.values() for row in report["rows"]])


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    main.run()
