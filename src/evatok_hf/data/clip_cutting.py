"""Clips out of videos: which frames, which crop; and videos that give none."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import torch

from ..video.read import VideoReadError, open_video
from ..video.source_files import Example
from .decoded import DecodedVideo

SKIP_CAUSES = ("unreadable", "too short")


@dataclass(frozen=True)
class ClipConfig:
    """Settings of cutting clips out of videos.

    Args:
        num_frames: frames of a clip.
        image_size: side of the square clip in pixels.
        strides: steps from one frame of a clip to the next, in frames of the video; one is drawn for each clip, and
            lowered where the video is too short for it.
        scale: (lo, hi): side of the square crop as a fraction of the video's short side, drawn log-uniformly, but at
            least `image_size` where the video has that many pixels. (1, 1) is a plain resize of the short side.
        random_position: crop anywhere rather than at the centre.
        flip_probability: how often a clip is mirrored left to right.
        random_start: start anywhere rather than evenly spaced over the video.
        freeze_probability: how often a clip stands still from a random frame of it on, as paused and watched scenes do.
        clips_per_video: clips cut out of a video, one after another, each time it comes up.
        min_frames: skip shorter videos; by default those shorter than `num_frames`.

    Raises:
        ValueError: if a value is out of range.
    """

    num_frames: int = 16
    image_size: int = 64
    strides: tuple[int, ...] = (1,)
    scale: tuple[float, float] = (1.0, 1.0)
    random_position: bool = True
    flip_probability: float = 0.5
    random_start: bool = True
    freeze_probability: float = 0.0
    clips_per_video: int = 1
    min_frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "image_size", "clips_per_video"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides must hold at least one step of 1 or more, not {self.strides!r}.")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be (lo, hi) with 0 < lo <= hi <= 1, not {self.scale!r}.")
        for name in ("flip_probability", "freeze_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}.")
        if self.min_frames is not None and self.min_frames < self.num_frames:
            raise ValueError(f"min_frames ({self.min_frames}) must be at least num_frames ({self.num_frames}) or None.")


class Unusable(Exception):
    """A video that gives no clip; `cause` is one of `SKIP_CAUSES`."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause

    def describe(self, example: Example, clips: int) -> dict[str, Any]:
        """The video and why it was skipped, after so many of its clips, as shards note it."""
        return {"source": example.key, "cause": self.cause, "reason": " ".join(str(self).split()), "clips": clips}


def spaced(count: int, clips: int, span: int) -> list[int]:
    """Starts of up to `clips` windows of `span` frames, evenly spaced without overlap; one alone lies in the middle."""
    clips = min(clips, count // span)
    if clips == 1:
        return [(count - span) // 2]
    return [index * (count - span) // (clips - 1) for index in range(clips)]


@dataclass(frozen=True)
class Crop:
    """A square of the frames: its upper left corner and side in pixels, and whether it is mirrored left to right."""

    top: int
    left: int
    side: int
    flip: bool

    @classmethod
    def draw(cls, height: int, width: int, config: ClipConfig, rng: np.random.Generator | None) -> Crop:
        """As `config` says; the centre of the full short side without `rng`."""
        short = min(height, width)
        if rng is None:
            return cls((height - short) // 2, (width - short) // 2, short, False)
        # Always the same four draws, so that changing one setting leaves the other choices as they are.
        scale, down, right, mirror = rng.random(4)
        lo, hi = np.log(config.scale)
        side = min(short, max(round(short * float(np.exp(lo + (hi - lo) * scale))), config.image_size))
        if not config.random_position:
            down = right = 0.5
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        return cls(top, left, side, bool(mirror < config.flip_probability))

    def cut(self, frames: np.ndarray | torch.Tensor, size: int) -> torch.Tensor:
        """uint8 (F, H, W, 3) -> uint8 (F, 3, size, size), resized bilinearly with antialiasing, on the same device."""
        crop = frames[:, self.top : self.top + self.side, self.left : self.left + self.side]
        if isinstance(crop, torch.Tensor):
            clip = crop.flip(2) if self.flip else crop
        else:
            clip = torch.from_numpy(np.array(crop[:, :, ::-1] if self.flip else crop))
        clip = clip.permute(0, 3, 1, 2)
        if self.side != size:
            if clip.device.type != "cpu":  # where only floating point is resized
                clip = clip.float()
            clip = torch.nn.functional.interpolate(clip, (size, size), mode="bilinear", antialias=True)
            clip = clip.round().to(torch.uint8) if clip.is_floating_point() else clip
        return clip.contiguous()  # (F, 3, size, size)


def to_float(pixel_values_videos: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1], same shape and device; floats as they are."""
    return pixel_values_videos if pixel_values_videos.is_floating_point() else pixel_values_videos.float() / 127.5 - 1.0


@contextmanager
def reading() -> Iterator[None]:
    """A video that cannot be read is `Unusable`."""
    try:
        yield
    except (VideoReadError, FileNotFoundError) as error:
        raise Unusable("unreadable", str(error)) from error


def fetch(example: Example) -> str | bytes | DecodedVideo:
    """The bytes of a video at an address; a path, bytes or a decoded video as they are. Raises Unusable."""
    if example.problem:
        raise Unusable("unreadable", example.problem)
    video = example.video
    if isinstance(video, str) and "://" in video:
        with fsspec.open(video, "rb") as file:
            return file.read()
    return video


class ClipCutter(AbstractContextManager):
    """An open video, of which `count` clips are to be cut; a context manager.

    In `training` the choices that `config` leaves open are drawn at random; else clips are the same every time. Raises
    `Unusable` for a video that cannot be read or is too short.
    """

    def __init__(self, example: Example, config: ClipConfig, training: bool) -> None:
        self.example, self.config, self.training = example, config, training
        with reading():
            # With reader "auto", frames out of order are PyAV's, too, but decord would decode the first one before.
            video = fetch(example)
            self._video = video if isinstance(video, DecodedVideo) else open_video(video, reader="pyav")
            length = self._video.num_frames
        shortest = config.min_frames or config.num_frames
        if length < shortest:
            self._video.close()
            raise Unusable("too short", f"{length} frames, {shortest} are needed")
        self._length = length
        self._longest_stride = (length - 1) // max(1, config.num_frames - 1)
        self._stride = min(config.strides[0], self._longest_stride)
        self._starts = spaced(length, config.clips_per_video, (config.num_frames - 1) * self._stride + 1)
        self.count = config.clips_per_video if training else len(self._starts)

    def cut(self, number: int, seed: list[int]) -> dict[str, Any]:
        """Clip `number` as an item of a `ClipStream`, without its position; in training, choices come from `seed`.
        Raises Unusable.
        """
        config, rng, stride = self.config, None, self._stride
        seed = [*seed, zlib.crc32(self.example.key.encode()), number]
        if self.training:
            rng = np.random.default_rng(seed)
            stride = min(int(rng.choice(config.strides)), self._longest_stride)
        slack = self._length - (config.num_frames - 1) * stride - 1
        if rng is None:
            start = self._starts[number]
        elif config.random_start:
            start = int(rng.integers(slack + 1))
        else:
            start = slack // 2 if self.count == 1 else number * slack // (self.count - 1)
        indices = [start + stride * step for step in range(config.num_frames)]
        if rng is not None and config.freeze_probability:
            # Drawn apart, so that a clip is otherwise the same with and without it.
            apart = np.random.default_rng([*seed, 1])
            drawn, last = apart.random(), int(apart.integers(config.num_frames))
            if drawn < config.freeze_probability:
                indices = indices[: last + 1] + [indices[last]] * (config.num_frames - last - 1)
        with reading():
            frames = self._video.read(indices)  # (F, H, W, 3)
        crop = Crop.draw(*frames.shape[1:3], config, rng)
        return {
            "pixel_values_videos": crop.cut(frames, config.image_size),
            "label": self.example.label,
            "source": self.example.key,
            "frames": indices,
            "crop": [crop.top, crop.left, crop.side, int(crop.flip)],
            "fps": float(self._video.fps),
        }

    def recut(self, indices: Sequence[int], crop: Crop) -> torch.Tensor:
        """A clip that was cut before: uint8 (F, 3, S, S) of these frames and this crop. Raises Unusable."""
        with reading():
            return crop.cut(self._video.read(list(indices)), self.config.image_size)

    def __exit__(self, *exc: object) -> None:
        self._video.close()
