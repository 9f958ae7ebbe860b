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
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.common.benchmark import Benchmark
from benchmarks.common.clips import METRIC, ClipOptions, ahead, compare, means
from evatok_hf import EvatokModel, default_checkpoint
from evatok_hf.metrics import load_perceptual, psnr
from training.common.fields import option
from training.common.result_pages import markdown


@dataclass(kw_only=True)
class Arguments(ClipOptions):
    model: str = option("Checkpoint folder or Hub id.", lambda: f"{default_checkpoint()}/tokenizer")
    lengths: list[int] = option("Uniform lengths; shortest, middle, longest.", [])
    refinement_steps: int = option("Also measure ids refined by so many steps; slow.", 0)


def baseline_shapes(values: int, num_frames: int, image_size: int) -> list[tuple[int, int, int]]:
    """(frames, height, width) of low-resolution videos with three channels that need at most so many values."""
    return [
        (frames, height, width)
        for frames in (2**i for i in range(int(math.log2(num_frames)) + 1))
        for height in range(1, image_size + 1)
        for width in (height, height + 1)
        if frames * height * width * 3 <= values and width <= image_size
    ]


def low_resolution(video: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """(B, F, 3, H, W) in [-1, 1] through `shape` with 8 bits a value."""
    x = video.transpose(1, 2)  # (B, 3, F, H, W)
    small = F.interpolate(x, size=shape, mode="area")
    small = ((small + 1) * 127.5).round() / 127.5 - 1
    return F.interpolate(small, size=x.shape[2:], mode="trilinear").transpose(1, 2)


def best_baseline(video: torch.Tensor, bits: float) -> tuple[tuple[int, int, int], torch.Tensor]:
    """The shape with the best mean PSNR over all clips, and its reconstruction."""

    def reconstruct(shape: tuple[int, int, int]) -> torch.Tensor:
        return torch.cat([low_resolution(part, shape) for part in video.split(16)])

    shapes = baseline_shapes(int(bits // 8), video.shape[1], video.shape[-1])
    best = max(shapes, key=lambda shape: psnr(video, reconstruct(shape)).mean().item())
    return best, reconstruct(best)


def measure(args: Arguments) -> dict[str, Any]:
    model = EvatokModel.from_pretrained(args.model, dtype=torch.float32).eval()
    config, candidates = model.config, model.config.block_lengths
    clips = args.read(config)
    video = clips.floats
    metric = load_perceptual(METRIC)
    systems = {"model": 0} | ({"refined": args.refinement_steps} if args.refinement_steps else {})
    rows = []
    for length in args.lengths or [candidates[0], candidates[len(candidates) // 2], candidates[-1]]:
        bits = config.num_blocks * length * math.log2(config.codebook_size)
        shape, low = best_baseline(video, bits)
        row = {"length": length, "tokens": config.num_blocks * length, "bits": round(bits), "baseline_shape": shape}
        row["encode_seconds"], values = {}, {}  # a clip's, on average
        for name, steps in systems.items():
            tokens, started = [], time.perf_counter()
            for part in tqdm(video.split(1), desc=f"{length} tokens a block, {name}", file=sys.stderr):
                tokens.append(model.encode(part, length, steps))
            row["encode_seconds"][name] = (time.perf_counter() - started) / len(video)
            values[name] = compare(video, torch.cat([model.decode(clip) for clip in tokens]), metric)
        rows.append(summarise(row, values | {"baseline": compare(video, low, metric)}, clips.sources))
    return {
        "fingerprint": model.fingerprint(),
        "codebook_size": config.codebook_size,
        "refinement_steps": args.refinement_steps,
        **clips.facts(),
        "lengths": rows,
    }


def summarise(row: dict, values: dict[str, dict[str, torch.Tensor]], sources: list[str]) -> dict:
    """Means over all clips and over the clips of each video, and how often the model is ahead."""
    summary = row | {name: means(by_clip) for name, by_clip in values.items()}
    for name in list(values)[:-1]:
        prefix = "" if name == "model" else f"{name}_"
        margin = values[name]["psnr"] - values["baseline"]["psnr"]
        summary[f"{prefix}clips_ahead"] = ahead(values[name], values["baseline"])
        summary[f"{prefix}psnr_margin"] = {"mean": margin.mean().item(), "min": margin.min().item()}
    summary["by_video"] = {}
    for source in dict.fromkeys(sources):
        mine = torch.tensor([other == source for other in sources])
        of_video = {name: means({key: v[mine] for key, v in by_clip.items()}) for name, by_clip in values.items()}
        summary["by_video"][source] = {"clips": int(mine.sum()), **of_video}
    return summary


def show(report: dict[str, Any]) -> str:
    metrics = [name for name in report["lengths"][0]["model"] if name != "psnr"]
    systems = {"model": ("encoder's", "")}
    if report["refinement_steps"]:
        systems["refined"] = (f"refined, {report['refinement_steps']} steps", "refined_")
    columns = ["ids", "tokens", "bits", "s a clip", "baseline", "PSNR", "of baseline", "margin", "least margin"]
    columns += [column for metric in metrics for column in (metric, "of baseline", "clips ahead")]
    table = []
    for row, (name, (title, prefix)) in product(report["lengths"], systems.items()):
        margin, mine, baseline = row[f"{prefix}psnr_margin"], row[name], row["baseline"]
        cells = [title, row["tokens"], row["bits"], f"{row['encode_seconds'][name]:.2f}"]
        cells += ["x".join(map(str, row["baseline_shape"])), f"{mine['psnr']:.2f}", f"{baseline['psnr']:.2f}"]
        cells += [f"{margin['mean']:+.2f}", f"{margin['min']:+.2f}"]
        for metric in metrics:
            cells += [f"{mine[metric]:.4f}", f"{baseline[metric]:.4f}"]
            cells.append(f"{row[f'{prefix}clips_ahead'][metric]}/{report['clips']}")
        table.append(cells)
    middle, best = report["lengths"][len(report["lengths"]) // 2], list(systems)[-1]
    by_video = [
        [source, row["clips"], f"{row[best]['psnr']:.2f}", f"{row['baseline']['psnr']:.2f}"]
        for source, row in middle["by_video"].items()
    ]
    parts = [
        f"{report['videos']} videos, {report['clips']} clips of {report['resolution']}",
        markdown(columns, table),
        f"{middle['tokens']} tokens a clip, ids {systems[best][0]}:",
        markdown(["video", "clips", "PSNR", "of baseline"], by_video),
    ]
    return "\n\n".join(parts)


main = Benchmark(Arguments, measure, show)

if __name__ == "__main__":
    main.run()
