"""A file opened with PyAV: which of its streams is the video, its pictures in order, and which way up they are."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .bounds import check_frame
from .source import SourceFile, VideoReadError

# FFmpeg also opens playlists and scripts that name other files and addresses; a video that a stranger uploads must not
# make it read those, so only containers that hold their own pictures are let in.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,gif,flv,ogg,asf,h264,hevc,ivf,m4v,dv"
# A stream that the file marks as its default counts as so many pixels larger, as in the ffmpeg program.
_DEFAULT_PIXELS = 5_000_000


class Stopped(Exception):
    """The reason why decoding ended before the video did."""


def av_errors() -> tuple[type[Exception], ...]:
    """The exceptions that PyAV raises for a file that it cannot read."""
    return (importlib.import_module("av").FFmpegError, OSError)


def open_container(file: SourceFile) -> Any:
    """The file as a container of PyAV, to be closed by the caller.

    Raises:
        VideoReadError: if PyAV is missing, or knows no video format in the file.
    """
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise VideoReadError(f"{file.name}: PyAV is needed to read it: pip install av") from error
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        return av.open(file.for_pyav(), options=options, metadata_errors="replace")
    except av_errors() as error:
        if file.head[4:8] == b"ftyp":
            mend = "its index (moov) is missing, as when a recording or download was cut: get the whole file"
        else:
            mend = "no mp4, avi, mkv, webm, mpg or gif video was recognised in it: check what the file is"
        raise VideoReadError(f"{file.name}: cannot be opened ({one_line(error)}): {mend}") from error


def find_video(container: Any, name: str) -> Any:
    """The stream that is meant: no attached cover, not a single picture where there are more, then the default one or
    the largest.

    Raises:
        VideoReadError: if there is none that can be decoded.
    """
    disposition = importlib.import_module("av.stream").Disposition
    videos = list(container.streams.video)
    shown = [stream for stream in videos if not stream.disposition & disposition.attached_pic]
    known = [stream for stream in shown if stream.codec_context is not None]
    if not videos:
        raise VideoReadError(f"{name}: has no video stream, only sound or data: give a file with pictures")
    if not shown:
        raise VideoReadError(f"{name}: has no video stream, only a cover picture: give a file with moving pictures")
    if not known:
        raise VideoReadError(
            f"{name}: its codec is unknown here: convert it, for example ffmpeg -i FILE -c:v libx264 out.mp4"
        )

    def rank(stream: Any) -> tuple[bool, int, int]:
        pixels = stream.codec_context.width * stream.codec_context.height
        return (
            stream.frames != 1,
            pixels + _DEFAULT_PIXELS * bool(stream.disposition & disposition.default),
            stream.frames,
        )

    best = max(known, key=rank)
    check_frame(name, best.codec_context.height, best.codec_context.width)
    best.codec_context.thread_count = 1  # data loaders run one reader a process
    return best


def pictures(packets: Iterator[Any], begun: bool = False) -> Iterator[Any]:
    """The frames of packets, as a container gives them. What comes before the first key frame and cannot be decoded
    without it is passed over, unless decoding has `begun` before.

    Raises:
        Stopped: where decoding fails.
    """
    errors = av_errors()
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            begun = begun or packet.is_keyframe or not packet.size
            frames = packet.decode()
        except errors as error:
            if begun:
                raise Stopped(one_line(error)) from error
            continue
        begun = begun or bool(frames)
        yield from frames


class Turn(NamedTuple):
    """A turn of decoded pictures before they are shown: axes exchanged, then rows and columns reversed."""

    exchange: bool = False
    rows: bool = False
    columns: bool = False

    @classmethod
    def of(cls, frame: Any, name: str) -> Turn:
        """The turn that the display matrix of a frame asks for, quarter turns and mirrors.

        Raises:
            VideoReadError: if it asks for another angle.
        """
        data = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return cls()
        a, b, _, c, d = (int(value) for value in np.frombuffer(data, np.int32)[:5])
        if not math.hypot(a, c) or not math.hypot(b, d):  # not a matrix that shows anything
            return cls()
        angle = math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c)))
        quarters = round(angle / 90)
        if abs(angle - 90 * quarters) > 1:
            raise VideoReadError(
                f"{name}: its pictures are to be turned by {angle:.0f} degrees, not by a quarter turn: "
                "convert it, for example ffmpeg -i FILE out.mp4"
            )
        return cls(True, b < 0, c < 0) if quarters % 2 else cls(False, d < 0, a < 0)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) -> (H, W, 3) or (W, H, 3)."""
        if self.exchange:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.rows else 1, :: -1 if self.columns else 1]


def one_line(error: BaseException) -> str:
    """The first line of an error, without the place in decord's source where it was raised."""
    text = (getattr(error, "strerror", None) or str(error)).strip().split("\n")[0] or type(error).__name__
    return re.sub(r"^(\[[\d:]+\] )?\S+\.(cc|h):\d+: ", "", text)[:200]
