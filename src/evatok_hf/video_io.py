"""Read and write video files in constant memory: numpy in, numpy out, no torch.

Reading goes through decord where it can, and through PyAV (FFmpeg) where it cannot: decord is fast but unmaintained,
knows neither AV1 nor GIF, and is not built for every platform. Which one reads a file is found out by decoding its
first frame. decord is used straight ahead only: in several kinds of file (AVI; MPEG-4 and HEVC with B-frames) its
jumps silently give a neighbour of the frame that was asked for, so jumping is PyAV's. Both are imported only when a
file is opened, and either may be missing. Writing is PyAV's.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .video_source import BOXES, EBML, Source, SourceFile, VideoReadError
from .video_writer import VideoWriteError, VideoWriter, write_video

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

# FFmpeg also opens playlists and scripts that name other files and addresses; a video that a stranger uploads must not
# make it read those, so only containers that hold their own pictures are let in.
# Above so many bytes of decoded frames the reader is PyAV.
_DECORD_BYTES = 256 << 20
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,gif,flv,ogg,asf,h264,hevc,ivf,m4v,dv"


def open_video(source: Source, reader: str = "auto") -> VideoReader:
    """Open a video and decode its first frame.

    Args:
        source: a path, the bytes of a file, or a binary file object (read from where it stands to its end; it need not
            be seekable and stays open).
        reader: "auto" takes decord and falls back to PyAV, with a line in the log that says why; "decord" and "pyav"
            take that one only.

    Raises:
        VideoReadError: if there is no such file, or nothing in it that can be decoded.
        ValueError: if `reader` is unknown.
    """
    return VideoReader(source, reader)


def read_video(source: Source, reader: str = "auto") -> tuple[np.ndarray, float]:
    """Read a short video whole: uint8 (F, H, W, 3) and its frames a second. Raises `VideoReadError`."""
    with open_video(source, reader) as video:
        return np.concatenate(list(video.iter_chunks(64))), video.fps


class VideoHeader(NamedTuple):
    """What a file says of its video: frames a second, coded frames, and size in pixels before any rotation."""

    fps: float
    num_frames: int
    height: int
    width: int


def probe_video(source: Source) -> VideoHeader:
    """What a file says of itself; its packets are counted, no frame is decoded. Raises `VideoReadError`."""
    file = SourceFile(source)
    try:
        backend = _PyAV(file, first_frame=False)
        return VideoHeader(backend.fps, backend.num_frames(), backend.height, backend.width)
    finally:
        file.close()


def nearest_frame_indices(source_fps: float, target_fps: float) -> Iterator[int]:
    """Without end, the source frame that each output frame shows: output k shows the frame nearest to its own time,
    floor(k * source_fps / target_fps + 1/2). Frames are dropped or repeated, never blended."""
    ratio = source_fps / target_fps
    return (math.floor(k * ratio + 0.5) for k in itertools.count())


class VideoReader:
    """An open video, made by `open_video`; a context manager.

    Attributes:
        fps: frames a second, the average where the rate varies (frames then count as evenly spaced).
        num_frames: coded frames found by walking through the file without decoding; in a damaged file fewer may decode.
        height, width: size in pixels as shown: a rotation by quarter turns in the file's metadata is applied by both
            readers; sample aspect ratios are not.
        backend: "decord" or "pyav".
    """

    def __init__(self, source: Source, reader: str = "auto") -> None:
        if reader not in ("auto", "decord", "pyav"):
            raise ValueError(f"reader is {reader!r}: give 'auto', 'decord' or 'pyav'")
        self._file = SourceFile(source)
        try:
            self._backend, self._jumper = _choose(self._file, reader)
        except BaseException:
            self._file.close()
            raise
        self.backend: str = self._backend.name
        self.fps: float = self._backend.fps
        self.height: int = self._backend.height
        self.width: int = self._backend.width

    @property
    def num_frames(self) -> int:
        return self._open().num_frames()

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
        """Run through the whole video, holding one chunk: uint8 (n, H, W, 3), n = `frames_per_chunk` but for the last.

        `fps` first resamples to another rate by `nearest_frame_indices`, then every `stride`-th frame is given.

        Raises:
            VideoReadError: where decoding fails, after the frames before it were given. MPEG streams and GIFs do not
                announce their length, so that a truncated one is a shorter video.
            ValueError: if an argument is not positive.
        """
        for name, value in (("frames_per_chunk", frames_per_chunk), ("fps", fps), ("stride", stride)):
            whole = name != "fps"
            if value is not None and not (math.isfinite(value) and value > 0 and not (whole and value != int(value))):
                raise ValueError(f"{name} is {value}: give a positive {'whole number' if whole else 'number'}")
        wanted = itertools.count() if fps is None else nearest_frame_indices(self.fps, fps)
        images = self._walk(itertools.islice(wanted, 0, None, int(stride)))
        return _in_chunks(images, int(frames_per_chunk))

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
        """Let go of the decoder and of temporary files; closing twice is fine."""
        self._backend = self._jumper = None
        self._file.close()

    def _open(self) -> _Decord | _PyAV:
        if self._backend is None:
            raise VideoReadError(f"{self._file.name}: the video was closed: open it again with open_video")
        return self._backend

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _in_chunks(images: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Stack images `size` at a time; where they stop with an error, what came before it is given first."""
    chunk: list[np.ndarray] = []
    failure = None
    try:
        for image in images:
            chunk.append(image)
            if len(chunk) == size:
                yield np.stack(chunk)  # (n, H, W, 3)
                chunk = []
    except VideoReadError as error:
        failure = error
    if chunk:
        yield np.stack(chunk)
    if failure is not None:
        raise failure


def _choose(file: SourceFile, reader: str) -> tuple[_Decord | _PyAV | None, _PyAV | None]:
    """The first reader that decodes the first frame, and the one for frames out of order (None: walk up to them)."""
    reason = "asked for"
    if reader != "pyav":
        try:
            backend = _Decord(file)
            if reader == "auto":
                _check_memory(backend)
            jumper = _check_count(file, backend)
            logger.info("%s: read by decord", file.name)
            return backend, jumper if reader == "auto" else None
        except _DecordCannot as error:
            if reader == "decord":
                raise VideoReadError(f"{file.name}: decord cannot read it ({error}): use reader='auto'") from error
            reason = f"decord cannot: {error}"
    fallback = _PyAV(file)
    logger.info("%s: read by PyAV (%s)", file.name, reason)
    return fallback, fallback


def _check_memory(backend: _Decord) -> None:
    """A decord that is read slowly decodes ahead without bound, at worst the whole video."""
    size = backend.num_frames() * backend.height * backend.width * 3
    if size > _DECORD_BYTES:
        raise _DecordCannot(f"it may hold all frames at once, {size >> 20} MiB")


def _check_count(file: SourceFile, backend: _Decord) -> _PyAV | None:
    """Hold decord's count against PyAV's: for a trimmed mp4, whose edit list hides frames, decord makes up the number
    by repeating the last one. None where PyAV has nothing to say."""
    try:
        other = _PyAV(file)
    except VideoReadError as error:
        logger.info("%s: frames out of order are reached by reading up to them (%s)", file.name, error)
        return None
    if other.num_frames() != backend.num_frames():
        raise _DecordCannot(f"it counts {backend.num_frames()} frames where there are {other.num_frames()}")
    return other


def _import_decord() -> ModuleType:
    # decord puts the old libraries it brings, libvpx for one, before everybody's: unless PyAV has bound its own by
    # then, it calls those, and VP9 encoding fails
    with contextlib.suppress(ImportError):
        importlib.import_module("av")
    return importlib.import_module("decord")


class _DecordCannot(Exception):
    """Why decord does not read a file."""


class _Decord:
    name = "decord"

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        if file.cut:  # decord gives such files up, or conceals where they end
            raise _DecordCannot("the file is cut short")
        if not file.head.startswith((b"RIFF", EBML, b"GIF8", b"OggS", b"FLV\1")) and file.head[4:8] not in BOXES:
            raise _DecordCannot("not one of its formats")
        try:
            self._decord = _import_decord()
        except (ImportError, OSError, RuntimeError) as error:  # the last two: its shared library does not load
            raise _DecordCannot(f"not installed ({_one_line(error)})") from error
        self._decord.logging.set_level(self._decord.logging.QUIET)  # it writes FFmpeg's complaints to stderr
        self._errors = (self._decord.base.DECORDError, RuntimeError, ValueError, IndexError)
        try:
            video = self._video()
            self._count = len(video)
            if self._count == 0:
                raise _DecordCannot("no frames")
            first = video.get_batch([0]).asnumpy()  # (1, H, W, 3)
            self.fps = float(video.get_avg_fps())
        except self._errors as error:
            raise _DecordCannot(_one_line(error)) from error
        if first.ndim != 4 or first.shape[-1] != 3 or not (math.isfinite(self.fps) and self.fps > 0):
            raise _DecordCannot(f"frames of shape {first.shape[1:]} at {self.fps} fps")
        self.height, self.width = first.shape[1:3]

    def _video(self) -> Any:
        return self._decord.VideoReader(self._file.path(), ctx=self._decord.cpu(0), num_threads=1)

    def num_frames(self) -> int:
        return self._count

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
            raise self.stopped(count, _one_line(error)) from error

    def image(self, frame: np.ndarray) -> np.ndarray:
        return frame

    def stopped(self, count: int, cause: str) -> VideoReadError:
        return VideoReadError(
            f"{self._file.name}: decord stopped after {count} of {self._count} frames ({cause}): try reader='pyav'"
        )


class _Index(NamedTuple):
    count: int  # frames
    times: list[int]  # their presentation times in order; empty where the file does not give them all
    numbers: dict[int, int]  # time -> frame
    keys: list[int]  # frames where decoding can begin


class _PyAV:
    name = "pyav"

    def __init__(self, file: SourceFile, first_frame: bool = True) -> None:
        self._file = file
        self._index: _Index | None = None
        self._announced = 0
        try:
            self._av: ModuleType = importlib.import_module("av")
        except ImportError as error:
            raise VideoReadError(f"{file.name}: PyAV is needed to read it: pip install av") from error
        with self._container() as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            self.fps = float(rate) if rate else 25.0  # a single frame has none; 25 is FFmpeg's stand-in for pictures
            # how many frames the header speaks of
            self._announced = stream.frames or round((container.duration or 0) / 1e6 * self.fps)
            self.height, self.width = stream.codec_context.height, stream.codec_context.width
            if not first_frame:
                return
            try:
                first = next(self._decode(container), None)
            except _Stopped as error:
                raise self.stopped(0, str(error)) from error
            if first is None:
                raise VideoReadError(f"{file.name}: its video stream holds no frame: export the video again")
            turned = round(first.rotation / 90) % 2
            self.height, self.width = (first.width, first.height) if turned else (first.height, first.width)

    def _container(self) -> Any:
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        file = self._file
        try:
            container = self._av.open(file.for_pyav(), options=options, metadata_errors="replace")
        except (self._av.FFmpegError, OSError) as error:
            if file.head[4:8] == b"ftyp":
                mend = "its index (moov) is missing, as when a recording or download was cut: get the whole file"
            else:
                mend = "no mp4, avi, mkv, webm, mpg or gif video was recognised in it: check what the file is"
            raise VideoReadError(f"{file.name}: cannot be opened ({_one_line(error)}): {mend}") from error
        problem = None
        if not container.streams.video:
            problem = "has no video stream, only sound or data: give a file with pictures"
        elif container.streams.video[0].codec_context is None:
            problem = "its codec is unknown here: convert it, for example ffmpeg -i FILE -c:v libx264 out.mp4"
        if problem:
            container.close()
            raise VideoReadError(f"{file.name}: {problem}")
        container.streams.video[0].codec_context.thread_count = 1  # data loaders run one reader a process
        return container

    def _decode(self, container: Any) -> Iterator[Any]:
        """Frames from where the container stands; `_Stopped` where they end before the file's header says so."""
        try:
            yield from container.decode(video=0)
        except (self._av.FFmpegError, OSError) as error:
            raise _Stopped(_one_line(error)) from error

    def stopped(self, count: int, cause: str) -> VideoReadError:
        what = "is cut short" if self._file.cut else "is damaged"
        total = f" of {self._announced}" if self._announced else ""
        return VideoReadError(
            f"{self._file.name}: {what}: {count}{total} frames could be read ({cause}): "
            f"get the whole file{', or use only those frames' if count else ''}"
        )

    def frames(self) -> Iterator[Any]:
        count = 0
        with self._container() as container:
            try:
                for frame in self._decode(container):
                    yield frame
                    count += 1
            except _Stopped as error:
                raise self.stopped(count, str(error)) from error
        if self._file.cut and count < self._announced:
            raise self.stopped(count, "the file ends early")

    def image(self, frame: Any) -> np.ndarray:
        """uint8 (H, W, 3), turned by the quarter turns that the file's metadata ask for."""
        # without threads=1 each frame starts a pool of threads, which takes ten times as long as its conversion
        image = np.rot90(frame.to_ndarray(format="rgb24", threads=1), round(frame.rotation / 90))
        if image.shape[:2] != (self.height, self.width):
            raise VideoReadError(
                f"{self._file.name}: the pictures change from {self.height}x{self.width} to "
                f"{image.shape[0]}x{image.shape[1]} on the way: convert the video to one size"
            )
        return image

    def _scan(self) -> _Index:
        """Walk through the packets, decoding nothing."""
        if self._index is None:
            packets = []
            with self._container() as container:
                # elsewhere, as in MPEG streams, times are guessed, and a jump lands on another frame than it says
                trusted = any(name in container.format.name for name in ("mov", "matroska", "avi"))
                try:
                    for packet in container.demux(video=0):
                        if packet.size and not packet.is_discard:
                            packets.append((packet.pts, packet.is_keyframe))
                except (self._av.FFmpegError, OSError) as error:
                    logger.warning("%s: %s", self._file.name, self.stopped(len(packets), _one_line(error)))
            times = sorted(pts for pts, _ in packets if pts is not None)
            numbers = {time: number for number, time in enumerate(times)}
            if not trusted or len(numbers) < len(packets):
                times, numbers = [], {}  # frames can only be counted from the beginning
            keys = sorted(numbers[pts] for pts, key in packets if key and pts in numbers)
            self._index = _Index(len(packets), times, numbers, keys)
        return self._index

    def num_frames(self) -> int:
        return self._scan().count

    def read(self, indices: list[int]) -> np.ndarray:
        index = self._scan()
        try:
            return self._pick(indices, index)
        except _SeekFailed:  # count from the beginning: slow, and right in every file
            return self._pick(indices, index._replace(keys=[]))

    def _pick(self, indices: list[int], index: _Index) -> np.ndarray:
        """Decode up to each frame in turn, jumping where a key frame lies between."""
        images: dict[int, np.ndarray] = {}
        with self._container() as container:
            number, frames, jumped = 0, self._decode(container), False  # `number`: of the frame that comes next
            for target in sorted(set(indices)):
                at = bisect.bisect_right(index.keys, target) - 1
                if at >= 0 and index.keys[at] > number:
                    number, frames, jumped = *self._seek(container, index, index.keys[at]), True
                try:
                    while number <= target:
                        frame = next(frames)
                        if jumped and index.numbers.get(frame.pts) != number:
                            raise _SeekFailed  # frames were lost on the way
                        number += 1
                except (_Stopped, StopIteration) as error:
                    if jumped:
                        raise _SeekFailed from error
                    raise self.stopped(number, str(error) or "its pictures end early") from error
                images[target] = self.image(frame)
        return np.stack([images[i] for i in indices])

    def _seek(self, container: Any, index: _Index, key: int) -> tuple[int, Iterator[Any]]:
        """Jump to key frame `key`, or one before it -> (the number of the first frame, frames from there on)."""
        try:
            container.seek(index.times[key], stream=container.streams.video[0], backward=True)
            frames = self._decode(container)
            first = next(frames, None)
        except (self._av.FFmpegError, _Stopped) as error:
            raise _SeekFailed from error
        number = index.numbers.get(first.pts) if first is not None else None
        if number is None or number > key:
            raise _SeekFailed
        return number, itertools.chain([first], frames)


class _Stopped(Exception):
    """Why decoding ended before the video did."""


class _SeekFailed(Exception):
    """A container cannot jump, or landed behind where it should."""


def _one_line(error: BaseException) -> str:
    """The first line of an error, without the place in decord's source where it was raised."""
    text = (getattr(error, "strerror", None) or str(error)).strip().split("\n")[0] or type(error).__name__
    return re.sub(r"^(\[[\d:]+\] )?\S+\.(cc|h):\d+: ", "", text)[:200]
