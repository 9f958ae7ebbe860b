"""Small videos made on the spot, so that the tests need no files from outside."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from evatok_hf.video.codecs import usual_priority

# Name -> (extension, encoder, pixel format, options).
FORMATS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "mp4": (".mp4", "libx264", "yuv420p", {"crf": "10", "bf": "2"}),
    "avi": (".avi", "mpeg4", "yuv420p", {"qmin": "2", "qmax": "2"}),
    "mkv": (".mkv", "libx264", "yuv420p", {"crf": "10"}),
    "webm": (".webm", "libvpx-vp9", "yuv420p", {"crf": "10", "b": "0", "deadline": "realtime", "cpu-used": "8"}),
    "mpg": (".mpg", "mpeg1video", "yuv420p", {}),
    "gif": (".gif", "gif", "rgb8", {}),
}


def moving_frames(frames: int = 24, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (F, H, W, 3): a smooth gradient with a bright square that moves, and brightness that names the frame."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    video = np.empty((frames, height, width, 3), dtype=np.uint8)
    for f in range(frames):
        video[f, ..., 0] = 255 * x / max(width - 1, 1)
        video[f, ..., 1] = 255 * y / max(height - 1, 1)
        video[f, ..., 2] = 20 + (f * 9) % 200
        left, top = (3 * f) % max(width - 8, 1), (2 * f) % max(height - 8, 1)
        video[f, top : top + 8, left : left + 8] = 255
    return video


def encode(
    path: Path | str,
    frames: np.ndarray,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: float = 25,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    format: str | None = None,
    times: list[int] | None = None,
    rotation: int | None = None,
) -> Path:
    """Encode uint8 (F, H, W, 3) straight through PyAV, independent of the code under test.

    `times` gives each frame's presentation time in units of 1/fps, for a variable frame rate; `rotation` is written
    as metadata, in degrees counterclockwise.
    """
    rate = Fraction(fps).limit_denominator(1001)
    with (
        usual_priority(),
        av.open(str(path), "w", format=format, options=container_options or {}) as container,
    ):
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.time_base = 1 / rate
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = i if times is None else times[i]
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def make_video(folder: Path, name: str = "mp4", frames: np.ndarray | None = None, fps: float = 25) -> Path:
    """A video of one of `FORMATS`, named `clip.<extension>`."""
    extension, codec, pix_fmt, options = FORMATS[name]
    video = moving_frames() if frames is None else frames
    return encode(folder / f"clip{extension}", video, codec, pix_fmt, fps, options)


def make_audio_only(path: Path) -> Path:
    """An mp4 with a second of sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for i in range(40):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            frame.pts = i * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
