"""Clips of a labelled video folder, `{train,test}/<class>/*.mp4`: the same ones every time, so many of each class."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from evatok_hf.data import clip_sources
from evatok_hf.data.clip_cutting import ClipConfig, ClipCutter, Unusable
from evatok_hf.data.clip_sources import Example
from evatok_hf.data.streaming import collate


@dataclass
class LabelledClips:
    """Clips with their classes."""

    video: torch.Tensor  # (N, F, 3, S, S) uint8
    labels: torch.Tensor  # (N,) int64, places in `classes`
    classes: list[str]
    fps: float  # frames a second, of the first clip

    def __len__(self) -> int:
        return len(self.labels)

    def key(self) -> str:
        """A key that tells these clips from others, 16 hex digits of their pixels' hash."""
        shape = str(tuple(self.video.shape)).encode()
        return hashlib.sha256(shape + self.video.contiguous().numpy().tobytes()).hexdigest()[:16]

    def take(self, index: torch.Tensor) -> LabelledClips:
        """Some of the clips, by their places (n,)."""
        return replace(self, video=self.video[index], labels=self.labels[index])

    def mirrored(self, share: float, seed: int) -> LabelledClips:
        """The same clips, about that share of them mirrored left to right."""
        chances = torch.rand(len(self), generator=torch.Generator().manual_seed(seed))
        video = torch.where((chances < share).view(-1, 1, 1, 1, 1), self.video.flip(-1), self.video)
        return replace(self, video=video)


def list_videos(data: str, split: str, per_class: int | None = None) -> tuple[list[list[Example]], list[str]]:
    """The videos of each class, spread evenly over the class's where only some are wanted, and the classes' names."""
    videos, classes = clip_sources.list_videos(data, split)
    found = [[video for video in videos if video.label == label] for label in range(len(classes))]
    if not classes or sum(map(len, found)) < len(videos):
        raise ValueError(f"{data} must hold videos as {split}/CLASS/VIDEO, and no others.")
    if per_class is not None:
        counts = [min(per_class, len(row)) for row in found]
        found = [[row[i * len(row) // n] for i in range(n)] for row, n in zip(found, counts, strict=True)]
    return found, classes


def data_key(videos: Sequence[Sequence[Example]]) -> str:
    """A key that tells one list of videos from another without reading them: their names and sizes, 16 hex digits."""
    lines = [f"{one.key} {one.label} {os.path.getsize(one.video)}\n" for row in videos for one in row]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def read_clips(
    videos: Sequence[Sequence[Example]], classes: list[str], num_frames: int, image_size: int, stride: int, name: str
) -> LabelledClips:
    """The middle clip of each video: frames `stride` apart, the centre square brought to size, not mirrored. Videos
    that cannot be read or are too short are left out; `name` is that of the progress bar."""
    config = ClipConfig(num_frames=num_frames, image_size=image_size, strides=(stride,))
    items = []
    for example in tqdm([one for row in videos for one in row], desc=name, unit="clip", file=sys.stderr):
        try:
            with ClipCutter(example, config, training=False) as cutter:
                item = cutter.cut(0, [0])
        except Unusable as error:
            tqdm.write(f"left out {example.key}: {error}", file=sys.stderr)
            continue
        if item["frames"][1] - item["frames"][0] != stride:
            raise ValueError(f"{Path(example.video).name} is too short for clips of stride {stride}; lower --stride.")
        items.append(item)
    if not items:
        raise ValueError(f"there is no readable video for {name}.")
    batch = collate(items)
    fps = items[0]["fps"] / stride
    return LabelledClips(batch["pixel_values_videos"], batch["label"], classes, fps)
