"""Long videos: how much memory encoding and decoding take by duration, and how clips meet.

    python benchmarks/long_video.py --data VIDEOS --output out/long_video.json --picture out/long_video.png

Memory: the bundled clip is repeated to videos of `--seconds`; each is encoded and decoded in a process of its own,
which reports the largest memory that it ever held. Seams (with `--data`): videos go through the tokenizer with and
without the remedies, and errors, distances and jumps from frame to frame are averaged by position in the clip. Prints
tables and writes JSON. All comparisons are of 8-bit frames in memory.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import HfArgumentParser

import evatok_hf
from evatok_hf import VideoTokenizer, VideoTokens, VideoWriter, default_checkpoint, read_video
from evatok_hf.network import one_line

sys.path.insert(0, str(Path(__file__).resolve().parent))
from long_video_seams import measure_seams, print_seams, save_figure

BIKES = Path(evatok_hf.__file__).parent / "assets" / "bikes.mp4"
CHILD = "--in-a-process-of-its-own"


@dataclass
class Arguments:
    data: str | None = field(default=None, metadata={"help": "Folder of videos for the seams; without it only memory."})
    model: str = field(default_factory=default_checkpoint, metadata={"help": "Checkpoint folder or Hub id."})
    seconds: list[int] = field(
        default_factory=lambda: [10, 600], metadata={"help": "Durations for memory; 0: leave it out."}
    )
    fps: float = field(default=12.0, metadata={"help": "Rate of the videos made for memory."})
    lengths: int | None = field(
        default=None, metadata={"help": "Tokens of every block, for memory and seams; the router by default."}
    )
    overlap: int = field(default=4, metadata={"help": "Frames that clips have in common where they overlap."})
    max_clips: int = field(default=12, metadata={"help": "Clips of each video for the seams, from its start."})
    perceptual: str = field(default="perceptual-effnet-lite0", metadata={"help": "Perceptual distance by position."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})
    picture: str | None = field(default=None, metadata={"help": "Picture of the seams to write."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    if min(args.seconds) < 0 or args.max_clips < 2:
        raise ValueError("seconds must be 0 or more, and max_clips at least 2, so that there is a seam.")
    report = {
        "command": shlex.join(["python", "benchmarks/long_video.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
    }
    durations = [seconds for seconds in args.seconds if seconds]
    if durations:
        report["memory"] = measure_memory(args.model, durations, args.fps, args.lengths)
        print_memory(report["memory"])
    if args.data is not None:
        tokenizer = VideoTokenizer.from_pretrained(args.model)
        report["fingerprint"] = tokenizer.model.fingerprint()
        report["seams"] = measure_seams(
            tokenizer, Path(args.data), args.lengths, args.overlap, args.max_clips, args.perceptual
        )
        print_seams(report["seams"])
        if args.picture:
            save_figure(report["seams"], Path(args.picture))
    if args.output:
        temporary = Path(f"{args.output}.partial")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(temporary, args.output)


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
                job = {"task": task, "model": model, "video": str(video), "tokens": str(tokens), "lengths": lengths}
                row[task] = in_a_process(job)
            row["tokens"] = VideoTokens.load(tokens).ids.numel()
            rows.append(row)
    return rows


def write_repeated(path: Path, frames: int, fps: float) -> int:
    """The bundled clip at a quarter of its size, forwards and backwards until there are so many frames."""
    clip, _ = read_video(BIKES)
    clip = np.ascontiguousarray(clip[:, ::4, ::4])  # (250, 68, 160, 3)
    order = [*range(len(clip)), *range(len(clip) - 2, 0, -1)]
    with VideoWriter(path, fps, *clip.shape[1:3]) as writer:
        for start in range(0, frames, 64):
            writer.write(clip[[order[i % len(order)] for i in range(start, min(start + 64, frames))]])
    return frames


def in_a_process(job: dict) -> dict:
    """What `child` reports of that job."""
    command = [sys.executable, __file__, CHILD, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{job['task']} of {job['video']} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(job: dict) -> None:
    tokenizer = VideoTokenizer.from_pretrained(job["model"], decoder=job["task"] == "decode")
    loaded, started = peak_memory(), time.perf_counter()
    if job["task"] == "encode":
        tokenizer.encode(job["video"], job["lengths"]).save(job["tokens"])
    else:
        for _ in tokenizer.decode(VideoTokens.load(job["tokens"])):
            pass
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"loaded_mib": loaded, "peak_mib": peak_memory(), "seconds": seconds}))


def peak_memory() -> float:
    """MiB of resident memory at most, of this program alone: getrusage also counts what its parent held as it began."""
    try:
        status = Path("/proc/self/status").read_text()
        return round(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024, 1)
    except FileNotFoundError:  # not Linux; macOS counts bytes
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)


def print_memory(rows: list[dict]) -> None:
    print("memory, MiB at most (in brackets: after loading)")
    print(f"{'seconds':>8} {'frames':>8} {'tokens':>8} {'encode':>17} {'decode':>17}")
    for row in rows:
        cells = [f"{row[task]['peak_mib']:.0f} ({row[task]['loaded_mib']:.0f})" for task in ("encode", "decode")]
        print(f"{row['seconds']:8} {row['frames']:8} {row['tokens']:8} {cells[0]:>17} {cells[1]:>17}")
    for task in ("encode", "decode"):
        most = [row[task]["peak_mib"] for row in rows]
        print(f"{task}: the longest takes {100 * (most[-1] / most[0] - 1):+.1f} % of the first's memory more")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == [CHILD]:
            child(json.loads(sys.argv[2]))
        else:
            main()
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(1) from None
