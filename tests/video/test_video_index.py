"""Whatever was cut away, lost or moved in a video: its index is what decoding everything gives."""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_videos import H264, HEVC, SIDE, coded, numbers

from evatok_hf.video.read import VideoReadError, open_video

COUNT = 40
CODECS = {
    "h264": lambda: coded("libx264", COUNT, **{**H264, "g": "12"}),
    "h264 without B-frames": lambda: coded("libx264", COUNT, crf="12", g="12", bf="0"),
    "hevc": lambda: coded("libx265", COUNT, **{"x265-params": HEVC["x265-params"].replace("keyint=20", "keyint=12")}),
    "mpeg4": lambda: coded("mpeg4", COUNT, g="12", bf="2"),
    "vp8": lambda: coded("libvpx", COUNT, g="12", deadline="realtime"),
    "mjpeg": lambda: coded("mjpeg", COUNT, strict="unofficial"),
}


@st.composite
def changes(draw: st.DrawFn) -> dict:
    """What happens to a video: which packets are left, when its pictures are shown, and what else is in the file."""
    start, end = draw(st.integers(0, 15)), draw(st.integers(25, COUNT))
    lost = draw(st.sets(st.integers(0, COUNT - 1), max_size=4))
    kept = [index for index in range(start, end) if index not in lost]
    even = draw(st.booleans())
    gaps = [40] * COUNT if even else draw(st.lists(st.integers(15, 130), min_size=COUNT, max_size=COUNT))
    return {
        "codec": draw(st.sampled_from(sorted(CODECS))),
        "container": draw(st.sampled_from([".mkv", ".mp4", ".ts", ".avi"])),
        "kept": kept,
        "times": (draw(st.integers(0, 3000)) + np.cumsum([0, *gaps[1:]])).tolist(),  # ms
        "first": draw(st.sampled_from(["nothing", "sound", "preview"])),
        "wanted": draw(st.lists(st.integers(0, 1000), min_size=1, max_size=6)),
    }


def write(path: Path, change: dict) -> None:
    """The packets that are left, at their new times, behind what comes first in the file."""
    unit = Fraction(1, 1000)
    with av.open(io.BytesIO(CODECS[change["codec"]]())) as source:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        order = np.argsort(np.argsort([packet.pts for packet in packets]))
        shown = [change["times"][number] for number in order]
        decoded = np.minimum.accumulate(shown[::-1])[::-1] - 2 * np.arange(len(shown))[::-1] - 2
        with av.open(str(path), "w") as target:
            other = None
            if change["first"] == "sound":
                other = target.add_stream("mp2", rate=44100, layout="mono")
            elif change["first"] == "preview":
                other = target.add_stream("mpeg4", rate=25)
                other.width, other.height, other.pix_fmt = 16, 16, "yuv420p"
            copy = target.add_stream_from_template(stream)
            if other is not None:
                frame = av.VideoFrame(16, 16, "yuv420p")
                if change["first"] == "sound":
                    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
                    frame.sample_rate = 44100
                frame.pts = 0
                target.mux([*other.encode(frame), *other.encode(None)])
            for index in change["kept"]:
                packet = packets[index]
                packet.time_base, packet.stream = unit, copy
                packet.pts, packet.dts = shown[index], int(decoded[index])
                target.mux(packet)


def decode_everything(path: Path) -> tuple[list[np.ndarray], list[float | None]]:
    """Pictures and times of the larger video, by PyAV's simplest means."""
    with av.open(str(path)) as container:
        stream = next(stream for stream in container.streams.video if stream.codec_context.width == SIDE)
        images, times = [], []
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if images:
                    raise
                continue  # before the first key frame
            for frame in frames:
                images.append(frame.to_ndarray(format="rgb24"))
                times.append(None if frame.pts is None else float(frame.pts * frame.time_base))
    return images, times


CALM = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=30, **CALM)
@given(changes())
def test_the_index_is_what_decoding_everything_gives(change: dict) -> None:
    compare(change)


@pytest.mark.slow
@settings(max_examples=400, **CALM)
@given(changes())
def test_the_index_is_what_decoding_everything_gives_at_length(change: dict) -> None:
    compare(change)


def compare(change: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"it{change['container']}"
        try:
            write(path, change)
        except (av.FFmpegError, ValueError):  # not a codec or time that this container takes
            return
        try:
            images, times = decode_everything(path)
        except StopIteration:  # nor is it found again in this container
            return
        except av.FFmpegError:
            images = []
        if not images:
            with pytest.raises(VideoReadError):
                list(open_video(path).iter_chunks(8))
            return
        for reader in ("auto", "pyav"):
            with open_video(path, reader) as video:
                assert video.num_frames == len(images)
                np.testing.assert_array_equal(np.concatenate(list(video.iter_chunks(16))), np.stack(images))
                wanted = [number % len(images) for number in change["wanted"]]
                np.testing.assert_array_equal(video.read(wanted), np.stack([images[i] for i in wanted]))
                if None in times or len(times) < 2 or (np.diff(times) <= 0).any():
                    continue
                found = video.times()
                truth = np.array(times) - times[0]
                found = np.arange(len(images)) / video.fps if found is None else found
                if len(images) == len(change["kept"]):
                    assert video.fps == pytest.approx((len(images) - 1) / truth[-1], rel=0.02)
                np.testing.assert_allclose(found, truth, atol=0.2 / video.fps + 0.0011)
                shown = np.concatenate(list(video.iter_chunks(16, fps=7)))
                for k, image in enumerate(shown):
                    number = numbers([image])[0]
                    nearest = np.abs(truth - k / 7).min() + 0.2 / video.fps + 0.0011
                    assert any(
                        number == numbers([images[i]])[0] for i in np.flatnonzero(np.abs(truth - k / 7) <= nearest)
                    )
