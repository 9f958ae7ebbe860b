"""Frames and clips in memory that read like a video file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from ..video.read import VideoReader

if TYPE_CHECKING:
    from .streams import VideoClip


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

    def times(self) -> None:
        return None  # evenly spaced

    def frames(self) -> Iterator[np.ndarray]:
        return iter(self._frames)

    def image(self, frame: np.ndarray) -> np.ndarray:
        return frame


class PreparedVideo(VideoReader):
    """Clips that were read and preprocessed already, as `VideoTokenizer.prepare` gives them, in place of their video.

    Args:
        clips: all clips of the video, in order.
        fps: their rate, which cannot be changed any more.
        height, width: size of the video that they were made of, pixels.
    """

    def __init__(self, clips: Sequence[VideoClip], fps: float, height: int, width: int):
        self.clips = list(clips)
        self.fps, self.height, self.width = fps, height, width
        self._backend = self._jumper = None  # there are no frames of the original size
        self._file = SimpleNamespace(name="<clips in memory>", close=lambda: None)
        self.backend = "memory"

    @property
    def num_frames(self) -> int:
        return sum(clip.num_frames for clip in self.clips)

    def times(self) -> None:
        return None
