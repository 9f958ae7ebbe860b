"""Long videos: how much memory encoding and decoding take by duration, and how clips meet.

    python benchmarks/quality/long_video.py --data VIDEOS --output out/long_video.json --picture out/long_video.png

Memory: the bundled clip is repeated to videos of `--seconds`; each is encoded and decoded in a process of its own,
which reports the largest memory that it ever held. Seams (with `--data`): videos go through the tokenizer with and
without the remedies, and errors, distances and jumps from frame to frame are averaged by position in the clip. Prints
tables and writes JSON. All comparisons are of 8-bit frames in memory.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import Benchmark, Options, aim, table
from benchmarks.common.clips import SAMPLE
from benchmarks.common.machine import describe_machine, in_fresh_process, peak_bytes, resident_bytes
from benchmarks.common.pictures import plain_ticks
from benchmarks.quality.long_video_seams import draw_seams, measure_seams, show_seams
from evatok_hf import VideoTokenizer, VideoTokens
from evatok_hf.video import VideoWriter, read_video
from training.common.fields import option

CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Arguments(Options):
    data: str | None = option("Folder of videos for the seams; without it only memory.", None)
    model: str = option("Checkpoint folder, Hub id or bundled name.", "evatok-tiny")
    seconds: list[int] = option("Durations for memory; 0: leave it out.", [10, 600])
    lengths: int | None = option("Tokens of every block, for memory and seams; the router by default.", None)
    max_clips: int = option("Clips of each video for the seams, from its start; 2 or more.", 12)
    picture: str | None = option("Picture of the seams to write.", None)

    def __post_init__(self):
        self.at_least(0, "seconds")
        self.at_least(2, "max_clips")


def measure(args: Arguments) -> dict[str, Any]:
    report: dict[str, Any] = {"machine": describe_machine(CPU, torch.float32)}
    if durations := [seconds for seconds in args.seconds if seconds]:
        report["memory"] = measure_memory(args.model, durations, 12.0, args.lengths)
        first, last = report["memory"][0], report["memory"][-1]
        report["aims"] = {}
        for task in ("encode", "decode"):
            what = f"memory of {task} {last['seconds']} s over {first['seconds']} s"
            growth = last[task]["peak_mib"] / first[task]["peak_mib"]
            report["aims"][what.replace(" ", "_")] = aim(what, growth, "<=", 1.10)
    if args.data is not None:
        tokenizer = VideoTokenizer.from_pretrained(args.model)
        report["fingerprint"] = tokenizer.model.fingerprint()
        report["seams"] = measure_seams(tokenizer, Path(args.data), args.lengths, args.max_clips)
        if args.picture:
            draw_seams(report["seams"], Path(args.picture))
    return report


def show(report: dict[str, Any]) -> str:
    parts = []
    if "memory" in report:
        columns = [
            ("seconds of video", "{seconds}"),
            ("frames", "{frames}"),
            ("tokens", "{tokens}"),
            ("encode, MiB at most (after loading)", "{encode[peak_mib]:.0f} ({encode[loaded_mib]:.0f})"),
            ("decode", "{decode[peak_mib]:.0f} ({decode[loaded_mib]:.0f})"),
        ]
        parts.append(table(columns, report["memory"]))
    if "seams" in report:
        parts.append(show_seams(report["seams"]))
    return "\n\n".join(parts)


def panel(axis: Any, report: dict[str, Any]) -> None:
    rows = report["memory"]
    for task, style in (("encode", "-"), ("decode", "--")):
        most = [row[task]["peak_mib"] for row in rows]
        axis.plot([row["seconds"] for row in rows], most, style, marker="o", color="tab:red", label=task)
    axis.set(title="most memory", xlabel="seconds of video", ylabel="MiB", xscale="log")
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    plain_ticks(axis, "x", [row["seconds"] for row in rows])
    axis.legend(fontsize=7)


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(model: str, durations: list[int], fps: float, lengths: int | None) -> list[dict]:
    """For each duration, what a process that encodes, and one that decodes, held at most, MiB."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="evatok_") as folder:
        video, tokens = Path(folder) / "video.mp4", Path(folder) / "video.safetensors"
        for seconds in durations:
            frames = write_repeated(video, round(seconds * fps), fps)
            row = {"seconds": seconds, "frames": frames}
            for task in ("encode", "decode"):
                row[task] = in_fresh_process(run_task, task, model, str(video), str(tokens), lengths)
            row["tokens"] = VideoTokens.load(tokens).ids.numel()
            rows.append(row)
    return rows


def write_repeated(path: Path, frames: int, fps: float) -> int:
    """The bundled clip at a quarter of its size, forwards and backwards until there are so many frames."""
    clip, _ = read_video(SAMPLE / "bikes.mp4")
    clip = np.ascontiguousarray(clip[:, ::4, ::4])  # (250, 68, 160, 3)
    order = [*range(len(clip)), *range(len(clip) - 2, 0, -1)]
    with VideoWriter(path, fps, *clip.shape[1:3]) as writer:
        for start in range(0, frames, 64):
            writer.write(clip[[order[i % len(order)] for i in range(start, min(start + 64, frames))]])
    return frames


def run_task(task: str, model: str, video: str, tokens: str, lengths: int | None) -> dict[str, float]:
    """MiB resident after loading and at most, and seconds, of this process."""
    tokenizer = VideoTokenizer.from_pretrained(model, decoder=task == "decode")

    def work() -> None:
        if task == "encode":
            tokenizer.encode(video, lengths).save(tokens)
        else:
            for _ in tokenizer.decode(VideoTokens.load(tokens)):
                pass

    loaded, started = resident_bytes(), time.perf_counter()
    peak = peak_bytes(work, CPU)
    seconds = time.perf_counter() - started
    return {"loaded_mib": round(loaded / 2**20, 1), "peak_mib": round(peak / 2**20, 1), "seconds": round(seconds, 1)}


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    main.run()
