"""The index of a video file: its stream, its pictures, when each is shown and where decoding can begin.

A packet is not a picture: some show nothing (the hidden frames of VP8), some are cut away by an edit list, and some
cannot be decoded (before the first key frame, after lost ones). Where packets are known to tell, reading them is
enough; elsewhere the pictures are counted by decoding them all, once they have to be known.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .container import Stopped, Turn, av_errors, find_video, one_line, open_container, pictures
from .source import Source, SourceFile, VideoReadError

logger = logging.getLogger(__name__)

# Codecs of which a packet is one picture, whatever was lost before it.
_ALONE = {"vp8", "vp9", "av1", "libdav1d", "gif", "mjpeg", "png", "ffv1", "huffyuv", "ffvhuff", "rawvideo", "prores"}
# Codecs of which a packet is one picture as long as none was lost: else decoders drop pictures without a word.
_TOGETHER = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video"}
# Shorter packets of MPEG-4 are mostly stand-ins that show nothing.
_STAND_IN = 16  # bytes
# Elsewhere, as in MPEG streams, a jump lands on another frame than it says.
_JUMPS = ("mov", "matroska", "avi")
_NO_TIME = np.iinfo(np.int64).min
# A picture that stands for longer is a mistake in the file's times, not a slide: seconds.
_LONGEST = 3600
# So many pictures are remembered, of the files that were read last.
_REMEMBERED = 2_000_000
# Packets of files up to so many bytes are kept until decoding goes on.
_KEPT = 16 << 20


@dataclass(frozen=True)
class VideoIndex:
    """The pictures of a file.

    Attributes:
        stream: number of the stream among all of the file.
        count: pictures; what is certain only if `exact`.
        exact: whether packets told, or all were decoded.
        plain: whether it is known that each packet shows one picture, all of one size, at times of 0 or more.
        packets: all that are not empty.
        fps: mean rate.
        stamps: (count,) int64, the time that each decoded frame carries, in the stream's units; `_NO_TIME` without.
        times: (count,) seconds from the first picture on; None where pictures are evenly spaced at `fps`.
        keys: numbers of pictures where decoding can begin, ascending; empty where jumps are not to be trusted.
        announced: pictures that the file's header speaks of, 0 where it says nothing.
        height, width: in pixels, as shown; 0 before a picture was decoded.
        turn: how pictures are turned to be shown.
    """

    stream: int
    count: int
    exact: bool
    plain: bool
    packets: int
    fps: float
    stamps: np.ndarray
    times: np.ndarray | None
    keys: np.ndarray
    announced: int
    height: int = 0
    width: int = 0
    turn: Turn = Turn()

    def number_of(self, stamp: int | None) -> int | None:
        """The number of the picture that has this stamp; None if none has."""
        if stamp is None:
            return None
        start, end = np.searchsorted(self.stamps, [stamp, stamp + 1], sorter=self._order)
        return int(self._order[start]) if end - start == 1 else None

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.stamps, kind="stable")


class _Packet(NamedTuple):
    stamp: int | None
    key: bool
    hidden: bool  # shows nothing
    cut: bool  # an edit list takes its picture away
    broken: bool
    size: int
    shape: bytes  # what of a key frame says how large its pictures are


class Begun(NamedTuple):
    """A file of which decoding has begun: its container, to be closed, the stream, and its frames from the first on."""

    container: Any
    stream: Any
    frames: Iterator[Any]

    @classmethod
    def anew(cls, file: SourceFile, number: int) -> Begun:
        """Opens a file to decode one of its streams."""
        container = open_container(file)
        stream = container.streams[number]
        stream.codec_context.thread_count = 1  # data loaders run one reader a process
        return cls(container, stream, pictures(container.demux(stream)))


def read_packets(file: SourceFile, decode: bool = True, go_on: bool = False) -> tuple[VideoIndex, Any, Begun | None]:
    """Makes an index from the packets; with `decode`, the size and the turn of the first picture too, and its frame.

    With `go_on` decoding can go on from there, unless the file is so large that its packets were not kept: opening it
    anew costs as much as some pictures.

    Raises:
        VideoReadError: if there is no video in the file, or no picture can be decoded.
    """
    packets: list[_Packet] = []
    kept: list[Any] | None = [] if go_on and file.size <= _KEPT else None
    with contextlib.ExitStack() as stack:
        container = stack.enter_context(open_container(file))
        stream = find_video(container, file.name)
        codec = stream.codec_context
        name = codec.name
        # A single frame has no rate; 25 is FFmpeg's stand-in for pictures.
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        announced = stream.frames or round((container.duration or 0) / 1e6 * rate)
        frames: list[Any] = []
        failure, begun = None, False
        try:
            for packet in container.demux(stream):
                if packet.size:
                    packets.append(
                        _Packet(
                            packet.pts,
                            packet.is_keyframe,
                            _shows_nothing(name, packet),
                            packet.is_discard,
                            packet.is_corrupt,
                            packet.size,
                            _shape(name, packet) if packet.is_keyframe else b"",
                        )
                    )
                if decode and not frames and failure is None:
                    begun = begun or packet.is_keyframe or not packet.size
                    try:
                        frames = packet.decode()
                    except av_errors() as error:
                        failure = one_line(error) if begun else None
                elif kept is not None:
                    kept.append(packet)
        except av_errors() as error:
            logger.warning("%s: after %d packets nothing can be read (%s)", file.name, len(packets), one_line(error))
            packets.append(_Packet(None, False, False, False, True, 0, b""))
            kept = None
        first = frames[0] if frames else None
        if decode and first is None:
            if failure is not None:
                raise stopped(file, announced, 0, failure)
            raise VideoReadError(f"{file.name}: its video stream holds no frame: export the video again")
        index = _from_packets(packets, container, stream, rate, announced)
        if first is None:
            return replace(index, height=codec.height, width=codec.width), None, None
        turn = Turn.of(first, file.name)
        height, width = (first.width, first.height) if turn.exchange else (first.height, first.width)
        index = replace(index, height=height, width=width, turn=turn)
        if kept is None:
            return index, first, None
        stack.pop_all()
        return index, first, Begun(container, stream, itertools.chain(frames, pictures(iter(kept), begun=True)))


def stopped(file: SourceFile, announced: int, count: int, cause: str) -> VideoReadError:
    """The error of a file of which only so many pictures could be read."""
    what = "is cut short" if file.cut else "is damaged"
    total = f" of {announced}" if announced else ""
    return VideoReadError(
        f"{file.name}: {what}: {count}{total} frames could be read ({cause}): "
        f"get the whole file{', or use only those frames' if count else ''}"
    )


def _shows_nothing(codec: str, packet: Any) -> bool:
    """Tells by its header whether a packet of VP8 or VP9 is a hidden frame alone (RFC 6386, 9.1; VP9 6.2, annex B)."""
    if codec not in ("vp8", "vp9"):
        return False
    data = memoryview(packet)
    if codec == "vp8":
        return not data[0] >> 4 & 1
    if data[-1] >> 5 == 0b110:  # several frames in one, of which the last is shown
        return False
    bits = data[0] if data[0] >> 4 & 3 == 3 else data[0] >> 1  # profile 3 has a bit more
    show_existing, show = bits >> 2 & 1, bits & 1
    return not show_existing and not show


def _shape(codec: str, packet: Any) -> bytes:
    """Bytes of a key frame that say how large its pictures are, to compare; empty where only the file's header does."""
    if codec not in ("vp8", "vp9", "h264", "hevc"):
        return b""
    data = bytes(packet)
    if codec == "vp8":  # RFC 6386, 9.1
        return data[6:10]
    if codec == "vp9":  # 6.2, after the colours
        return data[4:8] + bytes([byte >> 4 for byte in data[8:9]])
    begun = data.startswith((b"\0\0\1", b"\0\0\0\1"))
    for unit in data.split(b"\0\0\1") if begun else _units(data):  # the sequence's parameters, if they are repeated
        if unit and (unit[0] & 31 == 7 if codec == "h264" else unit[0] >> 1 & 63 == 33):
            return unit.rstrip(b"\0")
    return b""


def _units(data: bytes) -> Iterator[bytes]:
    """The units of a packet in which each stands behind its length, as in MP4 and Matroska."""
    at = 0
    while at + 4 < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : end]
        at = end


def _jumps(container: Any) -> bool:
    return any(kind in container.format.name for kind in _JUMPS)


def _from_packets(packets: list[_Packet], container: Any, stream: Any, rate: float, announced: int) -> VideoIndex:
    codec = stream.codec_context.name
    start = next((number for number, packet in enumerate(packets) if packet.key), 0)
    shown = [packet for packet in packets[start:] if not packet.hidden and not packet.cut]
    known = np.array([packet.stamp for packet in shown if packet.stamp is not None], dtype=np.int64)
    stamps = np.sort(known)
    timed = len(stamps) == len(shown) and (stamps[1:] > stamps[:-1]).all()
    everything = np.sort([packet.stamp for packet in packets if packet.stamp is not None and not packet.hidden])
    exact = bool(
        shown
        and timed
        and packets[0].key
        and packets[0].stamp is not None
        and packets[0].stamp <= everything[0]  # else pictures that come before it may miss theirs
        and not any(packet.broken for packet in packets)
        and (codec in _ALONE or (codec in _TOGETHER and _without_holes(everything)))
        and not (codec == "mpeg4" and min(packet.size for packet in packets) < _STAND_IN)
    )
    fps, times = _spacing(stamps, rate, float(stream.time_base))
    one_size = len({packet.shape for packet in packets if packet.key}) < 2
    plain = exact and one_size and len(shown) == len(packets) and bool(stamps[0] >= 0)
    keys = [packet.stamp for packet in shown if packet.key and packet.stamp is not None]
    trusted = _jumps(container) and timed and keys
    keys = np.searchsorted(stamps, np.sort(keys)) if trusted else np.empty(0, np.int64)
    return VideoIndex(stream.index, len(shown), exact, plain, len(packets), fps, stamps, times, keys, announced)


def _without_holes(stamps: np.ndarray) -> bool:
    """Tells whether nowhere between two pictures another one may have been lost."""
    gaps = np.diff(stamps.astype(np.float64))  # which cannot overflow
    return not len(gaps) or bool(gaps.max() < 2 * gaps.min())


def _spacing(stamps: np.ndarray, fps: float, tick: float) -> tuple[float, np.ndarray | None]:
    """Ascending stamps -> (mean rate, their times from the first one on in seconds, or None if evenly spaced)."""
    times = (stamps.astype(np.float64) - stamps[:1]) * tick
    if not times[-1:].any():
        return fps, None
    steps = len(stamps) - 1
    # The file's own rate is the finer one, if it is that of the times.
    if abs(steps / fps - times[-1]) > max(1.5 * tick, 0.005 * times[-1]):
        fps = steps / times[-1]
    return fps, None if _even(times, fps, tick) else times


def _even(times: np.ndarray, fps: float, tick: float) -> bool:
    """Tells whether times are those of a constant rate, but for rounding to the file's clock and a little unrest."""
    off = times - np.arange(len(times)) / fps
    return bool(np.ptp(off) <= 2 * max(min(tick, 0.25 / fps), 0.1 / fps))


def decode_all(file: SourceFile, index: VideoIndex) -> VideoIndex:
    """The index of a file whose packets do not tell, from decoding it: its pictures up to its end, or up to where
    decoding fails."""
    found: list[int | None] = []
    keys: set[int] = set()
    sizes: set[tuple[int, int]] = set()
    container, stream, frames = Begun.anew(file, index.stream)
    with container:
        try:
            for frame in frames:
                if frame.key_frame and frame.pts is not None:
                    keys.add(len(found))
                found.append(frame.pts)
                sizes.add((frame.width, frame.height))
        except Stopped as error:
            logger.warning("%s", stopped(file, index.announced, len(found), str(error)))
        jumps, tick = _jumps(container), float(stream.time_base)
    stamps = np.array([_NO_TIME if stamp is None else stamp for stamp in found], dtype=np.int64)
    known = np.flatnonzero(stamps != _NO_TIME)
    times = None
    if len(known) > 1:
        # In some files (H.264 in AVI) times are those of decoding; in order they are right again.
        seconds = np.sort(stamps[known]).astype(np.float64) * tick
        at = np.arange(len(stamps))
        times = np.interp(at, known, seconds)
        times[: known[0]] = seconds[0] + (at[: known[0]] - known[0]) / index.fps
        times[known[-1] + 1 :] = seconds[-1] + (at[known[-1] + 1 :] - known[-1]) / index.fps
        times -= times[0]
        times = None if _even(times, index.fps, tick) else times
    return replace(
        index,
        count=len(stamps),
        exact=True,
        plain=len(sizes) == 1
        and len(stamps) == index.packets
        and stamps[0] >= 0
        and bool((stamps[1:] > stamps[:-1]).all()),
        stamps=stamps,
        times=times,
        keys=np.array(sorted(keys) if jumps else [], dtype=np.int64),
    )


# --- which pictures are shown at another rate -------------------------------------------------------------------------


def nearest_frame_indices(source_fps: float, target_fps: float) -> Iterator[int]:
    """The source frame that each output frame shows, without end: output k shows the frame nearest to its own time,
    floor(k * source_fps / target_fps + 1/2). Frames are dropped or repeated, never blended."""
    ratio = source_fps / target_fps
    return (math.floor(k * ratio + 0.5) for k in itertools.count())


def nearest_in_time(times: np.ndarray, fps: float) -> Iterator[int]:
    """The source frame that each output frame shows, of pictures at these times (ascending seconds): output k shows the
    one nearest to k / fps, the later of two. The numbers end half the shortest gap after the last picture, before which
    nothing else could be nearer."""
    middles = ((times[1:] + times[:-1]) / 2).tolist()
    return (bisect.bisect_right(middles, k / fps + 1e-9) for k in range(count_in_time(times, fps)))


def count_in_time(times: np.ndarray, fps: float) -> int:
    """Counts the numbers that `nearest_in_time` gives."""
    end = times[-1] + np.diff(times).min() / 2
    return max(1, math.ceil(end * fps - 1e-6))


def check_times(times: np.ndarray | None, name: str) -> None:
    """Raises `VideoReadError` where times jump so far that pictures would have to be repeated for hours."""
    if times is not None and (gap := float(np.diff(times).max())) > _LONGEST:
        raise VideoReadError(
            f"{name}: the times of its pictures jump by {gap:.0f} seconds, and at a rate of its own choice the one "
            "before would be repeated for so long: mend the times, or keep the video's own rate"
        )


# --- files that are read again ----------------------------------------------------------------------------------------


class _Memory:
    """The indices of the files that were read last, by path, size and time of change."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, VideoIndex] = OrderedDict()
        self._lock = threading.Lock()
        self._size = 0

    def get(self, key: Hashable) -> VideoIndex | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def put(self, key: Hashable, index: VideoIndex) -> None:
        with self._lock:
            if key in self._known:
                self._size -= self._weight(self._known.pop(key))
            self._known[key] = index
            self._size += self._weight(index)
            while self._size > _REMEMBERED and len(self._known) > 1:
                self._size -= self._weight(self._known.popitem(last=False)[1])

    @staticmethod
    def _weight(index: VideoIndex) -> int:
        return 100 + index.count  # an entry takes some memory of its own


remembered = _Memory()


def key_of(source: Source) -> Hashable:
    """The key by which a file is remembered; None for sources that are no path."""
    if not isinstance(source, str | os.PathLike):
        return None
    try:
        state = os.stat(source)
    except OSError:
        return None
    return os.path.abspath(source), state.st_size, state.st_mtime_ns, state.st_ino
