"""The two files that the app shows of a result: a video, in which both halves are always in step, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..models.configuration_evatok import EvatokConfig
from ..pictures.clips import (
    BAR_NOW,
    COMPARED,
    INK,
    MUTED,
    PAPER,
    SideBySide,
    comparison_picture,
    font,
    paste,
    save_picture,
    spread,
)
from ..pictures.samples import Sample, SampleGrid, contact_sheet, prediction_picture
from ..video.read import VideoWriter, write_video
from .jobs import Continuation, Reconstruction

# Frames are enlarged to about so many pixels.
_SHOWN = 256


def reconstruction(
    folder: Path, done: Reconstruction, config: EvatokConfig, fps: float, title: str, subtitle: str
) -> tuple[Path, Path]:
    """Writes original and reconstruction side by side in one video, the tokens of each block under them; and a picture,
    one frame of each block of a few clips, spread over the video, with its tokens under it."""
    video, picture = folder / "side-by-side.mp4", folder / "blocks.png"
    side, most = config.image_size, max(config.block_lengths)
    both = SideBySide(side, side, most, config.num_frames, max(1, round(_SHOWN / side)))
    with VideoWriter(video, fps, *both.size) as writer:
        for clip in done.clips:
            writer.write(both.frames(clip))
    clips = [done.clips[index] for index in sorted(spread(len(done.clips), COMPARED))]
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
    write_video(video, _known_and_predicted(done, max(1, round(_SHOWN / config.image_size))), fps)
    lengths, most = done.tokens.lengths[0].tolist(), max(config.block_lengths)
    save_picture(prediction_picture(done.frames, done.truth, done.known, lengths, most, title, subtitle), picture)
    return video, picture


def _known_and_predicted(done: Continuation, scale: int) -> np.ndarray:
    """Frames of the video of a continuation, uint8 (F, height, width, 3), both even, as H.264 wants them."""
    edge, head, gap = 6, 30, 8
    tall, wide = (side * scale for side in done.frames.shape[1:3])
    right, bottom = wide + 2 * edge, head + tall + 2 * edge  # of the frame around the left half
    start = 0 if done.truth is None else right + gap  # of the half with the known and predicted frames
    size = [side + side % 2 for side in (max(start + right, 200), bottom)]

    def picture(index: int) -> np.ndarray:
        image = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(image)
        what, colour = ("known", MUTED) if index < done.known else ("predicted", BAR_NOW)
        halves = [(start, f"frame {index + 1}: {what}", colour, done.frames)]
        if done.truth is not None:
            halves.append((0, "truth", MUTED, done.truth))
        for left, words, frame, frames in halves:
            draw.text((left + edge, head / 2), words, fill=INK, font=font(15), anchor="lm")
            if index < len(frames):
                draw.rectangle((left, head, left + right - 1, bottom - 1), fill=frame)
                paste(image, frames[index], left + edge, head + edge, wide, tall)
            else:
                draw.text((left + edge, head + 20), "the video has ended", fill=MUTED, font=font(15))
        return np.asarray(image)

    return np.stack([picture(index) for index in range(len(done.frames))])
