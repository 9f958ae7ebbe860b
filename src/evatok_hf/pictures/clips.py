"""Pictures: stills of where tokens go and of reconstructed clips, and the frames of a video that shows both sides."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..models.files_evatok import Replacement
from ..tokenize.clips import ReconstructedClip, RoutedClip

PAPER, INK, MUTED, RULE = "#ffffff", "#1c2430", "#6b7686", "#d5dae1"
BAR, BAR_NOW = "#9dbbe6", "#2563c9"
MARGIN = 28  # around a still, pixels
font = functools.cache(lambda size: ImageFont.load_default(size=size))
_PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LABELS = 112  # width of the row labels of a picture, pixels
COMPARED = 2  # clips in a picture that compares


def comparison_picture(
    clips: Sequence[ReconstructedClip],
    max_length: int,
    num_frames: int,
    title: str,
    subtitle: str = "",
    cell: int = 256,
    rival: tuple[str, Sequence[np.ndarray]] | None = None,
) -> Image.Image:
    """A still: for one frame of each block, the original, the reconstruction, and the tokens that the block got.

    Args:
        clips: the clips to show, one below the other; blocks behind a clip's last true frame are left out.
        max_length: the largest candidate, which fills the height of the bar chart.
        num_frames: frames of a full clip, F.
        title, subtitle: two lines above.
        cell: width of a frame in the picture, pixels.
        rival: what else made clips of the same bits, under the name of its row, and its frames of each clip: uint8
            (f, H, W, 3).

    Raises:
        ValueError: no clips.
    """
    if not clips:
        raise ValueError("a picture needs at least one clip.")
    height, width = clips[0].original.shape[1:3]
    tall = max(1, round(cell * height / width))
    gap, group, chart = 6, 30, 72
    name, theirs = rival or ("", [None] * len(clips))
    labels = ["original", "recon-\nstruction", *([] if rival is None else [name])]
    shown = [_block_frames(clip, num_frames) for clip in clips]
    wide = max(map(len, shown)) * (cell + gap) - gap
    # the numbers above the bars need room between the frames and the chart
    high = 42 + len(labels) * (tall + gap) + 28 + chart + 34  # of a clip
    image, draw, top = still(title, subtitle, _LABELS + wide, len(clips) * (high + group) - group)
    left = MARGIN + _LABELS
    for clip, blocks, other in zip(clips, shown, theirs, strict=True):
        rows = [top + 42 + row * (tall + gap) for row in range(len(labels))]  # tops of originals, of reconstructions ..
        bars = rows[-1] + tall + 34  # top of the chart
        middles = [*(row + tall // 2 for row in rows), bars + chart // 2]
        for y, text in zip(middles, [*labels, "tokens of\nthe block"], strict=True):
            draw.text((MARGIN, y), text, fill=INK, font=font(17), anchor="lm")
        right = left + len(blocks) * (cell + gap) - gap
        about = f"clip {clip.index + 1}, frames {clip.first + 1} to {clip.first + len(clip.original)}"
        result = f"{sum(clip.lengths)} tokens, {decibels(clip.psnr)}"
        line = fitting(font(15), right - left, f"{about}: {result}", result)
        draw.text((left, top + 14), line, fill=MUTED, font=font(15))
        draw.line((left, top + 36, right, top + 36), fill=RULE)
        for column, (block, frame) in enumerate(blocks):
            x = left + column * (cell + gap)
            sides = [clip.original, clip.reconstruction, *([] if rival is None else [other])]
            for y, frames in zip(rows, sides, strict=True):
                paste(image, frames[frame], x, y, cell, tall)
            draw_bar(draw, clip.lengths[block], max_length, x, bars, cell, chart, font(17), BAR_NOW)
            draw.text((x + cell / 2, bars + chart + 8), f"block {block + 1}", fill=MUTED, font=font(13), anchor="ma")
        draw.line((left, bars + chart, right, bars + chart), fill=MUTED)
        top += high + group
    return image


def routing_picture(
    clips: Sequence[RoutedClip],
    max_length: int,
    num_frames: int,
    title: str,
    subtitle: str = "",
    clips_per_row: int = 4,
) -> Image.Image:
    """A still of where the tokens go: the first frame of each block of each clip, a bar of its tokens under it.

    Blocks behind a clip's last true frame are shown pale, with the frame that fills them up: they cost tokens, too.

    Args:
        clips: the clips to show, in rows of `clips_per_row`.
        max_length: the largest candidate, which has the longest bar.
        num_frames: frames of a full clip, F.
        title, subtitle: two lines above.

    Raises:
        ValueError: no clips.
    """
    if not clips:
        raise ValueError("a picture needs at least one clip.")
    height, width = clips[0].original.shape[1:3]
    cell = 80  # width of a frame in the picture, pixels
    tall = max(1, round(cell * height / width))
    gap, group, chart, heading = 4, 28, 64, 26
    blocks = len(clips[0].lengths)
    wide = blocks * (cell + gap) - gap  # of a clip
    most = max(max(clip.lengths) for clip in clips)
    step = heading + tall + round(chart * most / max_length) + 50  # from one row of clips to the next
    columns, rows = min(clips_per_row, len(clips)), -(-len(clips) // clips_per_row)
    image, draw, head = still(title, subtitle, columns * (wide + group) - group, rows * step)
    for place, clip in enumerate(clips):
        left = MARGIN + place % clips_per_row * (wide + group)
        top = head + place // clips_per_row * step
        result = f"{sum(clip.lengths)} tokens"
        line = f"clip {clip.index + 1}, {clip.start:.2f} to {clip.end:.2f} s: {result}"
        draw.text((left, top + 4), fitting(font(13), wide, line, result), fill=MUTED, font=font(13))
        draw.line((left, top + heading - 4, left + wide, top + heading - 4), fill=RULE)
        base = top + heading + tall + gap  # bars hang from here
        for block, length in enumerate(clip.lengths):
            x, first = left + block * (cell + gap), block * num_frames // blocks
            true = first < len(clip.original)
            frame = clip.original[first if true else -1]
            if not true:
                frame = (0.4 * frame + 0.6 * 255).astype(np.uint8)
            paste(image, frame, x, top + heading, cell, tall)
            end = base + max(2, round(chart * length / max_length))
            colour = BAR_NOW if true else BAR
            draw.rectangle((round(x + 0.2 * cell), base, round(x + 0.8 * cell), end), fill=colour)
            draw.text((x + cell / 2, end + 4), str(length), fill=INK, font=font(13), anchor="ma")
    return image


class SideBySide:
    """Frames of a video with the original left, the reconstruction right, and the clip's tokens under them.

    Args:
        height, width: size of a frame, pixels.
        max_length: the largest candidate, which fills a bar.
        num_frames: frames of a full clip, F.
        scale: how many times larger the frames are shown (bicubic, both sides alike).

    Attributes:
        size: (height, width) of the whole, both even, as H.264 wants them.
    """

    def __init__(self, height: int, width: int, max_length: int, num_frames: int, scale: int) -> None:
        self._max_length, self._num_frames = max_length, num_frames
        self._frame = (height * scale, width * scale)
        self._gap = 8
        wide = max(2 * self._frame[1] + self._gap, 320)  # room for the captions
        self._left = (wide - 2 * self._frame[1] - self._gap) // 2
        self._top, self._chart = 30, 72
        tall = self._top + self._frame[0] + 60 + self._chart + 14
        self.size = (tall + tall % 2, wide + wide % 2)

    def frames(self, clip: ReconstructedClip) -> np.ndarray:
        """The frames of one clip, uint8 (f, *size, 3); the bar of the block that a frame belongs to is dark."""
        other = self._left + self._frame[1] + self._gap
        placed = {(self._top, self._left): clip.original, (self._top, other): clip.reconstruction}
        shown = {place: enlarge(frames, *self._frame) for place, frames in placed.items()}
        return over_canvas(lambda block: self._canvas(clip, block), self._num_frames // len(clip.lengths), shown)

    def _canvas(self, clip: ReconstructedClip, now: int) -> Image.Image:
        """The picture around the frames of a block: captions and bars."""
        image = Image.new("RGB", self.size[::-1], PAPER)
        draw = ImageDraw.Draw(image)
        tall, wide = self._frame
        for left, text in ((self._left, "original"), (self._left + wide + self._gap, "reconstruction")):
            draw.text((left + wide / 2, self._top / 2), text, fill=INK, font=font(15), anchor="mm")
        y = self._top + tall + 10
        line = f"clip {clip.index + 1}: {sum(clip.lengths)} tokens, {decibels(clip.psnr)}"
        draw.text((self.size[1] / 2, y), line, fill=MUTED, font=font(14), anchor="ma")
        place = (self._gap, y + 44, self.size[1] - self._gap, y + 44 + self._chart)
        draw_chart(draw, clip.lengths, self._max_length, place, font(14), now)
        return image


def still(title: str, subtitle: str, wide: int, tall: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A still with two lines above and room for `wide` x `tall` pixels: it, its pen, and where the room begins."""
    head = MARGIN + (64 if subtitle else 40)
    wide = max(wide, int(font(24).getlength(title)) + 1, int(font(15).getlength(subtitle)) + 1)
    image = Image.new("RGB", (2 * MARGIN + wide, head + tall + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=font(24))
    draw.text((MARGIN, MARGIN + 36), subtitle, fill=MUTED, font=font(15))
    return image, draw, head


def paste(image: Image.Image, frame: np.ndarray, left: int, top: int, wide: int, tall: int) -> None:
    """Puts a frame, uint8 (H, W, 3), into a picture at another size."""
    image.paste(Image.fromarray(frame).resize((wide, tall), Image.Resampling.BICUBIC), (left, top))


def fitting(letters: ImageFont.FreeTypeFont, width: float, line: str, short: str) -> str:
    """The line where it is not wider than that, else the short one."""
    return line if letters.getlength(line) <= width else short


def spread(total: int, count: int) -> set[int]:
    """At most `count` of the numbers 0..total - 1, evenly spread."""
    count = min(total, count)
    return {int((i + 0.5) * total / count) for i in range(count)}


def over_canvas(
    canvas: Callable[[int], Image.Image], per_block: int, placed: dict[tuple[int, int], np.ndarray]
) -> np.ndarray:
    """Frames uint8 (F, H, W, 3), each put at its (top, left) into the picture that `canvas` draws for its block."""
    size = len(next(iter(placed.values())))
    out = np.stack([np.asarray(canvas(block)) for block in range(-(-size // per_block))])
    out = out.repeat(per_block, 0)[:size]
    for (top, left), frames in placed.items():
        out[:, top : top + frames.shape[1], left : left + frames.shape[2]] = frames
    return out


def enlarge(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames at another size, bicubic, uint8 (F, H, W, 3) -> (F, height, width, 3)."""
    images = (Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames)
    return np.stack([np.asarray(image) for image in images])


def check_picture_path(path: str | os.PathLike[str]) -> Path:
    """Raises ValueError for an extension that is no picture format."""
    path = Path(path)
    if path.suffix.lower() not in _PICTURE_FORMATS:
        raise ValueError(f"{path}: no picture format for {path.suffix!r}; use one of {', '.join(_PICTURE_FORMATS)}.")
    return path


def save_picture(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes a picture in the format of its extension; the target appears only when it is complete.

    Raises:
        ValueError: an unknown extension, or a folder that cannot be written to.
    """
    path = check_picture_path(path)
    with Replacement(path) as partial:
        image.save(partial, format=_PICTURE_FORMATS[path.suffix.lower()])


def _block_frames(clip: ReconstructedClip, num_frames: int) -> list[tuple[int, int]]:
    """(block, frame in the clip) of the middle of each block, as far as the clip's true frames go."""
    per_block, count = num_frames // len(clip.lengths), len(clip.original)
    blocks = [block for block in range(len(clip.lengths)) if block * per_block < count]
    return [(block, min(block * per_block + per_block // 2, count - 1)) for block in blocks]


def draw_bar(
    draw: ImageDraw.ImageDraw, length: int, most: int, x: float, y: float, width: float, height: int, font, colour: str
) -> None:
    """A bar that stands on y + height, its number above."""
    tall = max(2, round(height * length / most))
    top = y + height - tall
    draw.rectangle((round(x + 0.2 * width), top, round(x + 0.8 * width), y + height), fill=colour)
    draw.text((x + width / 2, top - 4), str(length), fill=INK, font=font, anchor="md")


def draw_chart(
    draw: ImageDraw.ImageDraw,
    lengths: Sequence[int],
    most: int,
    place: tuple[float, float, float, float],
    letters: ImageFont.FreeTypeFont,
    now: int,
) -> None:
    """Bars of all blocks, that of block `now` dark, on a line at the bottom of `place` (left, top, right, bottom)."""
    left, top, right, bottom = place
    step = (right - left) / len(lengths)
    for block, length in enumerate(lengths):
        colour = BAR_NOW if block == now else BAR
        draw_bar(draw, length, most, left + block * step, top, step, bottom - top, letters, colour)
    draw.line((left, bottom, right, bottom), fill=MUTED)


def decibels(psnr: float, digits: int = 1) -> str:
    return "equal" if psnr == float("inf") else f"{psnr:.{digits}f} dB"
