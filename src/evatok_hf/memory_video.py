"""Frames in memory that read like a video file."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np

from .video_io import VideoReader


class MemoryVideo(VideoReader):
    """A `VideoReader` over frames that are there already.

    Args:
        frames: (F, H, W, 3), uint8 or floats in [0, 1], at least one frame.
        fps: their rate.
    """

    def __init__(self, frames: np.ndarray, fps: float):  # not the base class's, which opens a file
        self._backend, self._jumper = _Frames(frames), None
        self._file = SimpleNamespace(name="<frames in memory>", close=lambda: None)
        self.backend = "memory"
        self.fps = fps
        self.height, self.width = frames.shape[1:3]


class _Frames:
    """What `VideoReader` asks of a decoder."""

    def __init__(self, frames: np.ndarray):
        self._frames = frames

    def num_frames(self) -> int:
        return len(self._frames)

    def frames(self) -> Iterator[np.ndarray]:
        return iter(self._frames)

    def image(self, frame: np.ndarray) -> np.ndarray:
        return frame
