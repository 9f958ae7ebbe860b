"""The files that the app shows: videos in which both halves are always in step, and pictures."""

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


def reconstruction_video(path: Path, done: Reconstruction, config: EvatokConfig, fps: float) -> None:
    """Original and reconstruction side by side in one video, the tokens of each block under them."""
    side = config.image_size
    both = SideBySide(side, side, max(config.block_lengths), config.num_frames, max(1, round(_SHOWN / side)))
    with VideoWriter(path, fps, *both.size) as writer:
        for clip in done.clips:
            writer.write(both.frames(clip))


def reconstruction_picture(path: Path, done: Reconstruction, config: EvatokConfig, title: str, subtitle: str) -> None:
    """One frame of each block of up to three clips, spread over the video, with its tokens under it."""
    clips = [done.clips[index] for index in sorted(spread(len(done.clips), _CLIPS_IN_PICTURE))]
    save_picture(comparison_picture(clips, max(config.block_lengths), config.num_frames, title, subtitle), path)


def generation_video(path: Path, samples: Sequence[Sample], config: EvatokConfig, fps: float, title: str) -> None:
    """All clips in a grid."""
    grid = SampleGrid(samples, max(config.block_lengths), None, None, title)
    with VideoWriter(path, fps, *grid.size) as writer:
        writer.write(grid.frames())


def generation_picture(path: Path, samples: Sequence[Sample], config: EvatokConfig, title: str, subtitle: str) -> None:
    """A row a clip, frames of each block with its tokens under them."""
    save_picture(contact_sheet(samples, max(config.block_lengths), title, subtitle), path)


def continuation_video(path: Path, done: Continuation, config: EvatokConfig, fps: float) -> None:
    """Known frames in a grey frame, predicted ones in a blue one, the true ones beside them where there are any."""
    view = _KnownAndPredicted(done, max(1, round(_SHOWN / config.image_size)))
    with VideoWriter(path, fps, *view.size) as writer:
        for index in range(len(done.frames)):
            writer.write(view.frame(index)[None])


def continuation_picture(path: Path, done: Continuation, config: EvatokConfig, title: str, subtitle: str) -> None:
    """A row of frames, the true ones above them where there are any, and the tokens of the first clip."""
    lengths, most = done.tokens.lengths[0].tolist(), max(config.block_lengths)
    save_picture(prediction_picture(done.frames, done.truth, done.known, lengths, most, title, subtitle), path)


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
