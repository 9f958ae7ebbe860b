"""The two files that the app shows of a result: a video, in which both halves are always in step, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..models.configuration_evatok import EvatokConfig
from ..pictures.clips import (
    BAR_NOW,
    INK,
    MUTED,
    PAPER,
    SideBySide,
    comparison_picture,
    enlarge,
    font,
    save_picture,
    spread,
)
from ..pictures.samples import Sample, SampleGrid, contact_sheet, prediction_picture
from ..video.read import VideoWriter
from .jobs import Continuation, Reconstruction

# Frames are enlarged to about so many pixels.
_SHOWN = 256
_CLIPS_IN_PICTURE = 3


def reconstruction(
    folder: Path, done: Reconstruction, config: EvatokConfig, fps: float, title: str, subtitle: str
) -> tuple[Path, Path]:
    """Writes original and reconstruction side by side in one video, the tokens of each block under them; and a picture,
    one frame of each block of up to three clips, spread over the video, with its tokens under it."""
    video, picture = folder / "side-by-side.mp4", folder / "blocks.png"
    side, most = config.image_size, max(config.block_lengths)
    both = SideBySide(side, side, most, config.num_frames, max(1, round(_SHOWN / side)))
    with VideoWriter(video, fps, *both.size) as writer:
        for clip in done.clips:
            writer.write(both.frames(clip))
    clips = [done.clips[index] for index in sorted(spread(len(done.clips), _CLIPS_IN_PICTURE))]
    save_picture(comparison_picture(clips, most, config.num_frames, title, subtitle), picture)
    return video, picture


def generation(
    folder: Path, samples: Sequence[Sample], config: EvatokConfig, fps: float, title: str, subtitle: str
) -> tuple[Path, Path]:
    """Writes all clips in a grid as one video; and a picture, a row a clip, frames of each block with its tokens under
    them."""
    video, picture, most = folder / "clips.mp4", folder / "clips.png", max(config.block_lengths)
    grid = SampleGrid(samples, most, None, None, title)
    with VideoWriter(video, fps, *grid.size) as writer:
        writer.write(grid.frames())
    save_picture(contact_sheet(samples, most, title, subtitle), picture)
    return video, picture


def continuation(
    folder: Path, done: Continuation, config: EvatokConfig, fps: float, title: str, subtitle: str
) -> tuple[Path, Path]:
    """Writes a video, known frames in a grey frame, predicted ones in a blue one, the true ones beside them where there
    are any; and a picture, a row of frames, the true ones above them, and the tokens of the first clip."""
    video, picture = folder / "continued.mp4", folder / "continued.png"
    view = _KnownAndPredicted(done, max(1, round(_SHOWN / config.image_size)))
    with VideoWriter(video, fps, *view.size) as writer:
        for index in range(len(done.frames)):
            writer.write(view.frame(index)[None])
    lengths, most = done.tokens.lengths[0].tolist(), max(config.block_lengths)
    save_picture(prediction_picture(done.frames, done.truth, done.known, lengths, most, title, subtitle), picture)
    return video, picture


class _KnownAndPredicted:
    """Frames of the video of a continuation; `size` is (height, width), both even, as H.264 wants them."""

    _EDGE, _HEAD, _GAP = 6, 30, 8

    def __init__(self, done: Continuation, scale: int) -> None:
        self._done = done
        height, width = done.frames.shape[1:3]
        self._frame = (height * scale, width * scale)
        halves = 1 if done.truth is None else 2
        wide = max(halves * (self._frame[1] + 2 * self._EDGE) + (halves - 1) * self._GAP, 200)
        tall = self._HEAD + self._frame[0] + 2 * self._EDGE
        self.size = (tall + tall % 2, wide + wide % 2)

    def frame(self, index: int) -> np.ndarray:
        """uint8 (*size, 3)."""
        done = self._done
        known = index < done.known
        image = Image.new("RGB", self.size[::-1], PAPER)
        draw = ImageDraw.Draw(image)
        left = 0
        if done.truth is not None:
            self._half(image, draw, left, done.truth[index] if index < len(done.truth) else None, "truth", MUTED)
            left = self._frame[1] + 2 * self._EDGE + self._GAP
        what = "known" if known else "predicted"
        colour = MUTED if known else BAR_NOW
        self._half(image, draw, left, done.frames[index], f"frame {index + 1}: {what}", colour)
        return np.asarray(image)

    def _half(self, image: Image.Image, draw: ImageDraw.ImageDraw, left: int, frame, words: str, colour: str) -> None:
        tall, wide = self._frame
        outer = (left, self._HEAD, left + wide + 2 * self._EDGE - 1, self._HEAD + tall + 2 * self._EDGE - 1)
        draw.text((left + self._EDGE, self._HEAD / 2), words, fill=INK, font=font(15), anchor="lm")
        if frame is None:
            draw.text((left + self._EDGE, self._HEAD + 20), "the video has ended", fill=MUTED, font=font(15))
            return
        draw.rectangle(outer, fill=colour)
        image.paste(Image.fromarray(enlarge(frame[None], tall, wide)[0]), (left + self._EDGE, self._HEAD + self._EDGE))
