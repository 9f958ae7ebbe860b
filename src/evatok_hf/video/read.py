"""Read and write video files in constant memory: numpy in, numpy out, no torch.

What a file holds is found out once, with PyAV (FFmpeg), and is the same for every way to read: `video.index`. Pictures
come through decord where it is known to give the same ones faster, and else through PyAV: `video.readers`. Both are
imported only when a file is opened, and decord may be missing. Writing is PyAV's.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np

from .bounds import check_held, fits
from .index import check_times, count_in_time, key_of, nearest_frame_indices, nearest_in_time, read_packets
from .readers import DecordCannot, DecordReader, PyAVReader, check_memory, decord_knows
from .source import Source, SourceFile, VideoReadError
from .write import VideoWriteError, VideoWriter, write_video

__all__ = [
    "VideoHeader",
    "VideoReadError",
    "VideoReader",
    "VideoWriteError",
    "VideoWriter",
    "nearest_frame_indices",
    "open_video",
    "probe_video",
    "read_video",
    "write_video",
]

logger = logging.getLogger(__name__)


def open_video(source: Source, reader: str = "auto") -> VideoReader:
    """Opens a video, goes through its packets and decodes its first frame.

    Args:
        source: a path, a URL that fsspec knows, the bytes of a file, or a binary file object (read from where it stands
            to its end; it need not be seekable and stays open).
        reader: "auto" takes decord where it agrees with the index of the file, else PyAV, with a line in the log that
            says why; "decord" and "pyav" take that one only. The frames are the same.

    Raises:
        VideoReadError: if there is no such file, or nothing in it that can be decoded.
        ValueError: if `reader` is unknown.
    """
    return VideoReader(source, reader)


def read_video(source: Source, reader: str = "auto") -> tuple[np.ndarray, float]:
    """Reads a short video whole: uint8 (F, H, W, 3) and its frames a second. Raises `VideoReadError`."""
    with open_video(source, reader) as video:
        return np.concatenate(list(video.iter_chunks(64))), video.fps


class VideoHeader(NamedTuple):
    """The header of a video file: mean frames a second, frames, and size in pixels before any rotation."""

    fps: float
    num_frames: int
    height: int
    width: int


def probe_video(source: Source) -> VideoHeader:
    """Reads the header of a video file. No frame is decoded, so that a damaged file may have fewer frames than it says.

    Raises:
        VideoReadError: no such file, or one without a video.
    """
    file = SourceFile(source)
    try:
        index, *_ = read_packets(file, decode=False)
        return VideoHeader(index.fps, index.count, index.height, index.width)
    finally:
        file.close()


class VideoReader(AbstractContextManager):
    """An open video, made by `open_video`; a context manager.

    Attributes:
        fps: frames a second, the mean where the rate varies.
        num_frames: pictures that can be decoded, whatever the file announces. Where packets do not tell (some were
            lost, or times are missing), all are decoded for it when it is first asked for.
        height, width: size in pixels as shown: quarter turns and mirrors in the file's metadata are applied by both
            readers; sample aspect ratios are not.
        backend: "decord" or "pyav".
    """

    def __init__(self, source: Source, reader: str = "auto") -> None:
        if reader not in ("auto", "decord", "pyav"):
            raise ValueError(f"reader is {reader!r}: give 'auto', 'decord' or 'pyav'")
        self._file = SourceFile(source)
        try:
            alone = reader == "pyav" or not decord_knows(self._file)
            truth = PyAVReader(self._file, key_of(source), alone)
            self._backend = self._choose(reader, truth)
            self._jumper = truth if reader != "decord" else None  # for frames out of order
        except BaseException:
            self._file.close()
            raise
        self.backend: str = self._backend.name
        self.fps: float = self._backend.fps
        self.height: int = self._backend.height
        self.width: int = self._backend.width

    def _choose(self, reader: str, truth: PyAVReader) -> DecordReader | PyAVReader:
        reason = "asked for"
        if reader != "pyav":
            try:
                if reader == "auto":
                    check_memory(truth.glance)
                backend = DecordReader(self._file, truth, patient=reader == "decord")
                logger.info("%s: read by decord", self._file.name)
                return backend
            except DecordCannot as error:
                if reader == "decord":
                    raise VideoReadError(
                        f"{self._file.name}: decord cannot read it ({error}): use reader='auto'"
                    ) from error
                reason = f"decord cannot: {error}"
        logger.info("%s: read by PyAV (%s)", self._file.name, reason)
        return truth

    @property
    def num_frames(self) -> int:
        return self._open().num_frames()

    def times(self) -> np.ndarray | None:
        """Times of the frames, (num_frames,) in seconds from the first one on; None if they are evenly spaced."""
        return self._open().times()

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The frames with these numbers (any order, repeats allowed) -> uint8 (F, H, W, 3).

        Raises:
            VideoReadError: if a number is outside 0 .. num_frames - 1, or a frame cannot be decoded.
        """
        wanted, count = [int(i) for i in indices], self.num_frames
        if not wanted:
            return np.empty((0, self.height, self.width, 3), dtype=np.uint8)
        if min(wanted) < 0 or max(wanted) >= count:
            raise VideoReadError(
                f"{self._file.name}: frames {min(wanted)} to {max(wanted)} were asked for and the video has "
                f"0 to {count - 1}: ask for fewer"
            )
        check_held(self._file.name, len(wanted), self.height, self.width)
        if self._jumper is not None:
            return self._jumper.read(wanted)
        images: dict[int, np.ndarray] = {}  # straight ahead up to the last one
        needed = sorted(set(wanted))
        for i, image in zip(needed, self._walk(iter(needed)), strict=False):
            images[i] = image
        if len(images) < len(needed):
            raise self._open().stopped(needed[len(images)], "its pictures end early")
        return np.stack([images[i] for i in wanted])

    def iter_chunks(self, frames_per_chunk: int, fps: float | None = None, stride: int = 1) -> Iterator[np.ndarray]:
        """Runs through the whole video, holding one chunk: uint8 (n, H, W, 3), n = `frames_per_chunk` but for the last.

        `fps` first resamples to another rate, then every `stride`-th frame is given; which ones, `sampled` says.

        Raises:
            VideoReadError: where decoding fails, after the frames before it were given. MPEG streams and GIFs do not
                announce their length, so that a truncated one is a shorter video.
            ValueError: if an argument is not positive.
        """
        _check_positive("frames_per_chunk", frames_per_chunk)
        size = int(frames_per_chunk)
        if not fits(size, self.height, self.width):  # else nobody needs to know how many there are
            check_held(self._file.name, min(size, self.num_frames), self.height, self.width)
        return _in_chunks(self._walk(self.sampled(fps, stride)), size)

    def sampled(self, fps: float | None = None, stride: int = 1) -> Iterator[int]:
        """The numbers of the frames that `iter_chunks` gives: output k of a rate shows the frame that is nearest in
        time to k / fps, the later of two, and so frames are dropped or repeated, never blended.

        Where frames are evenly spaced, the numbers go on without end; see `count_sampled`.

        Raises:
            VideoReadError: if the times of the frames are needed and jump by hours.
            ValueError: if an argument is not positive.
        """
        times = self._times(fps, stride)
        if fps is None:
            numbers = itertools.count()
        else:
            numbers = nearest_frame_indices(self.fps, fps) if times is None else nearest_in_time(times, fps)
        return itertools.islice(numbers, 0, None, int(stride))

    def count_sampled(self, fps: float | None = None, stride: int = 1) -> int:
        """Counts the frames that `iter_chunks` gives. Raises as `sampled`."""
        times = self._times(fps, stride)
        if fps is None:
            frames = self.num_frames
        elif times is None:
            frames = math.ceil((self.num_frames - 0.5) * fps / self.fps)
        else:
            frames = count_in_time(times, fps)
        return math.ceil(frames / stride)

    def _times(self, fps: float | None, stride: int) -> np.ndarray | None:
        """The times of the frames, in seconds from the first one on; None where evenly spaced, or no rate is given."""
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps is {fps}: give a positive number")
        _check_positive("stride", stride)
        times = None if fps is None else self.times()
        check_times(times, self._file.name)
        return times

    def _walk(self, wanted: Iterator[int]) -> Iterator[np.ndarray]:
        """The frames with these ascending numbers (repeats allowed), until `wanted` or the video ends."""
        backend, target = self._open(), next(wanted, None)
        for count, frame in enumerate(backend.frames()):
            while target == count:
                yield backend.image(frame)
                target = next(wanted, None)
            if target is None:
                return

    def close(self) -> None:
        """Lets go of the decoder and of temporary files; closing twice is fine."""
        self._backend = self._jumper = None
        self._file.close()

    def _open(self) -> DecordReader | PyAVReader:
        if self._backend is None:
            raise VideoReadError(f"{self._file.name}: the video was closed: open it again with open_video")
        return self._backend

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0 and value == int(value)):
        raise ValueError(f"{name} is {value}: give a positive whole number")


def _in_chunks(images: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Stacks images `size` at a time; where they stop with an error, what came before it is given first."""
    chunk: list[np.ndarray] = []
    try:
        for image in images:
            chunk.append(image)
            if len(chunk) == size:
                yield np.stack(chunk)  # (n, H, W, 3)
                chunk = []
    except VideoReadError:
        if chunk:
            yield np.stack(chunk)
        raise
    if chunk:
        yield np.stack(chunk)
