"""Videos as they are found, made on the spot: ordinary ones, and one of each kind that readers get wrong.

Every picture carries its number, so that order and identity can be read back. Of each video it is known which pictures
a viewer sees, at what mean rate, and which are shown at ten a second; `tools/reading_table.py` makes the table in
docs/reading.md of them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image
from video_samples import encode

SIDE = 64
# H.264 in groups of 20 pictures, with B-frames of which some are reference for others.
H264 = {"crf": "12", "g": "20", "bf": "3", "x264-params": "b-pyramid=normal:scenecut=0"}

HEVC = {"x265-params": "keyint=20:bframes=3:open-gop=1:log-level=0"}


def numbered(count: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """uint8 (count, height, width, 3): picture k has the bits of k as eight bars, bright or dark, and a red square."""
    video = np.full((count, height, width, 3), 90, dtype=np.uint8)
    for k in range(count):
        for bit in range(8):
            video[k, : height // 2, bit * width // 8 : (bit + 1) * width // 8] = 230 if k >> bit & 1 else 20
        left = 3 * k % (width - 12)
        video[k, height // 2 + 8 : height // 2 + 20, left : left + 12] = (220, 40, 40)
    return video


def number(image: np.ndarray) -> int:
    """The number that a picture (H, W, 3) carries."""
    height, width = image.shape[:2]
    bars = image[height // 8 : height * 3 // 8, :, :].mean((0, 2)).reshape(8, width // 8)[:, 2:-2].mean(1)  # (8,)
    return sum(1 << bit for bit in range(8) if bars[bit] > 125)


def numbers(images: Iterable[np.ndarray]) -> list[int]:
    return [number(image) for image in images]


@dataclass(frozen=True)
class Odd:
    """One video.

    Attributes:
        name: of its file.
        what: what there is to know of it, for the table.
        make: writes it to a path.
        shown: the numbers of the pictures that a viewer sees; or why it is refused, a part of the message.
        times: seconds when each of them is shown; None for every 1/25 s.
        decord: whether decord reads it, and is therefore taken where that is known beforehand.
    """

    name: str
    what: str
    make: Callable[[Path], object]
    shown: list[int] | str
    times: list[float] | None = None
    decord: bool = False

    @property
    def seconds(self) -> np.ndarray:
        """When each picture is shown, from the first one on."""
        times = np.arange(len(self.shown)) / 25 if self.times is None else np.array(self.times)
        return times - times[0]

    @property
    def fps(self) -> float:
        return (len(self.shown) - 1) / self.seconds[-1]

    def at(self, fps: float) -> list[int]:
        """The numbers of the pictures that are nearest to 0, 1/fps, 2/fps .. seconds, the later of two."""
        times, found, k = self.seconds, [], 0
        while k / fps < times[-1] + np.diff(times).min() / 2 - 1e-6:
            off = np.round(np.abs(times - k / fps), 6)
            found.append(self.shown[int(np.flatnonzero(off == off.min())[-1])])
            k += 1
        return found


def remux(
    data: bytes,
    path: Path,
    keep: Callable[[int, av.Packet], bool] = lambda index, packet: True,
    shift: float = 0,
    options: dict[str, str] | None = None,
    format: str | None = None,
) -> None:
    """Copies the packets of a video that `keep` (given their numbers in the file) keeps, `shift` seconds later."""
    with av.open(io.BytesIO(data)) as source, av.open(str(path), "w", format=format, options=options or {}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        ticks = round(shift / stream.time_base)
        for index, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            if keep(index, packet):
                packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
                packet.stream = copy
                target.mux(packet)


@cache
def coded(codec: str = "libx264", count: int = 60, **options: str) -> bytes:
    """`numbered` pictures at 25 fps, as an mp4 (of VP8, a webm) in memory."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm" if codec.startswith("libvpx") else "mp4") as container:
        stream = container.add_stream(codec, rate=25, options=options or (H264 if codec == "libx264" else {}))
        stream.height = stream.width = SIDE
        stream.pix_fmt = "yuv420p"
        for k, image in enumerate(numbered(count)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def packets(data: bytes) -> list[tuple[int, bool, bytes]]:
    """(number of its picture, key frame, data) of each packet of `coded`."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        found = [packet for packet in container.demux(stream) if packet.size]
        return [(round(float(p.pts * stream.time_base) * 25), p.is_keyframe, bytes(p)) for p in found]


# --- makers ---------------------------------------------------------------------------------------------------------


def _cover() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300), (0, 200, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def _attach(container: av.container.OutputContainer) -> Callable[[], None]:
    """A cover picture; what is returned writes it."""
    stream = container.add_stream("mjpeg", rate=1)
    stream.width = stream.height = 300
    stream.pix_fmt = "yuvj420p"
    stream.disposition = Disposition.attached_pic

    def write() -> None:
        packet = av.Packet(_cover())
        packet.pts = packet.dts = 0
        packet.time_base, packet.stream = Fraction(1, 90000), stream
        container.mux(packet)

    return write


def make_cover(path: Path) -> None:
    """The cover comes after the video in the file."""
    with av.open(io.BytesIO(coded(count=40))) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy, write = target.add_stream_from_template(stream), _attach(target)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                target.mux(packet)
        write()


def _boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at : at + size]))
        at += size
    return found


def make_cover_first(path: Path) -> None:
    """As tagging programs leave it: a reader meets the cover before the video."""
    make_cover(path)
    data = b""
    for kind, box in _boxes(path.read_bytes()):
        if kind == b"moov":
            inside = sorted(_boxes(box[8:]), key=lambda pair: {b"mvhd": 0, b"udta": 1}.get(pair[0], 2))
            box = box[:8] + b"".join(content for _, content in inside)
        data += box
    path.write_bytes(data)


def make_song(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        sound, write = container.add_stream("aac", rate=44100, layout="mono"), _attach(container)
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * i
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
        write()


def make_two_videos(path: Path) -> None:
    """A small preview before the video itself, both marked as nothing."""
    with av.open(str(path), "w") as container:
        streams = []
        for side in (16, SIDE):
            stream = container.add_stream("libx264", rate=25, options=H264)
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            stream.disposition = Disposition(0)
            streams.append(stream)
        for k, image in enumerate(numbered(40)):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[: stream.height, : stream.width]))
                frame.pts, frame.time_base = k, Fraction(1, 25)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))


def _element(name: bytes, body: bytes, unknown: bool = False) -> bytes:
    """An element of Matroska (RFC 8794)."""
    return name + (b"\x01" + b"\xff" * 7 if unknown else (len(body) | 1 << 56).to_bytes(8, "big")) + body


def _number(value: int) -> bytes:
    return value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big")


def make_recording(path: Path, milliseconds: Iterable[int], data: bytes, hide: int | None = None) -> None:
    """As a browser's MediaRecorder writes it: no rate, no duration, no index. Packet `hide` becomes a hidden frame."""
    shape = _element(b"\xb0", _number(SIDE)) + _element(b"\xba", _number(SIDE))
    track = b"".join(_element(name, _number(1)) for name in (b"\xd7", b"\x73\xc5", b"\x83"))
    track += _element(b"\x86", b"V_VP8") + _element(b"\xe0", shape)
    clusters, start, body = b"", 0, _element(b"\xe7", b"\0")
    for time, (index, (_, key, packet)) in zip(milliseconds, enumerate(packets(data)), strict=True):
        if time - start > 1000:
            clusters += _element(b"\x1f\x43\xb6\x75", body, unknown=True)
            start, body = time, _element(b"\xe7", _number(time))
        if index == hide:
            packet = bytes([packet[0] & ~16]) + packet[1:]
        body += _element(b"\xa3", b"\x81" + (time - start).to_bytes(2, "big") + (b"\x80" if key else b"\0") + packet)
    clusters += _element(b"\x1f\x43\xb6\x75", body, unknown=True)
    head = _element(b"\x1aE\xdf\xa3", _element(b"\x42\x82", b"webm"))
    info = _element(b"\x15\x49\xa9\x66", _element(b"\x2a\xd7\xb1", _number(1_000_000)))
    tracks = _element(b"\x16\x54\xae\x6b", _element(b"\xae", track))
    path.write_bytes(head + _element(b"\x18S\x80g", info + tracks + clusters, unknown=True))


def hide_frames(path: Path, hidden: set[int], format: str) -> None:
    """VP8 in two passes hides alternative references among its packets; here `hidden` ones of `coded` become such."""
    with av.open(io.BytesIO(coded("libvpx"))) as source, av.open(str(path), "w", format=format) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for index, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            new = packet
            if index in hidden:
                new = av.Packet(bytes([bytes(packet)[0] & ~16]) + bytes(packet)[1:])
                new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
                new.is_keyframe = packet.is_keyframe
            new.stream = copy
            target.mux(new)


def make_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    """A display matrix in the header of a video of one picture's size (ISO 14496-12, 8.3.2)."""
    encode(path, numbered(30, SIDE, 2 * SIDE), options=H264)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    matrix = [round(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    data[at : at + 36] = struct.pack(">9i", *matrix, 1 << 30)
    path.write_bytes(data)


def hide_start(path: Path, hidden: int) -> None:
    """An edit list that begins at picture `hidden`, as phones trim videos (ISO 14496-12, 8.6.6)."""
    data = bytearray(coded())
    at = data.find(b"elst") + 12  # version, count, then duration and media time of the one entry
    duration, start = struct.unpack(">Ii", data[at : at + 8])
    data[at : at + 8] = struct.pack(">Ii", duration - 40 * hidden, start + 512 * hidden)  # 1/1000 s, 1/12800 s
    path.write_bytes(data)


def make_resized(path: Path, codec: str) -> None:
    """Twenty small pictures and twenty larger ones as one stream, as when a shared window is drawn larger."""
    with av.open(str(path), "w") as target:
        copy = None
        for part, side in enumerate((SIDE, 2 * SIDE)):
            # MPEG streams repeat the parameters of H.264 and HEVC with each key frame.
            buffer, format = io.BytesIO(), "webm" if "vp" in codec else "mpegts"
            options = {"bf": "0"} if codec == "libx264" else {"x265-params": "bframes=0:log-level=0"}
            with av.open(buffer, "w", format=format) as container:
                stream = container.add_stream(codec, rate=25, options=_VP8 if "vp" in codec else options)
                stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
                for image in numbered(20, side, side):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                container.mux(stream.encode(None))
            buffer.seek(0)
            with av.open(buffer) as source:
                copy = copy or target.add_stream_from_template(source.streams.video[0])
                for index, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
                    packet.time_base, packet.stream = Fraction(1, 25), copy
                    packet.pts = packet.dts = 20 * part + index
                    target.mux(packet)


def make_pictures(path: Path) -> None:
    """An animated AVIF, WebP or PNG."""
    first, *rest = (Image.fromarray(image) for image in numbered(12))
    first.save(path, save_all=True, append_images=rest, duration=100)


def copied(
    keep: Callable[[int], bool] = lambda index: True,
    shift: float = 0,
    options: dict[str, str] | None = None,
    data: Callable[[], bytes] = lambda: coded(),
) -> Callable[[Path], object]:
    return lambda path: remux(data(), path, lambda index, packet: keep(index), shift, options)


def vp8() -> bytes:
    return coded("libvpx", g="20", **_VP8)


def after_seven(index: int) -> bool:
    return index >= 7


def ordinary(codec: str, pix_fmt: str = "yuv420p", fps: float = 25, **options: str) -> Callable[[Path], object]:
    return lambda path: encode(path, numbered(60), codec, pix_fmt, fps, options)


# --- the videos -----------------------------------------------------------------------------------------------------

_ALL = list(range(60))
_NEGATIVE = {"avoid_negative_ts": "disabled"}
# Without those that are hidden.
_SEEN = [k for k in _ALL if k not in (7, 20)]
_SEEN_TIMES = [k / 25 for k in _SEEN]
_VP8 = {"deadline": "realtime", "cpu-used": "8"}
# Milliseconds of a recording: now and then a picture comes late.
_LATE = np.cumsum(np.random.default_rng(1).integers(20, 48, 60)).tolist()
_LATE = [time - _LATE[0] for time in _LATE]
# Pictures 0 .. 29 at 30 a second, then ten a second, in 1/30 s.
_SLOWER = [k if k < 30 else 30 + 3 * (k - 30) for k in range(60)]


# Packets of pictures that no other refers to, by the header of their first unit (ITU-T H.264, 7.3.1), and what is left.
_LOST = [index for index, (_, _, data) in enumerate(packets(coded())) if data[4] == 1][4:7]
_REST = [k for k in _ALL if k not in [packets(coded())[index][0] for index in _LOST]]

ORDINARY = [
    Odd("h264.mp4", "MP4, H.264 with B-frames", ordinary("libx264", **H264), _ALL, decord=True),
    Odd("h264.mov", "MOV, H.264", ordinary("libx264", **H264), _ALL, decord=True),
    Odd("hevc.mp4", "MP4, HEVC with open groups", ordinary("libx265", **HEVC), _ALL, decord=True),
    Odd("av1.mp4", "MP4, AV1", ordinary("libsvtav1", preset="12"), _ALL),
    Odd("mpeg4.mp4", "MP4, MPEG-4", ordinary("mpeg4", qmin="2", qmax="2"), _ALL, decord=True),
    Odd("h264.mkv", "Matroska, H.264 with B-frames", ordinary("libx264", **H264), _ALL, decord=True),
    Odd("ffv1.mkv", "Matroska, FFV1", ordinary("ffv1", "bgr0"), _ALL, decord=True),
    Odd("vp9.webm", "WebM, VP9", ordinary("libvpx-vp9", crf="10", b="0", **_VP8), _ALL, decord=True),
    Odd("vp8.webm", "WebM, VP8", ordinary("libvpx", crf="10", b="1M", **_VP8), _ALL, decord=True),
    Odd("mpeg4.avi", "AVI, MPEG-4 with B-frames", ordinary("mpeg4", qmin="2", qmax="2", bf="2"), _ALL, decord=True),
    Odd(
        "h264.avi",
        "AVI, H.264 with B-frames, whose times are those of decoding",
        ordinary("libx264", **H264),
        _ALL,
        decord=True,
    ),
    Odd("mjpeg.avi", "AVI, Motion JPEG", ordinary("mjpeg", "yuvj420p"), _ALL, decord=True),
    Odd("mpeg1.mpg", "MPEG program stream, MPEG-1", ordinary("mpeg1video", bf="2"), _ALL),
    Odd("mpeg2.ts", "MPEG transport stream, MPEG-2", ordinary("mpeg2video", bf="2"), _ALL),
    Odd("h264.ts", "MPEG transport stream, H.264", ordinary("libx264", **H264), _ALL),
    Odd("h264.flv", "Flash, H.264", ordinary("libx264", **H264), _ALL, decord=True),
    Odd("plain.h264", "H.264 without a container, so without times", ordinary("libx264", **H264), _ALL),
    Odd("animated.gif", "GIF", ordinary("gif", "rgb8"), _ALL),
]

ODD = [
    Odd("cover.mp4", "a cover picture after the video", make_cover, _ALL[:40], decord=True),
    Odd("cover_first.mp4", "a cover picture before the video", make_cover_first, _ALL[:40], decord=True),
    Odd("song.m4a", "sound with a cover picture", make_song, "only a cover picture"),
    Odd("two.mkv", "two videos, the larger one second", make_two_videos, _ALL[:40]),
    Odd(
        "hidden.webm",
        "VP8 with hidden frames in packets of their own",
        lambda path: hide_frames(path, {7, 20}, "webm"),
        _SEEN,
        _SEEN_TIMES,
    ),
    Odd("hidden.ivf", "the same as IVF", lambda path: hide_frames(path, {7, 20}, "ivf"), _SEEN, _SEEN_TIMES),
    Odd(
        "recording.webm",
        "a browser's recording: no rate, no duration, uneven times",
        lambda path: make_recording(path, _LATE, coded("libvpx")),
        _ALL,
        [t / 1000 for t in _LATE],
    ),
    Odd(
        "recording_even.webm",
        "the same, evenly",
        lambda path: make_recording(path, range(0, 2400, 40), coded("libvpx")),
        _ALL,
    ),
    Odd(
        "varying.mp4",
        "a rate that varies",
        lambda path: encode(path, numbered(60), fps=30, options=H264, times=_SLOWER),
        _ALL,
        [t / 30 for t in _SLOWER],
        decord=True,
    ),
    Odd(
        "varying.mkv",
        "the same in Matroska",
        lambda path: encode(path, numbered(60), fps=30, options=H264, times=_SLOWER),
        _ALL,
        [t / 30 for t in _SLOWER],
        decord=True,
    ),
    Odd("negative.mkv", "a cut that begins at a negative time", copied(shift=-0.04, options=_NEGATIVE), _ALL),
    Odd("negative_all.mkv", "the first half at negative times", copied(shift=-1.2, options=_NEGATIVE), _ALL),
    Odd("late.mp4", "a start after seven seconds", copied(shift=7), _ALL, decord=True),
    Odd("no_key.mkv", "lost packets before the first key frame", copied(after_seven), _ALL[20:]),
    Odd("no_key.mp4", "the same in MP4", copied(after_seven), _ALL[20:]),
    Odd("no_key.ts", "the same in a transport stream", copied(after_seven), _ALL[20:]),
    Odd("no_key.webm", "the same of VP8", copied(after_seven, data=vp8), _ALL[20:]),
    Odd(
        "lost.mkv",
        "lost packets that nothing depends on",
        copied(lambda index: index not in _LOST),
        _REST,
        [k / 25 for k in _REST],
        decord=True,
    ),
    Odd(
        "trimmed.mp4",
        "an edit list that hides the first pictures, one of them a key frame",
        lambda path: hide_start(path, 23),
        _ALL[23:],
    ),
    Odd("trimmed_little.mp4", "an edit list that hides three pictures", lambda path: hide_start(path, 3), _ALL[3:]),
    Odd("animated.avif", "an animated AVIF", make_pictures, _ALL[:12], [k / 10 for k in range(12)]),
    Odd("animated.webp", "an animated WebP", make_pictures, "cannot be opened"),
    Odd("animated.png", "an animated PNG", make_pictures, "cannot be opened"),
]

# Name -> (display matrix, how numpy says what ffmpeg shows).
MATRICES: dict[str, tuple[tuple[float, float, float, float], Callable[[np.ndarray], np.ndarray]]] = {
    "as it is": ((1, 0, 0, 1), lambda image: image),
    "turned right": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "turned left": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "upside down": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "mirrored left to right": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "mirrored top to bottom": ((1, 0, 0, -1), lambda image: image[::-1]),
    "mirrored and turned right": ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    "mirrored and turned left": ((0, -1, -1, 0), lambda image: image.swapaxes(0, 1)[::-1, ::-1]),
}
