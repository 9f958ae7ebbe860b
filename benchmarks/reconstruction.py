"""Reconstruction quality of a tokenizer against a low-resolution video that spends the same bits.

    python benchmarks/reconstruction.py --data VIDEOS

The baseline is area-downsampled in space and time, stored with 8 bits a value, and upsampled trilinearly; of all its
shapes that fit the bits of the tokens (tokens x log2 of the codebook size), the one with the best mean PSNR over the
data is taken. Prints a table and writes JSON. PSNR and distances are from frames in memory.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import torch
from machine import command_line, machine_name, print_table, write_json
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from evatok_hf import EvatokModel, default_checkpoint, load_perceptual, psnr
from evatok_hf.streaming import ClipConfig, collate, evaluation_clips, to_float

ALL_CLIPS = 10**6


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Folder of videos that were not trained on."})
    split: str = field(default="val", metadata={"help": "Split, where the source is divided into splits."})
    model: str = field(
        default_factory=lambda: f"{default_checkpoint()}/tokenizer", metadata={"help": "Checkpoint folder or Hub id."}
    )
    lengths: list[int] = field(default_factory=list, metadata={"help": "Uniform lengths; shortest, middle, longest."})
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

    rows = []
    for length in lengths:
        bits = config.num_blocks * length * math.log2(config.codebook_size)
        made = []
        for part in tqdm(video.split(1), desc=f"{length} tokens a block", file=sys.stderr):
            made.append(model.decode(model.encode(part, length)))
        shape, low = best_baseline(video, bits)
        row = {"length": length, "tokens": config.num_blocks * length, "bits": round(bits), "baseline_shape": shape}
        for name, frames in (("model", torch.cat(made)), ("baseline", low)):
            row[name] = {"psnr": psnr(video, frames)}
            for metric, distance in metrics.items():
                with torch.no_grad():
                    row[name][metric] = torch.cat(
                        [distance.video(a, b) for a, b in zip(video.split(8), frames.split(8), strict=True)]
                    )
        rows.append(row)

    sources = [item["source"] for item in items]
    report = {
        "command": command_line("reconstruction.py"),
        "machine": machine_name(),
        "torch": torch.__version__,
        "fingerprint": model.fingerprint(),
        "codebook_size": config.codebook_size,
        "resolution": [config.num_frames, config.image_size, config.image_size],
        "videos": len(set(sources)),
        "clips": len(sources),
        "lengths": [summarise(row, sources) for row in rows],
    }
    print_report(report, list(metrics))
    if args.output:
        write_json(report, args.output, allow_nan=True)


def summarise(row: dict, sources: list[str]) -> dict:
    """Means over all clips and over the clips of each video, and how often the model is ahead."""
    summary = {key: row[key] for key in ("length", "tokens", "bits", "baseline_shape")}
    for name in ("model", "baseline"):
        summary[name] = {key: values.mean().item() for key, values in row[name].items()}
    ahead = {"psnr": row["model"]["psnr"] > row["baseline"]["psnr"]}
    ahead |= {key: row["model"][key] < row["baseline"][key] for key in row["model"] if key != "psnr"}
    summary["clips_ahead"] = {key: int(values.sum()) for key, values in ahead.items()}
    margin = row["model"]["psnr"] - row["baseline"]["psnr"]
    summary["psnr_margin"] = {"mean": margin.mean().item(), "min": margin.min().item()}
    summary["by_video"] = {}
    for source in dict.fromkeys(sources):
        mine = torch.tensor([other == source for other in sources])
        summary["by_video"][source] = {
            "clips": int(mine.sum()),
            **{name: {key: v[mine].mean().item() for key, v in row[name].items()} for name in ("model", "baseline")},
        }
    return summary


def print_report(report: dict, metrics: list[str]) -> None:
    print(f"{report['videos']} videos, {report['clips']} clips of {report['resolution']}; {report['machine']}")
    columns = ["tokens", "bits", "baseline", "PSNR", "of baseline", "margin", "least margin"]
    columns += [column for metric in metrics for column in (metric, "of baseline", "clips ahead")]
    table = [columns]
    for row in report["lengths"]:
        cells = [row["tokens"], row["bits"], "x".join(map(str, row["baseline_shape"]))]
        cells += [f"{row[name]['psnr']:.2f}" for name in ("model", "baseline")]
        cells += [f"{row['psnr_margin']['mean']:+.2f}", f"{row['psnr_margin']['min']:+.2f}"]
        for metric in metrics:
            cells += [f"{row[name][metric]:.4f}" for name in ("model", "baseline")]
            cells.append(f"{row['clips_ahead'][metric]}/{report['clips']}")
        table.append(cells)
    print_table(table)
    middle = report["lengths"][len(report["lengths"]) // 2]
    print(f"\nby video, {middle['tokens']} tokens a clip: PSNR (baseline, margin)")
    for source, row in middle["by_video"].items():
        model, baseline = row["model"]["psnr"], row["baseline"]["psnr"]
        print(f"{model:6.2f} ({baseline:5.2f}, {model - baseline:+.2f})  {row['clips']:4d} clips  {source}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
