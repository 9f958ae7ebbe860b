"""Limits on the size of an uploaded video, checked on its file and its header, before anything is decoded."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..video.read import VideoHeader


class UploadError(ValueError):
    """An upload that is refused; one line with the cause and what to do."""


@dataclass(frozen=True)
class Limits:
    """Limits on what is taken of strangers. The defaults keep the slowest answer under 20 seconds on two cores.

    Attributes:
        megabytes: size of the file, 10^6 bytes.
        store: size of all uploads and results that are kept, 10^6 bytes; the oldest go first.
        seconds: length of the video.
        frames: frames of the video.
        side: height and width, pixels.
        megapixels: all frames together, 10^6 pixels.
        patience: seconds that the process which reads a file may let one wait, and may use of a processor.
        memory: bytes of memory of that process.
    """

    megabytes: int = 100
    store: int = 2000
    seconds: float = 12.0
    frames: int = 300
    side: int = 1920
    megapixels: int = 200
    patience: float = 20.0
    memory: int = 1536 << 20

    def check_file(self, path: str | os.PathLike[str]) -> None:
        """Raises `UploadError` for a file that is not there or empty; how large it may be, its request was asked."""
        try:
            size = Path(path).stat().st_size
        except OSError as error:
            raise UploadError("the upload is no longer there: upload the video again") from error
        if size == 0:
            raise UploadError("the file is empty (0 bytes): upload it again")

    def check_header(self, header: VideoHeader) -> None:
        """Raises `UploadError` for a video that would be too large, or whose frame rate is none."""
        if header.num_frames < 1:
            raise UploadError("the video has no frames: export it again")
        if not (math.isfinite(header.fps) and 0.1 <= header.fps <= 240):
            raise UploadError(
                f"it has {header.fps:.4g} frames a second, 0.1 to 240 are taken: export it with a usual rate"
            )
        self.check_size(header.height, header.width)
        seconds = header.num_frames / header.fps
        if seconds > self.seconds + 1 / header.fps:
            raise UploadError(
                f"the video is {seconds:.1f} seconds long, at most {self.seconds:g} seconds are taken: cut it to a "
                "shorter part"
            )
        if header.num_frames > self.frames:
            raise UploadError(
                f"the video has {header.num_frames} frames, at most {self.frames} are taken: cut it, or lower its rate"
            )
        pixels = header.num_frames * header.height * header.width / 10**6
        if pixels > self.megapixels:
            raise UploadError(
                f"{header.num_frames} frames of {header.width} x {header.height} are {pixels:.0f} megapixels, at most "
                f"{self.megapixels} are taken: make the video smaller, or cut it"
            )

    def check_size(self, height: int, width: int) -> None:
        """Raises `UploadError` for frames that are too large, or have no pixels."""
        if height < 1 or width < 1:
            raise UploadError("its header says no size: export the video again")
        if max(height, width) > self.side:
            raise UploadError(
                f"its frames are {width} x {height}, at most {self.side} pixels a side are taken: make it smaller"
            )

    def check_count(self, frames: int) -> None:
        """Raises `UploadError` where more frames come out of a file than its header had."""
        if frames > self.frames:
            raise UploadError(f"it has more than {self.frames} frames, though its header says less: export it again")
