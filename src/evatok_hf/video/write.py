"""Writes video files frame by frame in constant memory, through PyAV (FFmpeg)."""

from __future__ import annotations

import importlib
import math
import os
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..models.files_evatok import Replacement, is_special


class VideoWriteError(ValueError):
    """The error of a video that cannot be written; one line with the file, the cause and what to do."""


# FFmpeg's names of the container and of the codec.
FORMATS = {
    ".mp4": ("mp4", "libx264"),
    ".mkv": ("matroska", "libx264"),
    ".webm": ("webm", "libvpx-vp9"),
    ".avi": ("avi", "mpeg4"),
    ".mpg": ("mpeg", "mpeg2video"),
    ".gif": ("gif", "gif"),
}
# Encoders that keep RGB exactly, if they are given RGB.
_LOSSLESS = {"ffv1", "libx264rgb", "huffyuv", "ffvhuff", "utvideo", "png"}


class VideoWriter(AbstractContextManager):
    """Writes one video; a context manager.

    The container is chosen by the extension: .mp4 and .mkv hold H.264, .webm VP9, .avi MPEG-4, .mpg MPEG-2, .gif a
    palette of its own for each frame. Frames go to a temporary file beside the target, which takes the target's place
    when the block ends without an exception; until then, and if it fails, an earlier file stays as it was. To a pipe, a
    device or "-", standard output, it is copied then, as .mp4 where the name has no extension. Encoding
    uses one thread, so that the same frames give the same file on machines with different numbers of cores.

    Args:
        path: the file to write; its folder must exist.
        fps: frames a second; 23.98, 29.97 and the like become the NTSC fractions, 30000/1001 for 29.97.
        height, width: size in pixels. H.264 halves its colour planes, which needs even sides; a video with an odd side
            keeps full colour instead (yuv444p), which some players cannot show.
        codec: an FFmpeg encoder instead of the extension's own, for example "libx265", or "ffv1" (lossless, .mkv).
        crf: quality, 0 (best) to 51; 12 is hard to tell from the original. For MPEG-2 and MPEG-4 it becomes the
            quantiser of about the same step. A GIF and lossless codecs have no use for it.

    Raises:
        ValueError: for an extension, rate, size, codec or quality that cannot be written, before anything is touched.
        VideoWriteError: if the folder cannot be written to, or encoding fails.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float,
        height: int,
        width: int,
        codec: str | None = None,
        crf: int = 12,
    ) -> None:
        self.path = Path(path)
        self.height, self.width = int(height), int(width)
        suffix = self.path.suffix or (".mp4" if is_special(path) else "")
        if suffix.lower() not in FORMATS:
            raise ValueError(
                f"{path}: no video format for the extension {self.path.suffix!r}: use one of {', '.join(FORMATS)}"
            )
        container, usual = FORMATS[suffix.lower()]
        if self.height < 1 or self.width < 1:
            raise ValueError(f"{path}: a video of {height}x{width} pixels: give a positive height and width")
        if not 0 <= crf <= 51:
            raise ValueError(f"{path}: crf is {crf}: give 0 (best) to 51 (smallest)")
        self.rate = frame_rate(fps)
        try:
            self._av = importlib.import_module("av")
        except ImportError as error:
            raise VideoWriteError(f"{path}: writing video needs PyAV: pip install av") from error
        name = codec or usual
        try:
            encoder = self._av.codec.Codec(name, "w")
        except self._av.codec.codec.UnknownCodecError as error:
            mend = f"leave codec out for {usual}"
            raise ValueError(f"{path}: FFmpeg has no encoder {name!r} here: {mend}") from error
        self._check_rate(container, encoder)

        try:
            self._output = Replacement(path)
        except ValueError as error:
            raise VideoWriteError(str(error)) from error
        self.frames_written = 0
        self._container: Any = None
        self._graph: Any = None
        try:
            self._open(container, name, encoder, crf)
        except BaseException as error:
            self.abort()
            if isinstance(error, (self._av.FFmpegError, ValueError)):
                raise VideoWriteError(
                    f"{path}: {name} cannot encode {height}x{width} at {self.rate} fps as {container} "
                    f"({error}): choose another size, codec or extension"
                ) from error
            raise

    def _check_rate(self, container: str, encoder: Any) -> None:
        if container == "gif" and self.rate > 50:
            raise ValueError(f"{self.path}: a GIF shows at most 50 fps, not {float(self.rate):g}: use .mp4, or less")
        allowed = [Fraction(rate.numerator, rate.denominator) for rate in encoder.frame_rates or ()]
        if allowed and self.rate not in allowed:
            nearest = min(allowed, key=lambda rate: abs(rate - self.rate))
            raise ValueError(
                f"{self.path}: {encoder.name} has no {float(self.rate):g} fps, the nearest it has is "
                f"{float(nearest):.6g}: use that, or another extension"
            )

    def _open(self, container: str, name: str, encoder: Any, crf: int) -> None:
        options = {"crf": str(crf)}
        if name in ("mpeg4", "mpeg2video", "mpeg1video"):
            # H.264's step doubles every 6 crf, these codecs' is linear in the quantiser: 12 -> 2, 18 -> 4, 24 -> 8.
            scale = min(31, max(1, round(2 ** ((crf - 6) / 6))))
            options = {"qmin": str(scale), "qmax": str(scale)}
        elif name == "libvpx-vp9":
            options |= {"b": "0", "deadline": "good", "cpu-used": "4"}
        elif name == "libx264":
            # At the same crf, veryfast looks as the default preset does, in less than half its time and a tenth more
            # bytes. The macroblock-tree look-ahead makes different files of the same frames from run to run.
            options |= {"preset": "veryfast", "x264-params": "mbtree=0"}
        elif "x26" not in name:
            options = {}
        # the index goes to the front, so that a browser plays the file before it is all there
        muxer = {"movflags": "+faststart"} if container == "mp4" else {}
        self._container = self._av.open(str(self._output.partial), "w", format=container, options=muxer)
        self._stream = self._container.add_stream(name, rate=self.rate, options=options)
        self._stream.height, self._stream.width = self.height, self.width
        self._stream.time_base = 1 / self.rate
        formats = [f.name for f in encoder.video_formats or ()]
        odd = self.height % 2 or self.width % 2
        wanted = ("yuv444p", "yuv420p") if odd and "x26" in name else ("yuv420p", "pal8")
        if name in _LOSSLESS:
            wanted = ("bgr0", "rgb24", "bgr24", "gbrp")
        self._stream.pix_fmt = next((f for f in wanted if f in formats), formats[0] if formats else "yuv420p")
        self._stream.codec_context.thread_count = 1
        if self._stream.pix_fmt == "pal8":
            self._graph = self._palette_graph()
        self._stream.codec_context.open()

    def _palette_graph(self) -> Any:
        """RGB -> 256 colours chosen anew for every frame, so that no second pass over the video is needed."""
        graph = self._av.filter.Graph()
        source = graph.add_buffer(width=self.width, height=self.height, format="rgb24", time_base=1 / self.rate)
        split = graph.add("split")
        palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
        use, sink = graph.add("paletteuse", "new=1"), graph.add("buffersink")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(use, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        return graph

    def write(self, frames: np.ndarray) -> None:
        """Appends uint8 frames (F, H, W, 3).

        Raises:
            ValueError: for another type or shape.
            VideoWriteError: if encoding fails (a full disk, for one) or the video was closed.
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"{self.path}: got {frames.dtype} frames of shape {frames.shape}: "
                f"give uint8 (F, {self.height}, {self.width}, 3)"
            )
        if self._container is None:
            raise VideoWriteError(f"{self.path}: the video was closed: make a new VideoWriter")
        try:
            for image in frames:
                frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts, frame.time_base = self.frames_written, 1 / self.rate
                if self._graph is not None:
                    self._graph.push(frame)
                    frame = self._graph.pull()
                else:
                    frame = frame.reformat(format=self._stream.pix_fmt, threads=1)
                self._container.mux(self._stream.encode(frame))
                self.frames_written += 1
        except (self._av.FFmpegError, OSError) as error:
            raise VideoWriteError(f"{self.path}: encoding failed ({error}): is the disk full?") from error

    def close(self) -> None:
        """Finishes the file and puts it in place; closing twice is fine.

        Raises:
            VideoWriteError: if nothing was written, or the file cannot be finished; the target is left as it was.
        """
        if self._container is None:
            return
        try:
            if self.frames_written == 0:
                raise VideoWriteError(f"{self.path}: no frame was written: write at least one")
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._container = None
            self._output.commit()
        except BrokenPipeError:
            raise
        except (self._av.FFmpegError, OSError) as error:
            raise VideoWriteError(f"{self.path}: cannot be finished ({error}): is the disk full?") from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Gives up: removes what was written so far and leaves the target as it was."""
        container, self._container, self._graph = self._container, None, None
        try:
            if container is not None:
                container.close()
        except self._av.FFmpegError:
            pass  # it cannot write its trailer: the file goes away anyhow
        finally:
            self._output.discard()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def frame_rate(fps: float) -> Fraction:
    """Frames a second as the fraction that containers store: 29.97 -> 30000/1001, 12.5 -> 25/2.

    Raises:
        ValueError: unless 0.01 <= fps <= 1000.
    """
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        raise ValueError(f"fps is {fps}: give a number of frames a second from 0.01 to 1000")
    whole = round(fps * 1.001)
    ntsc = Fraction(whole * 1000, 1001)
    if whole >= 10 and fps != round(fps) and abs(fps - ntsc) < 0.005:
        return ntsc
    return Fraction(fps).limit_denominator(1001)


def write_video(
    path: str | os.PathLike[str], frames: np.ndarray, fps: float, codec: str | None = None, crf: int = 12
) -> None:
    """Writes uint8 frames (F, H, W, 3) in one go; see `VideoWriter` for formats and errors."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or len(frames) == 0:
        raise ValueError(f"{path}: got frames of shape {frames.shape}: give at least one, uint8 (F, H, W, 3)")
    with VideoWriter(path, fps, frames.shape[1], frames.shape[2], codec=codec, crf=crf) as writer:
        writer.write(frames)
