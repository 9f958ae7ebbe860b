"""Pictures and frames of generated clips: a grid that plays, a contact sheet, and a prediction beside the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from ..metrics.pixels import frame_psnr
from .clips import (
    BAR_NOW,
    INK,
    MARGIN,
    MUTED,
    PAPER,
    RULE,
    decibels,
    draw_chart,
    enlarge,
    fitting,
    font,
    over_canvas,
    paste,
    still,
)

if TYPE_CHECKING:
    from ..models.pipeline_evatok import EvatokPipelineOutput

_GAP = 4


@dataclass
class Sample:
    """A generated clip as it is shown.

    Attributes:
        frames: uint8 (F, H, W, 3).
        lengths: tokens of each block.
        label: the class, or other words for it.
        seed: of the sample.
    """

    frames: np.ndarray
    lengths: list[int]
    label: str
    seed: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def samples_of(result: EvatokPipelineOutput) -> list[Sample]:
    """The clips that a pipeline drew, with output_type "np"."""
    rows = zip(result.frames, result.tokens.lengths.tolist(), result.labels, result.seeds, strict=True)
    return [
        Sample((frames * 255).round().astype(np.uint8), lengths, "no class" if label is None else str(label), seed)
        for frames, lengths, label, seed in rows
    ]


class SampleGrid:
    """Frames of a video that plays clips side by side, each with its class and tokens above and its blocks below.

    Args:
        samples: clips of equal size.
        max_length: the largest candidate, which fills a bar.
        columns: clips in a row; None makes a square.
        scale: how many times larger the frames are shown (bicubic); None makes them about 192 pixels wide.
        title: a strip above.

    Attributes:
        size: (height, width) of the whole, both even, as H.264 wants them.

    Raises:
        ValueError: no samples.
    """

    def __init__(
        self, samples: Sequence[Sample], max_length: int, columns: int | None, scale: int | None, title: str
    ) -> None:
        if not samples:
            raise ValueError("a grid needs at least one sample.")
        self._samples, self._max_length, self._title = samples, max_length, title
        self._columns = min(columns or math.ceil(math.sqrt(len(samples))), len(samples))
        height, width = samples[0].frames.shape[1:3]
        scale = scale or max(1, round(192 / width))
        self._frame = (height * scale, width * scale)
        self._head, self._caption, self._chart, gap = 40, 22, 44, 14
        self._cell = (self._caption + self._frame[0] + 22 + self._chart + gap, max(self._frame[1], 128) + gap)
        rows = math.ceil(len(samples) / self._columns)
        tall = self._head + rows * self._cell[0]
        wide = max(self._columns * self._cell[1] + gap, int(font(16).getlength(title)) + 2 * gap)
        self._left = (wide - self._columns * self._cell[1] + gap) // 2
        self.size = (tall + tall % 2, wide + wide % 2)

    def frames(self) -> np.ndarray:
        """The frames of the video, uint8 (F, *size, 3); the bars of the block that a frame belongs to are dark."""
        first = self._samples[0]
        shown = {self._place(i): enlarge(sample.frames, *self._frame) for i, sample in enumerate(self._samples)}
        return over_canvas(self._canvas, len(first.frames) // len(first.lengths), shown)

    def _place(self, index: int) -> tuple[int, int]:
        """Top and left of a clip's frame."""
        row, column = divmod(index, self._columns)
        return self._head + row * self._cell[0] + self._caption, self._left + column * self._cell[1]

    def _canvas(self, now: int) -> Image.Image:
        image = Image.new("RGB", self.size[::-1], PAPER)
        draw = ImageDraw.Draw(image)
        draw.text((self._left, self._head / 2), self._title, fill=INK, font=font(16), anchor="lm")
        for index, sample in enumerate(self._samples):
            top, left = self._place(index)
            wide = self._cell[1] - 14
            line = fitting(font(13), wide, f"{sample.label}, {sample.tokens} tokens", f"{sample.tokens} tokens")
            draw.text((left, top - 5), line, fill=MUTED, font=font(13), anchor="ld")
            y = top + self._frame[0] + 22
            place = (left, y, left + self._frame[1], y + self._chart)
            draw_chart(draw, sample.lengths, self._max_length, place, font(12), now)
        return image


def contact_sheet(
    samples: Sequence[Sample],
    max_length: int,
    title: str,
    subtitle: str = "",
    cell: int = 80,
    frames_per_block: int = 2,
    samples_per_row: int = 1,
) -> Image.Image:
    """A still with rows of samples: their class, a few frames of each block, and a bar of each block's tokens.

    Args:
        samples: clips of equal size.
        max_length: the largest candidate, which has the longest bar.
        title, subtitle: two lines above.
        cell: width of a frame in the picture, pixels.
        frames_per_block: evenly spaced frames that are shown of each block.
        samples_per_row: samples of a class, one after another, that stand in one row.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("a contact sheet needs at least one sample.")
    classes = [list(group) for _, group in groupby(samples, lambda sample: sample.label)]
    rows = [group[i : i + samples_per_row] for group in classes for i in range(0, len(group), samples_per_row)]
    height, width = samples[0].frames.shape[1:3]
    tall, blocks = max(1, round(cell * height / width)), len(samples[0].lengths)
    per_block = len(samples[0].frames) // blocks
    labels = max(int(font(15).getlength(words)) for words in (*(one.label for one in samples), "1000 tokens")) + 16
    group, step = frames_per_block * (cell + _GAP) + 8, tall + 34  # of a block, of a row
    most = max(map(len, rows))
    image, draw, head = still(title, subtitle, labels + most * (blocks * group + 14) - 14, len(rows) * step)
    for number, row in enumerate(rows):
        top = head + number * step
        draw.text((MARGIN, top + tall / 2 - 10), row[0].label, fill=INK, font=font(15), anchor="lm")
        mean = f"{sum(sample.tokens for sample in row) / len(row):.0f} tokens"
        draw.text((MARGIN, top + tall / 2 + 10), mean, fill=MUTED, font=font(13), anchor="lm")
        for place, sample in enumerate(row):
            for block, length in enumerate(sample.lengths):
                left = MARGIN + labels + place * (blocks * group + 14) + block * group
                for k in range(frames_per_block):
                    frame = block * per_block + (2 * k + 1) * per_block // (2 * frames_per_block)
                    paste(image, sample.frames[frame], left + k * (cell + _GAP), top, cell, tall)
                _lying_bar(draw, length, max_length, left, top + tall + 6, group - 44)
    return image


def prediction_picture(
    prediction: np.ndarray,
    truth: np.ndarray | None,
    known: int,
    lengths: Sequence[int],
    max_length: int,
    title: str,
    subtitle: str = "",
) -> Image.Image:
    """A still of a prediction, above it the truth as far as there is one, and a bar of each block's tokens.

    Under a frame that there is in truth stands its PSNR.

    Args:
        prediction: uint8 (F, H, W, 3), beginning with the known frames.
        truth: uint8 (f, H, W, 3), the same frames in truth, or None.
        known: how many frames are known; the last of them is the first that is shown.
        lengths: tokens of each block of the clip.
        max_length: the largest candidate.
        title, subtitle: two lines above.
    """
    count = len(prediction)
    places = np.linspace(known - 1, count - 1, min(8, count - known + 1)).round().astype(int).tolist()
    height, width = prediction.shape[1:3]
    cell = 96  # width of a frame in the picture, pixels
    tall = max(1, round(cell * height / width))
    rows = [("prediction", prediction)] if truth is None else [("truth", truth), ("prediction", prediction)]
    labels, wide = 96, 96 + len(places) * (cell + _GAP)
    image, draw, head = still(title, subtitle, wide, 20 + len(rows) * (tall + _GAP) + 70)
    head += 20
    for column, place in enumerate(places):
        x = MARGIN + labels + column * (cell + _GAP)
        words = f"frame {place + 1}" + (", known" if place < known else "")
        draw.text((x, head - 5), words, fill=MUTED, font=font(13), anchor="ld")
        for row, (_, frames) in enumerate(rows):
            if place < len(frames):
                paste(image, frames[place], x, head + row * (tall + _GAP), cell, tall)
        if truth is not None and known <= place < len(truth):
            y = head + len(rows) * (tall + _GAP) + 2
            words = decibels(frame_psnr(truth[place], prediction[place]))
            draw.text((x + cell / 2, y), words, fill=MUTED, font=font(13), anchor="ma")
    for row, (name, _) in enumerate(rows):
        y = head + row * (tall + _GAP) + tall / 2
        draw.text((MARGIN, y), name, fill=INK, font=font(15), anchor="lm")
    y = head + len(rows) * (tall + _GAP) + 28
    draw.line((MARGIN, y, MARGIN + wide, y), fill=RULE)
    draw.text((MARGIN, y + 20), "tokens", fill=INK, font=font(15), anchor="lm")
    step = (wide - labels) / len(lengths)
    for block, length in enumerate(lengths):
        left = round(MARGIN + labels + block * step)
        _lying_bar(draw, length, max_length, left, round(y + 14), round(step) - 44)
    return image


def _lying_bar(draw: ImageDraw.ImageDraw, length: int, most: int, left: int, top: int, wide: int) -> None:
    """A bar to the right, its number behind it."""
    end = left + max(2, round(wide * length / most))
    draw.rectangle((left, top, end, top + 10), fill=BAR_NOW)
    draw.text((end + 5, top + 5), str(length), fill=INK, font=font(13), anchor="lm")
