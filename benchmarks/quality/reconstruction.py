"""Reconstruction quality of a tokenizer against a low-resolution video that spends the same bits.

    python benchmarks/quality/reconstruction.py --data VIDEOS
    python benchmarks/quality/reconstruction.py --data VIDEOS --refinement_steps 10

The baseline is area-downsampled in space and time, stored with 8 bits a value, and upsampled trilinearly; of all its
shapes that fit the bits of the tokens (tokens x log2 of the codebook size), the one with the best mean PSNR over the
data is taken. With refinement, the same tokens by `EvatokModel.encode(.., refinement_steps)` stand beside it: the same
bits again. Prints a table, with the time that encoding a clip took, and writes JSON. PSNR and distances are from frames
in memory.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from evatok_hf import EvatokModel, default_checkpoint
from evatok_hf.data.streaming import ClipConfig, collate, evaluation_clips, to_float
from evatok_hf.interrupts import run_script
from evatok_hf.metrics import load_perceptual, psnr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.machine import command_line, machine_name, print_table, write_json

ALL_CLIPS = 10**6


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Folder of videos that were not trained on."})
    split: str = field(default="val", metadata={"help": "Split, where the source is divided into splits."})
    model: str = field(
        default_factory=lambda: f"{default_checkpoint()}/tokenizer", metadata={"help": "Checkpoint folder or Hub id."}
    )
    lengths: list[int] = field(default_factory=list, metadata={"help": "Uniform lengths; shortest, middle, longest."})
    refinement_steps: int = field(default=0, metadata={"help": "Also measure ids refined by so many steps; slow."})
    clips_per_video: int = field(default=0, metadata={"help": "Clips evenly spaced over each video; 0: all of them."})
    perceptual: list[str] = field(
        default_factory=lambda: ["perceptual-effnet-lite0"], metadata={"help": "Perceptual distances to measure."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


def baseline_shapes(values: int, num_frames: int, image_size: int) -> list[tuple[int, int, int]]:
    """(frames, height, width) of low-resolution videos with three channels that need at most so many values."""
    shapes = []
    for frames in (2**i for i in range(int(math.log2(num_frames)) + 1)):
        for height in range(1, image_size + 1):
            for width in (height, height + 1):
                if frames * height * width * 3 <= values and width <= image_size:
                    shapes.append((frames, height, width))
    return shapes


def low_resolution(video: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """(B, F, 3, H, W) in [-1, 1] through `shape` with 8 bits a value."""
    x = video.transpose(1, 2)  # (B, 3, F, H, W)
    small = F.interpolate(x, size=shape, mode="area")
    small = ((small + 1) * 127.5).round() / 127.5 - 1
    return F.interpolate(small, size=x.shape[2:], mode="trilinear").transpose(1, 2)


def best_baseline(video: torch.Tensor, bits: float) -> tuple[tuple[int, int, int], torch.Tensor]:
    """The shape with the best mean PSNR over all clips, and its reconstruction."""
    best = None
    for shape in baseline_shapes(int(bits // 8), video.shape[1], video.shape[-1]):
        made = torch.cat([low_resolution(part, shape) for part in video.split(16)])
        quality = psnr(video, made).mean().item()
        if best is None or quality > best[0]:
            best = (quality, shape, made)
    return best[1], best[2]


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    model = EvatokModel.from_pretrained(args.model, dtype=torch.float32).eval()
    config = model.config
    candidates = config.block_lengths
    lengths = args.lengths or [candidates[0], candidates[len(candidates) // 2], candidates[-1]]
    clip = ClipConfig(num_frames=config.num_frames, image_size=config.image_size)
    items = list(evaluation_clips(args.data, clip, args.clips_per_video or ALL_CLIPS, split=args.split))
    video = to_float(collate(items)["pixel_values_videos"])  # (B, F, 3, H, W)
    metrics = {name: load_perceptual(name) for name in args.perceptual}

    systems = {"model": 0} | ({"refined": args.refinement_steps} if args.refinement_steps else {})
    rows = []
    for length in lengths:
        bits = config.num_blocks * length * math.log2(config.codebook_size)
        shape, low = best_baseline(video, bits)
        row = {"length": length, "tokens": config.num_blocks * length, "bits": round(bits), "baseline_shape": shape}
        frames, row["encode_seconds"] = {}, {}  # a clip, on average
        for name, steps in systems.items():
            tokens, started = [], time.perf_counter()
            for part in tqdm(video.split(1), desc=f"{length} tokens a block, {name}", file=sys.stderr):
                tokens.append(model.encode(part, length, steps))
            row["encode_seconds"][name] = (time.perf_counter() - started) / len(video)
            frames[name] = torch.cat([model.decode(clip) for clip in tokens])
        for name, shown in (frames | {"baseline": low}).items():
            row[name] = {"psnr": psnr(video, shown)}
            for metric, distance in metrics.items():
                with torch.no_grad():
                    row[name][metric] = torch.cat(
                        [distance.video(a, b) for a, b in zip(video.split(8), shown.split(8), strict=True)]
                    )
        rows.append(row)

    sources = [item["source"] for item in items]
    report = {
        "command": command_line("quality/reconstruction.py"),
        "machine": machine_name(),
        "torch": torch.__version__,
        "fingerprint": model.fingerprint(),
        "codebook_size": config.codebook_size,
        "resolution": [config.num_frames, config.image_size, config.image_size],
        "refinement_steps": args.refinement_steps,
        "videos": len(set(sources)),
        "clips": len(sources),
        "lengths": [summarise(row, sources) for row in rows],
    }
    print_report(report, list(metrics))
    if args.output:
        write_json(report, args.output, allow_nan=True)


def summarise(row: dict, sources: list[str]) -> dict:
    """Means over all clips and over the clips of each video, and how often the model is ahead."""
    summary = {key: row[key] for key in ("length", "tokens", "bits", "baseline_shape", "encode_seconds")}
    names = [name for name in ("model", "refined", "baseline") if name in row]
    for name in names:
        summary[name] = {key: values.mean().item() for key, values in row[name].items()}
    for name in names[:-1]:
        prefix = "" if name == "model" else f"{name}_"
        margin = row[name]["psnr"] - row["baseline"]["psnr"]
        ahead = {"psnr": margin > 0}
        ahead |= {key: row[name][key] < row["baseline"][key] for key in row[name] if key != "psnr"}
        summary[f"{prefix}clips_ahead"] = {key: int(values.sum()) for key, values in ahead.items()}
        summary[f"{prefix}psnr_margin"] = {"mean": margin.mean().item(), "min": margin.min().item()}
    summary["by_video"] = {}
    for source in dict.fromkeys(sources):
        mine = torch.tensor([other == source for other in sources])
        summary["by_video"][source] = {
            "clips": int(mine.sum()),
            **{name: {key: v[mine].mean().item() for key, v in row[name].items()} for name in names},
        }
    return summary


def print_report(report: dict, metrics: list[str]) -> None:
    print(f"{report['videos']} videos, {report['clips']} clips of {report['resolution']}; {report['machine']}")
    columns = ["tokens", "bits", "ids", "s a clip", "baseline", "PSNR", "of baseline", "margin", "least margin"]
    columns += [column for metric in metrics for column in (metric, "of baseline", "clips ahead")]
    table = [columns]
    systems = {"model": ("encoder's", "")}
    if report["refinement_steps"]:
        systems["refined"] = (f"refined, {report['refinement_steps']} steps", "refined_")
    for row in report["lengths"]:
        for name, (title, prefix) in systems.items():
            cells = [row["tokens"], row["bits"], title, f"{row['encode_seconds'][name]:.2f}"]
            cells.append("x".join(map(str, row["baseline_shape"])))
            cells += [f"{row[system]['psnr']:.2f}" for system in (name, "baseline")]
            margin, ahead = row[f"{prefix}psnr_margin"], row[f"{prefix}clips_ahead"]
            cells += [f"{margin['mean']:+.2f}", f"{margin['min']:+.2f}"]
            for metric in metrics:
                cells += [f"{row[system][metric]:.4f}" for system in (name, "baseline")]
                cells.append(f"{ahead[metric]}/{report['clips']}")
            table.append(cells)
    print_table(table)
    middle = report["lengths"][len(report["lengths"]) // 2]
    best = list(systems)[-1]
    print(f"\nby video, {middle['tokens']} tokens a clip, ids {systems[best][0]}: PSNR (baseline, margin)")
    for source, row in middle["by_video"].items():
        ours, baseline = row[best]["psnr"], row["baseline"]["psnr"]
        print(f"{ours:6.2f} ({baseline:5.2f}, {ours - baseline:+.2f})  {row['clips']:4d} clips  {source}")


if __name__ == "__main__":
    run_script(main)
