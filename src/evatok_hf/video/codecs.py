"""Conventional video codecs at a given number of bits, to compare tokens with: H.264, HEVC and AV1 through PyAV."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

# SVT-AV1 prints a banner of many lines unless it is told not to before it is loaded.
os.environ.setdefault("SVT_LOG", "1")


@contextmanager
def usual_priority() -> Iterator[None]:
    """Gives this thread the scheduling back that it had before.

    SVT-AV1 makes the thread that calls it, where that is root's, a real-time one: what it does later goes before all
    other processes, and threads of other codecs that wait for each other by spinning then never end.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _nal_units(packet: bytes) -> list[bytes]:
    """The units of an Annex B stream, without their start codes of three bytes or four, and trailing zeros."""
    return [piece.rstrip(b"\0") for piece in packet.split(b"\0\0\1")[1:]]


def _h264_pictures(packet: bytes) -> int:
    return sum(len(unit) for unit in _nal_units(packet) if 1 <= unit[0] & 0x1F <= 5)


def _hevc_pictures(packet: bytes) -> int:
    return sum(len(unit) for unit in _nal_units(packet) if unit[0] >> 1 & 0x3F < 32)


def _av1_pictures(packet: bytes) -> int:
    """Frame headers, tile groups and frames; not the sequence header, delimiters and metadata (AV1, section 5.3)."""
    at = total = 0
    while at < len(packet):
        kind, extended, sized = packet[at] >> 3 & 15, packet[at] >> 2 & 1, packet[at] >> 1 & 1
        start = at + 1 + extended
        length, used = (_leb128(packet, start)) if sized else (len(packet) - start, 0)
        end = start + used + length
        total += end - at if kind in (3, 4, 6) else 0
        at = end
    return total


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    """(value, bytes used) of a variable integer."""
    value = used = 0
    while True:
        byte = data[at + used]
        value |= (byte & 0x7F) << (7 * used)
        used += 1
        if not byte & 0x80:
            return value, used


@dataclass(frozen=True)
class Codec:
    """An encoder of FFmpeg and how it is asked for its best.

    Attributes:
        name: as people call it.
        encoder, decoder: of FFmpeg.
        coarsest: its largest quantiser setting (`crf`), from 0.
        pictures: bytes of a packet that are pictures rather than headers.
        options: of the encoder.
    """

    name: str
    encoder: str
    decoder: str
    coarsest: int
    pictures: Callable[[bytes], int]
    options: dict[str, str]

    def quick(self) -> Codec:
        """The encoder with a quicker preset, for pictures: not its best, as its name then says."""
        preset = {"preset": "10" if self.encoder == "libsvtav1" else "medium"}
        return replace(self, name=f"{self.name} ({preset['preset']})", options={**self.options, **preset})


CODECS = {
    "h264": Codec("H.264", "libx264", "h264", 51, _h264_pictures, {"preset": "veryslow"}),
    "hevc": Codec(
        "HEVC",
        "libx265",
        "hevc",
        51,
        _hevc_pictures,
        {"preset": "veryslow", "x265-params": "log-level=none:pools=1"},
    ),
    "av1": Codec("AV1", "libsvtav1", "libdav1d", 63, _av1_pictures, {"preset": "3"}),
}


class MissingCodec(ValueError):
    """A codec that this build of PyAV comes without."""


def find_codec(name: str) -> Codec:
    """The codec of a key of `CODECS`.

    Raises:
        ValueError: an unknown codec; `MissingCodec` for one that this build of PyAV does not have.
    """
    import av

    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; choose one of {', '.join(CODECS)}.")
    for part, mode in ((CODECS[name].encoder, "w"), (CODECS[name].decoder, "r")):
        try:
            av.codec.Codec(part, mode)
        except av.codec.codec.UnknownCodecError as error:
            raise MissingCodec(f"this build of PyAV has no {part}; install the wheel of PyPI.") from error
    return CODECS[name]


@dataclass
class Compressed:
    """A clip that went through a codec.

    Attributes:
        frames: uint8 (F, H, W, 3).
        bits: of its pictures; sequence headers are left out, in favour of the codec.
        crf: the quantiser setting.
    """

    frames: np.ndarray
    bits: int
    crf: int


class CodecBaseline:
    """A clip through a codec at any number of bits; what was encoded once is kept.

    Args:
        frames: uint8 (F, H, W, 3), even height and width.
        codec: a key of `CODECS`, or what `find_codec` gave.
        fps: frames a second that the encoder is told.

    Raises:
        ValueError: as `find_codec`.
    """

    def __init__(self, frames: np.ndarray, codec: str | Codec, fps: float = 25.0):
        self.codec = codec if isinstance(codec, Codec) else find_codec(codec)
        self.frames, self.fps = frames, Fraction(fps).limit_denominator(1001)
        self._made: dict[int, tuple[list[Any], int]] = {}  # packets and their bits

    def at_crf(self, crf: int) -> Compressed:
        """The clip at a quantiser setting, 0 to the codec's coarsest."""
        packets, bits = self._packets(crf)
        return Compressed(self._decode(packets), bits, crf)

    def at_bits(self, bits: float) -> Compressed:
        """The finest setting that needs at most so many bits; the coarsest where even that needs more."""
        settings = range(self.codec.coarsest)  # bits fall as the setting rises
        return self.at_crf(bisect_left(settings, True, key=lambda crf: self._packets(crf)[1] <= bits))

    def _packets(self, crf: int) -> tuple[list[Any], int]:
        if crf not in self._made:
            with usual_priority():
                packets = self._encode(crf)
            self._made[crf] = packets, 8 * sum(self.codec.pictures(bytes(packet)) for packet in packets)
        return self._made[crf]

    def _encode(self, crf: int) -> list[Any]:
        import av

        context = av.CodecContext.create(self.codec.encoder, "w")
        context.height, context.width = self.frames.shape[1:3]
        context.pix_fmt, context.time_base, context.framerate = "yuv420p", 1 / self.fps, self.fps
        context.gop_size = 2 * len(self.frames)  # one key frame
        context.thread_count = 1
        context.options = {**self.codec.options, "crf": str(crf)}
        packets = []
        for number, image in enumerate(self.frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, context.time_base
            packets += context.encode(frame)
        return packets + context.encode(None)

    def _decode(self, packets: list[Any]) -> np.ndarray:
        import av

        context = av.CodecContext.create(self.codec.decoder, "r")
        context.thread_count = 1
        pictures = [frame for packet in packets for frame in context.decode(packet)] + context.decode(None)
        return np.stack([picture.to_ndarray(format="rgb24") for picture in pictures])
