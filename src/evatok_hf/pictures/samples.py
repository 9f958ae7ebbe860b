"""Pictures and frames of generated clips: a grid that plays, a contact sheet, and a prediction beside the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .clips import _BAR, _BAR_NOW, _INK, _MUTED, _PAPER, _RULE, _draw_bar, enlarge

_MARGIN, _GAP = 28, 4


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


class SampleGrid:
    """Frames of a video that plays clips side by side, each with its class and tokens above and its blocks below.

    Args:
        samples: clips of equal size.
        max_length: the largest candidate, which fills a bar.
        columns: clips in a row.
        scale: how many times larger the frames are shown (bicubic).
        title: a strip above.

    Attributes:
        size: (height, width) of the whole, both even, as H.264 wants them.

    Raises:
        ValueError: no samples.
    """

    def __init__(self, samples: Sequence[Sample], max_length: int, columns: int, scale: int, title: str):
        if not samples:
            raise ValueError("a grid needs at least one sample.")
        self._samples, self._max_length, self._title = samples, max_length, title
        self._columns = min(columns, len(samples))
        height, width = samples[0].frames.shape[1:3]
        self._frame = (height * scale, width * scale)
        self._fonts = {size: ImageFont.load_default(size=size) for size in (12, 13, 16)}
        self._head, self._caption, self._chart, gap = 40, 22, 44, 14
        self._cell = (self._caption + self._frame[0] + 22 + self._chart + gap, max(self._frame[1], 128) + gap)
        rows = math.ceil(len(samples) / self._columns)
        tall = self._head + rows * self._cell[0]
        wide = max(self._columns * self._cell[1] + gap, int(self._fonts[16].getlength(title)) + 2 * gap)
        self._left = (wide - self._columns * self._cell[1] + gap) // 2
        self.size = (tall + tall % 2, wide + wide % 2)

    def frames(self) -> np.ndarray:
        """uint8 (F, *size, 3); the bars of the block that a frame belongs to are dark."""
        count = len(self._samples[0].frames)
        per_block = count // len(self._samples[0].lengths)
        shown = [enlarge(sample.frames, *self._frame) for sample in self._samples]
        out = np.empty((count, *self.size, 3), dtype=np.uint8)
        for f in range(count):
            if f % per_block == 0:
                canvas = np.asarray(self._canvas(f // per_block))
            out[f] = canvas
            for index, frames in enumerate(shown):
                top, left = self._place(index)
                out[f, top : top + self._frame[0], left : left + self._frame[1]] = frames[f]
        return out

    def _place(self, index: int) -> tuple[int, int]:
        """Top and left of a clip's frame."""
        row, column = divmod(index, self._columns)
        return self._head + row * self._cell[0] + self._caption, self._left + column * self._cell[1]

    def _canvas(self, now: int) -> Image.Image:
        image = Image.new("RGB", self.size[::-1], _PAPER)
        draw = ImageDraw.Draw(image)
        draw.text((self._left, self._head / 2), self._title, fill=_INK, font=self._fonts[16], anchor="lm")
        for index, sample in enumerate(self._samples):
            top, left = self._place(index)
            wide = self._cell[1] - 14
            line = _fit(f"{sample.label}, {sample.tokens} tokens", f"{sample.tokens} tokens", self._fonts[13], wide)
            draw.text((left, top - 5), line, fill=_MUTED, font=self._fonts[13], anchor="ld")
            y, step = top + self._frame[0] + 22, self._frame[1] / len(sample.lengths)
            for block, length in enumerate(sample.lengths):
                colour = _BAR_NOW if block == now else _BAR
                x = left + block * step
                _draw_bar(draw, length, self._max_length, x, y, step, self._chart, self._fonts[12], colour)
            draw.line((left, y + self._chart, left + self._frame[1], y + self._chart), fill=_MUTED)
        return image


def contact_sheet(
    samples: Sequence[Sample],
    max_length: int,
    title: str,
    subtitle: str = "",
    cell: int = 80,
    frames_per_block: int = 2,
) -> Image.Image:
    """A still with a row a sample: its class, a few frames of each block, and a bar of each block's tokens.

    Args:
        samples: clips of equal size.
        max_length: the largest candidate, which has the longest bar.
        title, subtitle: two lines above.
        cell: width of a frame in the picture, pixels.
        frames_per_block: evenly spaced frames that are shown of each block.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("a contact sheet needs at least one sample.")
    height, width = samples[0].frames.shape[1:3]
    tall, blocks = max(1, round(cell * height / width)), len(samples[0].lengths)
    per_block = len(samples[0].frames) // blocks
    fonts = {size: ImageFont.load_default(size=size) for size in (13, 15, 24)}
    labels = 16 + max(int(fonts[15].getlength(sample.label)) for sample in samples)
    labels = max(labels, 16 + int(fonts[13].getlength("1000 tokens")))
    group = frames_per_block * (cell + _GAP) + 8  # of a block
    head, step = _MARGIN + (64 if subtitle else 40), tall + 34
    wide = max(labels + blocks * group, int(fonts[24].getlength(title)), int(fonts[15].getlength(subtitle)) + 1)
    image = Image.new("RGB", (2 * _MARGIN + wide, head + len(samples) * step + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=fonts[24])
    draw.text((_MARGIN, _MARGIN + 36), subtitle, fill=_MUTED, font=fonts[15])
    for row, sample in enumerate(samples):
        top = head + row * step
        draw.text((_MARGIN, top + tall / 2 - 10), sample.label, fill=_INK, font=fonts[15], anchor="lm")
        draw.text((_MARGIN, top + tall / 2 + 10), f"{sample.tokens} tokens", fill=_MUTED, font=fonts[13], anchor="lm")
        for block, length in enumerate(sample.lengths):
            left = _MARGIN + labels + block * group
            for k in range(frames_per_block):
                frame = block * per_block + (2 * k + 1) * per_block // (2 * frames_per_block)
                _paste(image, sample.frames[frame], left + k * (cell + _GAP), top, cell, tall)
            _lying_bar(draw, length, max_length, left, top + tall + 6, group - 44, fonts[13])
    return image


def prediction_picture(
    prediction: np.ndarray,
    truth: np.ndarray | None,
    known: int,
    lengths: Sequence[int],
    max_length: int,
    title: str,
    subtitle: str = "",
    captions: Sequence[str] | None = None,
    cell: int = 96,
) -> Image.Image:
    """A still of a prediction, above it the truth as far as there is one, and a bar of each block's tokens.

    Args:
        prediction: uint8 (F, H, W, 3), beginning with the known frames.
        truth: uint8 (f, H, W, 3), the same frames in truth, or None.
        known: how many frames are known; the last of them is the first that is shown.
        lengths: tokens of each block of the clip.
        max_length: the largest candidate.
        title, subtitle: two lines above.
        captions: a line under each frame of the prediction, F of them.
        cell: width of a frame in the picture, pixels.
    """
    count = len(prediction)
    places = np.linspace(known - 1, count - 1, min(8, count - known + 1)).round().astype(int).tolist()
    height, width = prediction.shape[1:3]
    tall = max(1, round(cell * height / width))
    fonts = {size: ImageFont.load_default(size=size) for size in (13, 15, 24)}
    rows = [("prediction", prediction)] if truth is None else [("truth", truth), ("prediction", prediction)]
    labels, head = 96, _MARGIN + (64 if subtitle else 40) + 20
    wide = max(
        labels + len(places) * (cell + _GAP), int(fonts[24].getlength(title)), int(fonts[15].getlength(subtitle))
    )
    image = Image.new("RGB", (2 * _MARGIN + wide + 1, head + len(rows) * (tall + _GAP) + 70 + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=fonts[24])
    draw.text((_MARGIN, _MARGIN + 36), subtitle, fill=_MUTED, font=fonts[15])
    for column, place in enumerate(places):
        x = _MARGIN + labels + column * (cell + _GAP)
        words = f"frame {place + 1}" + (", known" if place < known else "")
        draw.text((x, head - 5), words, fill=_MUTED, font=fonts[13], anchor="ld")
        for row, (_, frames) in enumerate(rows):
            if place < len(frames):
                _paste(image, frames[place], x, head + row * (tall + _GAP), cell, tall)
        if captions is not None:
            y = head + len(rows) * (tall + _GAP) + 2
            draw.text((x + cell / 2, y), captions[place], fill=_MUTED, font=fonts[13], anchor="ma")
    for row, (name, _) in enumerate(rows):
        y = head + row * (tall + _GAP) + tall / 2
        draw.text((_MARGIN, y), name, fill=_INK, font=fonts[15], anchor="lm")
    y = head + len(rows) * (tall + _GAP) + 28
    draw.line((_MARGIN, y, _MARGIN + wide, y), fill=_RULE)
    draw.text((_MARGIN, y + 20), "tokens", fill=_INK, font=fonts[15], anchor="lm")
    step = (wide - labels) / len(lengths)
    for block, length in enumerate(lengths):
        left = round(_MARGIN + labels + block * step)
        _lying_bar(draw, length, max_length, left, round(y + 14), round(step) - 44, fonts[13])
    return image


def _paste(image: Image.Image, frame: np.ndarray, left: int, top: int, wide: int, tall: int) -> None:
    image.paste(Image.fromarray(frame).resize((wide, tall), Image.Resampling.BICUBIC), (left, top))


def _lying_bar(draw: ImageDraw.ImageDraw, length: int, most: int, left: int, top: int, wide: int, font) -> None:
    """A bar to the right, its number behind it."""
    end = left + max(2, round(wide * length / most))
    draw.rectangle((left, top, end, top + 10), fill=_BAR_NOW)
    draw.text((end + 5, top + 5), str(length), fill=_INK, font=font, anchor="lm")


def _fit(line: str, short: str, font, width: int) -> str:
    return line if font.getlength(line) <= width else short
