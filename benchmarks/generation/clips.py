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

from evatok_hf.data.clip_cutting import ClipConfig, ClipCutter, Unusable
from evatok_hf.data.clip_sources import Example, open_source


@dataclass
class LabelledClips:
    """Clips with their classes.

    Attributes:
        video: (N, F, 3, S, S) uint8.
        labels: (N,) int64, places in `classes`.
        classes: their names.
        sources: N paths within the split.
        fps: frames a second of the clips, the first one's.
    """

    video: torch.Tensor
    labels: torch.Tensor
    classes: list[str]
    sources: list[str]
    fps: float

    def __len__(self) -> int:
        return len(self.labels)

    def key(self) -> str:
        """What tells these clips from others, 16 hex digits of their pixels' hash."""
        shape = str(tuple(self.video.shape)).encode()
        return hashlib.sha256(shape + self.video.contiguous().numpy().tobytes()).hexdigest()[:16]

    def take(self, index: torch.Tensor) -> LabelledClips:
        """Some of the clips, by their places (n,)."""
        sources = [self.sources[i] for i in index.tolist()]
        return replace(self, video=self.video[index], labels=self.labels[index], sources=sources)

    def mirrored(self, share: float, seed: int) -> LabelledClips:
        """The same clips, about that share of them mirrored left to right."""
        chances = torch.rand(len(self), generator=torch.Generator().manual_seed(seed))
        video = torch.where((chances < share).view(-1, 1, 1, 1, 1), self.video.flip(-1), self.video)
        return replace(self, video=video)


def list_videos(data: str, split: str, per_class: int | None = None) -> tuple[list[list[Example]], list[str]]:
    """The videos of each class, spread evenly over the class's where only some are wanted, and the classes' names.

    Raises:
        ValueError: no such folder or split, archives instead of files, or no classes.
    """
    source = open_source(data, split)
    found: list[list[Example]] = [[] for _ in source.classes]
    for example in source.examples(None, 0, 0, 0, 1):
        if not isinstance(example.video, str) or example.label < 0:
            raise ValueError(f"{data} must hold videos as {split}/CLASS/VIDEO; {example.key} is not in such a place.")
        found[example.label].append(example)
    if not found:
        raise ValueError(f"{data} has no classes; the benchmark needs videos as {split}/CLASS/VIDEO.")
    if per_class is not None:
        counts = [min(per_class, len(row)) for row in found]
        found = [[row[i * len(row) // n] for i in range(n)] for row, n in zip(found, counts, strict=True)]
    return found, list(source.classes)


def data_key(videos: Sequence[Sequence[Example]]) -> str:
    """What tells one list of videos from another without reading them: their names and sizes, 16 hex digits."""
    digest = hashlib.sha256()
    for example in (example for row in videos for example in row):
        digest.update(f"{example.key} {example.label} {os.path.getsize(example.video)}\n".encode())
    return digest.hexdigest()[:16]


def read_clips(
    videos: Sequence[Sequence[Example]], classes: list[str], num_frames: int, image_size: int, stride: int, name: str
) -> LabelledClips:
    """The middle clip of each video: frames `stride` apart, the centre square brought to size, not mirrored.

    Args:
        videos: of each class, see `list_videos`; those that cannot be read or are too short are left out.
        classes: names of the classes.
        num_frames, image_size: of a clip.
        stride: frames from one frame of a clip to the next.
        name: of the progress bar.

    Raises:
        ValueError: no clip at all, or a video that is too short for the stride.
    """
    config = ClipConfig(num_frames=num_frames, image_size=image_size, strides=(stride,))
    clips, labels, sources, rates = [], [], [], []
    rows = [example for row in videos for example in row]
    for example in tqdm(rows, desc=name, unit="clip", file=sys.stderr):
        try:
            with ClipCutter(example, config, training=False) as cutter:
                item = cutter.cut(0, [0])
        except Unusable as error:
            tqdm.write(f"left out {example.key}: {error}", file=sys.stderr)
            continue
        if item["frames"][1] - item["frames"][0] != stride:
            raise ValueError(f"{Path(example.video).name} is too short for clips of stride {stride}; lower --stride.")
        clips.append(item["pixel_values_videos"])
        labels.append(example.label)
        sources.append(example.key)
        rates.append(item["fps"] / stride)
    if not clips:
        raise ValueError(f"there is no readable video for {name}.")
    return LabelledClips(torch.stack(clips), torch.tensor(labels), classes, sources, rates[0])
