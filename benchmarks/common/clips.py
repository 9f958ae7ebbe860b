"""Clips that benchmarks measure: all of a source, or evenly spaced over its videos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import evatok_hf
from benchmarks.common.benchmark import Options
from evatok_hf import EvatokConfig, EvatokRouterConfig
from evatok_hf.data.streaming import ClipConfig, collate, evaluation_clips, to_float
from evatok_hf.metrics import psnr
from evatok_hf.metrics.perceptual import PerceptualDistance
from training.common.fields import option

SAMPLE = Path(evatok_hf.__file__).parent / "assets"  # a folder with one video
METRIC = "perceptual-effnet-lite0"  # the distance that needs no download


@dataclass
class Clips:
    """Clips uint8 (N, F, 3, S, S), the video that each is of, and frames a second of each."""

    video: torch.Tensor
    sources: list[str]
    fps: list[float]

    @property
    def floats(self) -> torch.Tensor:
        """In [-1, 1]."""
        return to_float(self.video)

    def facts(self) -> dict[str, Any]:
        """For a report."""
        frames, _, height, width = self.video.shape[1:]
        return {"resolution": [frames, height, width], "videos": len(set(self.sources)), "clips": len(self.sources)}


def read_clips(source: str | Path, config: EvatokConfig | EvatokRouterConfig, per_video: int = 0) -> Clips:
    """Clips as `evaluation_clips` gives them; 0 a video: all that there are. Raises ValueError for none."""
    clip = ClipConfig(num_frames=config.num_frames, image_size=config.image_size)
    items = list(evaluation_clips(source, clip, per_video or 10**6))
    if not items:
        raise ValueError(f"no clip of {clip.num_frames} frames is in {source}; name a folder of longer videos.")
    video = collate(items)["pixel_values_videos"]
    return Clips(video, [item["source"] for item in items], [item["fps"] for item in items])


@dataclass(kw_only=True)
class ClipOptions(Options):
    """Options of benchmarks of clips that trained nothing."""

    data: str = option("Folder of videos that trained nothing; of one with splits, val is read.")
    clips_per_video: int = option("Clips evenly spaced over each video; 0: all of them.", 0)

    def read(self, config: EvatokConfig) -> Clips:
        return read_clips(self.data, config, self.clips_per_video)


@torch.no_grad()
def compare(video: torch.Tensor, shown: torch.Tensor, metric: PerceptualDistance) -> dict[str, torch.Tensor]:
    """PSNR and distance of each clip; both uint8 or in [-1, 1], (N, F, 3, H, W)."""
    return {"psnr": psnr(video, shown), metric.name: metric.video(to_float(video), to_float(shown))}


@torch.no_grad()
def frame_distances(metric: PerceptualDistance, truth: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Of frames (N, 3, H, W) in [-1, 1] -> (N,)."""
    return torch.cat([metric(a, b) for a, b in zip(truth.split(64), made.split(64), strict=True)])


def ahead(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, int]:
    """Clips that are better than their counterparts, by each measure."""
    return {
        name: int(((values > theirs[name]) if name in ("psnr", "ssim") else (values < theirs[name])).sum())
        for name, values in ours.items()
    }


def means(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value.double().mean()) for name, value in values.items()}
