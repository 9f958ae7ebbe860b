"""Every kind of video as a `VideoReader`: files, frames in memory, readers of other libraries, prepared clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..models.video_processing_evatok import frames_tensor
from ..video.read import VideoReader, open_video
from ..video.source import Source, VideoReadError

if TYPE_CHECKING:
    from .streams import VideoClip

# The last four: `{"path": .., "bytes": ..}` of datasets, frames of one video as an array, a tensor or a list.
Video = Source | VideoReader | Mapping[str, Any] | np.ndarray | torch.Tensor | Sequence[Any]


def open_any(source: Video, fps: float | None = None) -> VideoReader:
    """Opens whatever is a video.

    Args:
        source: a path, URL, bytes or binary file object; a row `{"path": .., "bytes": ..}` as `datasets` keeps videos;
            an array or tensor (F, H, W, 3) or (F, 3, H, W), uint8 or floats in [0, 1]; a list of PIL images or of such
            frames; a `VideoDecoder` of torchcodec or a `VideoReader` of decord, or frames that these gave.
        fps: the rate of frames in memory, which do not say it.

    Raises:
        VideoReadError: a file that cannot be opened, and what is no video.
        ValueError: frames of another shape or range.
    """
    if isinstance(source, Mapping):
        content = source.get("bytes")
        source = source.get("path") if content is None else content
        if source is None:
            raise VideoReadError("this row has neither bytes nor a path: give one that has a video")
    if hasattr(source, "get_frames_in_range"):
        return _OtherReader(source, source.metadata.average_fps)
    if hasattr(source, "get_avg_fps"):
        return _OtherReader(source, source.get_avg_fps())
    source = _unwrapped(source)
    if isinstance(source, list | tuple):
        source = [_unwrapped(frame) for frame in source]
    if isinstance(source, np.ndarray | torch.Tensor | list):
        return MemoryVideo(frames_tensor(source).cpu().permute(0, 2, 3, 1).numpy(), fps)
    return open_video(source)


def _unwrapped(frames: Any) -> Any:
    """The content of a Frame or FrameBatch of torchcodec, or of an array of decord; anything else as it is."""
    if hasattr(frames, "pts_seconds"):
        return frames.data
    return frames.asnumpy() if hasattr(frames, "asnumpy") else frames


class MemoryVideo(VideoReader):
    """A `VideoReader` over frames that are there already.

    Args:
        frames: (F, H, W, 3), uint8 or floats in [0, 1], at least one frame.
        fps: their rate, None where it is not known.
    """

    def __init__(self, frames: Sequence[Any], fps: float | None):  # not the base class's, which opens a file
        self._backend, self._jumper, self._frames = None, None, frames
        self._file = SimpleNamespace(name="<frames in memory>", close=lambda: None)
        self.backend = "memory"
        self.fps = fps
        self.height, self.width = self.image(frames[0]).shape[:2]

    @property
    def num_frames(self) -> int:
        return len(self._frames)

    def times(self) -> None:
        return None  # evenly spaced

    def frames(self) -> Iterator[Any]:
        return map(self._frames.__getitem__, range(len(self._frames)))

    def image(self, frame: Any) -> np.ndarray:
        return frame

    def _open(self) -> MemoryVideo:
        return self

    def _times(self, fps: float | None, stride: int) -> None:
        if fps is not None and self.fps is None:
            raise ValueError(f"frames in memory do not say their rate, to sample them to {fps:g} fps; give it as fps.")
        return super()._times(fps, stride)


class _OtherReader(MemoryVideo):
    """A decoder of torchcodec or decord, whose frames are taken as evenly spaced."""

    def frames(self) -> Iterator[Any]:
        for number in range(len(self._frames)):
            try:
                yield self._frames[number]
            except Exception as error:  # of a library that need not be installed
                lines = str(error).splitlines() or [type(error).__name__]
                raise VideoReadError(f"frame {number} of the video cannot be read ({lines[0]})") from error

    def image(self, frame: Any) -> np.ndarray:
        return frames_tensor(_unwrapped(frame)[None])[0].cpu().permute(1, 2, 0).numpy()


class PreparedVideo(VideoReader):
    """Clips that were read and preprocessed already, as `VideoTokenizer.prepare` gives them, in place of their video.

    Args:
        clips: all clips of the video, in order.
        fps: their rate, which cannot be changed any more, None where it is not known.
        height, width: size of the video that they were made of, pixels.
    """

    def __init__(self, clips: Sequence[VideoClip], fps: float | None, height: int, width: int):
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
