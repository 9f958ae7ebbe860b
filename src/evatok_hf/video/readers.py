"""The two ways to a video's pictures: PyAV, which reads everything, and decord, which is faster at what it knows.

decord is unmaintained: it knows neither AV1 nor GIF, takes packets for pictures, makes up those that are missing, loses
what has negative times, turns mirrors into rotations, and its jumps silently give a neighbour of the frame that was
asked for. So it is asked straight ahead only, and only for files of which the index says that none of this comes up.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import itertools
import os
from collections.abc import Hashable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from .container import Stopped, av_errors, one_line, pictures
from .index import Begun, VideoIndex, decode_all, read_packets, remembered, stopped
from .source import BOXES, EBML, SourceFile, VideoReadError

# Above so many bytes of decoded frames the reader is PyAV.
_DECORD_BYTES = 256 << 20


class PyAVReader:
    """A file's index and pictures by PyAV.

    Args:
        file: the file.
        key: what its index is remembered by, None for not at all.
        alone: whether its pictures are all that will be read of the file.

    Raises:
        VideoReadError: if it holds no video, or no picture of it can be decoded.
    """

    name = "pyav"

    def __init__(self, file: SourceFile, key: Hashable = None, alone: bool = False) -> None:
        self._file, self._key = file, key
        index, self._first = remembered.get(key), None
        self._begun: Begun | None = None
        if index is None:
            index, self._first, self._begun = read_packets(file, go_on=alone)
            self._remember(index)
        self.glance: VideoIndex = index  # what packets tell; its count may be wrong
        self.fps, self.height, self.width = index.fps, index.height, index.width

    def _remember(self, index: VideoIndex) -> None:
        if self._key is not None:
            remembered.put(self._key, index)

    def index(self) -> VideoIndex:
        """The index with a certain count; where packets leave it open, all pictures are decoded for it, once."""
        if not self.glance.exact:
            self.glance = decode_all(self._file, self.glance)
            self._remember(self.glance)
        return self.glance

    def num_frames(self) -> int:
        return self.index().count

    def times(self) -> np.ndarray | None:
        """Seconds of each frame from the first one on, None if they are evenly spaced at `fps`."""
        return self.index().times

    def _begin(self) -> Begun:
        """The pictures from the first on: at first what the index was made of, which goes on from where it is."""
        begun, self._begun = self._begun, None
        return begun or Begun.anew(self._file, self.glance.stream)

    def stopped(self, count: int, cause: str) -> VideoReadError:
        return stopped(self._file, self.glance.announced, count, cause)

    def frames(self) -> Iterator[Any]:
        count = 0
        container, _, frames = self._begin()
        with container:
            try:
                for frame in frames:
                    yield frame
                    count += 1
            except Stopped as error:
                raise self.stopped(count, str(error)) from error
        if self._file.cut and count < self.glance.announced:
            raise self.stopped(count, "the file ends early")

    def first_image(self) -> np.ndarray:
        """The first picture, uint8 (H, W, 3)."""
        if self._first is None:
            with contextlib.closing(self.frames()) as frames:
                self._first = next(frames)
        return self.image(self._first)

    def image(self, frame: Any) -> np.ndarray:
        """uint8 (H, W, 3), turned as the file's metadata ask for."""
        # without threads=1 each frame starts a pool of threads, which takes ten times as long as its conversion
        image = self.glance.turn.apply(frame.to_ndarray(format="rgb24", threads=1))
        if image.shape[:2] != (self.height, self.width):
            raise VideoReadError(
                f"{self._file.name}: the pictures change from {self.height}x{self.width} to "
                f"{image.shape[0]}x{image.shape[1]} on the way: convert the video to one size"
            )
        return image

    def read(self, indices: list[int]) -> np.ndarray:
        keys = self.index().keys.tolist()
        try:
            return self._pick(indices, keys)
        except _SeekFailed:  # count from the beginning: slow, and right in every file
            return self._pick(indices, [])

    def _pick(self, indices: list[int], keys: list[int]) -> np.ndarray:
        """Decode up to each frame in turn, jumping where a key frame lies between."""
        images: dict[int, np.ndarray] = {}
        index = self.index()
        container, stream, frames = self._begin()
        with container:
            number, jumped = 0, False  # `number`: of the frame that comes next
            for target in sorted(set(indices)):
                at = bisect.bisect_right(keys, target) - 1
                if at >= 0 and keys[at] > number:
                    number, frames, jumped = *self._seek(container, stream, keys[at]), True
                try:
                    while number <= target:
                        frame = next(frames)
                        if jumped and index.number_of(frame.pts) != number:
                            raise _SeekFailed  # frames were lost on the way
                        number += 1
                except (Stopped, StopIteration) as error:
                    if jumped:
                        raise _SeekFailed from error
                    raise self.stopped(number, str(error) or "its pictures end early") from error
                images[target] = self.image(frame)
        return np.stack([images[i] for i in indices])

    def _seek(self, container: Any, stream: Any, key: int) -> tuple[int, Iterator[Any]]:
        """Jump to key frame `key`, or one before it -> (the number of the first frame, frames from there on)."""
        index = self.index()
        try:
            container.seek(int(index.stamps[key]), stream=stream, backward=True)
            frames = pictures(container.demux(stream))
            first = next(frames, None)
        except (*av_errors(), Stopped) as error:
            raise _SeekFailed from error
        number = index.number_of(first.pts) if first is not None else None
        if number is None or number > key:
            raise _SeekFailed
        return number, itertools.chain([first], frames)


class _SeekFailed(Exception):
    """A container cannot jump, or landed behind where it should."""


class DecordCannot(Exception):
    """The reason why decord does not read a file."""


def decord_knows(file: SourceFile) -> bool:
    """Tells whether the container is one of decord's, and all of it is there."""
    known = file.head.startswith((b"RIFF", EBML, b"OggS", b"FLV\1")) or file.head[4:8] in BOXES
    return known and not file.cut  # it gives such files up, or conceals where they end


class DecordReader:
    """A file's pictures by decord, straight ahead.

    Args:
        file: the file.
        other: the same by PyAV, whose index decord must agree with.
        patient: whether pictures may be decoded for the index, where packets do not tell.

    Raises:
        DecordCannot: if it is not to be asked, cannot read the file, or reads something else.
    """

    name = "decord"

    def __init__(self, file: SourceFile, other: PyAVReader, patient: bool = False) -> None:
        self._file = file
        if not decord_knows(file):
            raise DecordCannot("the file is cut short" if file.cut else "not one of its formats")
        index = other.index() if patient else other.glance
        if not index.plain:
            raise DecordCannot("not every packet of it shows one picture, of one size, from time 0 on")
        self._decord, self._errors = _import_decord()
        self._count, self._times = index.count, index.times
        self.fps, self.height, self.width = index.fps, index.height, index.width
        try:
            video = self._video()
            if len(video) != index.count:
                raise DecordCannot(f"it counts {len(video)} frames where there are {index.count}")
            first = video.next().asnumpy()  # (H, W, 3)
        except (*self._errors, StopIteration) as error:
            raise DecordCannot(one_line(error)) from error
        truth = other.first_image()
        if first.shape != truth.shape:
            raise DecordCannot(f"it makes frames of {first.shape[:2]} where they are {truth.shape[:2]}")
        if not np.array_equal(first, truth):
            raise DecordCannot("it shows another first picture")

    def _video(self) -> Any:
        return self._decord.VideoReader(self._file.path(), ctx=self._decord.cpu(0), num_threads=1)

    def num_frames(self) -> int:
        return self._count

    def times(self) -> np.ndarray | None:
        return self._times

    def frames(self) -> Iterator[np.ndarray]:
        count = 0
        try:
            video = self._video()  # a new one each time: it keeps one place only, and does not come back reliably
            while count < self._count:
                # One at a time: in batches, large pieces of memory of many sizes leave holes.
                yield video.next().asnumpy()
                count += 1
        except StopIteration as error:
            raise self.stopped(count, "no more frames") from error
        except self._errors as error:
            raise self.stopped(count, one_line(error)) from error

    def image(self, frame: np.ndarray) -> np.ndarray:
        return frame

    def stopped(self, count: int, cause: str) -> VideoReadError:
        return VideoReadError(
            f"{self._file.name}: decord stopped after {count} of {self._count} frames ({cause}): try reader='pyav'"
        )


def check_memory(index: VideoIndex) -> None:
    """A decord that is read slowly decodes ahead without bound, at worst the whole video. Raises `DecordCannot`."""
    size = index.count * index.height * index.width * 3
    if size > _DECORD_BYTES:
        raise DecordCannot(f"it may hold all frames at once, {size >> 20} MiB")


def _import_decord() -> tuple[ModuleType, tuple[type[Exception], ...]]:
    """decord, told to be quiet, and what it raises."""
    # decord puts the old libraries it brings, libvpx for one, before everybody's: unless PyAV has bound its own by
    # then, it calls those, and VP9 encoding fails
    with contextlib.suppress(ImportError):
        importlib.import_module("av")
    try:
        decord = importlib.import_module("decord")
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its shared library does not load
        raise DecordCannot(f"not installed ({one_line(error)})") from error
    decord.logging.set_level(decord.logging.QUIET)  # it writes FFmpeg's complaints to stderr
    os.environ.setdefault("DECORD_DUPLICATE_WARNING_THRESHOLD", "1.0")  # and its own
    return decord, (decord.base.DECORDError, RuntimeError, ValueError, IndexError)
