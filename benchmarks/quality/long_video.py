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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import HfArgumentParser

import evatok_hf
from evatok_hf import VideoTokenizer, VideoTokens, default_checkpoint
from evatok_hf.interrupts import run_script
from evatok_hf.video import VideoWriter, read_video

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.machine import (
    aim,
    command_line,
    describe_machine,
    in_fresh_process,
    peak_bytes,
    print_aims,
    print_table,
    resident_bytes,
    write_json,
)
from benchmarks.quality.long_video_seams import draw_seams, measure_seams, print_seams

BIKES = Path(evatok_hf.__file__).parent / "assets" / "bikes.mp4"
CPU = torch.device("cpu")


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
    if min(args.seconds) < 0 or args.max_clips < 2 or args.overlap < 1:
        raise ValueError(
            "seconds must be 0 or more, max_clips 2 or more, so that there is a seam, and overlap 1 or more."
        )
    report = {
        "command": command_line("quality/long_video.py"),
        "machine": describe_machine(CPU, torch.float32),
    }
    durations = [seconds for seconds in args.seconds if seconds]
    if durations:
        report["memory"] = measure_memory(args.model, durations, args.fps, args.lengths)
        print_memory(report["memory"])
        report["aims"] = memory_aims(report["memory"])
        print_aims(report["aims"])
    if args.data is not None:
        tokenizer = VideoTokenizer.from_pretrained(args.model)
        report["fingerprint"] = tokenizer.model.fingerprint()
        report["seams"] = measure_seams(
            tokenizer, Path(args.data), args.lengths, args.overlap, args.max_clips, args.perceptual
        )
        print_seams(report["seams"])
        if args.picture:
            draw_seams(report["seams"], Path(args.picture))
    if args.output:
        write_json(report, args.output)


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
    clip, _ = read_video(BIKES)
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


def print_memory(rows: list[dict]) -> None:
    print("memory, MiB at most (in brackets: after loading)")
    table = [["seconds", "frames", "tokens", "encode", "decode"]]
    for row in rows:
        cells = [f"{row[task]['peak_mib']:.0f} ({row[task]['loaded_mib']:.0f})" for task in ("encode", "decode")]
        table.append([row["seconds"], row["frames"], row["tokens"], *cells])
    print_table(table)


def memory_aims(rows: list[dict]) -> dict:
    """The peak of the last duration over that of the first."""
    first, last = rows[0], rows[-1]
    return {
        f"memory_of_{task}_{last['seconds']}_s_over_{first['seconds']}_s": aim(
            last[task]["peak_mib"] / first[task]["peak_mib"], at_most=1.10
        )
        for task in ("encode", "decode")
    }


if __name__ == "__main__":
    run_script(main)
