"""The app's view of a result: a short summary, a video in which all parts are in step, a picture, and all numbers.

Every function writes its files into a folder, and gives what its tab shows in the order of its outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..pictures.clips import (
    BAR_NOW,
    COMPARED,
    INK,
    MUTED,
    PAPER,
    SideBySide,
    comparison_picture,
    decibels,
    font,
    paste,
    save_picture,
    spread,
)
from ..pictures.samples import Sample, SampleGrid, contact_sheet, prediction_picture
from ..video.read import VideoWriter, write_video
from .jobs import METRIC, Continuation, Measured, Reconstruction, fixed_length, pipeline, tokenizer

Numbers = dict[str, Any]
# Frames are enlarged to about so many pixels.
_SHOWN = 256


def reconstruction(
    folder: Path, done: Reconstruction, name: str, told: Numbers
) -> tuple[str, Path, Path, Path, Numbers]:
    """Of a video with this name; `told` is how lengths were chosen.

    The video has original and reconstruction side by side, the tokens of each block under them; the picture one frame
    of each block of a few clips, spread over the video, with its tokens under it. The tokens are a file, too.
    """
    config, tokens, checkpoint = tokenizer().model.config, done.tokens, tokenizer().name
    side, most, length = config.image_size, max(config.block_lengths), fixed_length(config)
    video, picture = folder / "side-by-side.mp4", folder / "blocks.png"
    both = SideBySide(side, side, most, config.num_frames, max(1, round(_SHOWN / side)))
    with VideoWriter(video, tokens.fps, *both.size) as writer:
        for clip in done.clips:
            writer.write(both.frames(clip))
    title = f"{done.adaptive.tokens:,} tokens for {tokens.num_frames:,} frames, PSNR {decibels(done.adaptive.psnr, 2)}"
    subtitle = "; ".join(filter(None, [_listed(told), f"{side} x {side}, checkpoint {checkpoint}"]))
    clips = [done.clips[index] for index in sorted(spread(len(done.clips), COMPARED))]
    save_picture(comparison_picture(clips, most, config.num_frames, title, subtitle), picture)
    # a name without what file systems or pages may stumble over
    plain = re.sub(r"[^\w-]+", "_", Path(name).stem)[:60].strip("_") or "video"
    tokens.save(folder / f"{plain}.safetensors")

    words = f"{done.saved:.0%} fewer" if done.saved >= 0 else f"{-done.saved:.0%} more"
    rows = [
        ("Adaptive", *_cells(done.adaptive.tokens, done.adaptive)),
        ("Fixed length", *_cells(done.fixed_tokens, done.fixed)),
    ]
    whole = length * config.num_blocks
    note = f"Fixed length: {length} tokens for every block, {whole} a clip (in the paper 256, 1024 a clip)."
    if done.fixed is None:
        note += " Its quality was not measured: the saving is not at equal quality."
    note += f" {METRIC} is a distance of network features (0: equal), not LPIPS. Encoding and decoding took"
    note += f" {done.seconds:.1f} s; PSNR and distance are means over {_plural(len(done.clips), 'clip')}."
    summary = (
        f'<p class="headline"><strong>{done.adaptive.tokens:,} tokens</strong> for '
        f"{_plural(tokens.num_frames, 'frame')} of {escape(name)}: {words} than a fixed length</p>"
        + _table("Adaptive and fixed length", ("", "Tokens", "PSNR", "Distance"), rows)
        + f'<p class="note">{note}</p>'
    )
    numbers = {
        "tokens": done.adaptive.tokens,
        "frames": tokens.num_frames,
        "fps": tokens.fps,
        **told,
        "psnr": _finite(done.adaptive.psnr),
        "perceptual": {"name": METRIC, "distance": done.adaptive.perceptual},
        "fixed_length": {
            "tokens_per_block": length,
            "tokens": done.fixed_tokens,
            "psnr": done.fixed and _finite(done.fixed.psnr),
            "perceptual": done.fixed and done.fixed.perceptual,
        },
        "saved": done.saved,
        "clips": [
            {"lengths": clip.lengths, "tokens": sum(clip.lengths), "psnr": _finite(clip.psnr)} for clip in done.clips
        ],
        "checkpoint": tokens.checkpoint,
        "fingerprint": tokens.fingerprint,
        "seconds": round(done.seconds, 3),
    }
    return summary, video, picture, folder / f"{plain}.safetensors", numbers


def generation(
    folder: Path, samples: Sequence[Sample], told: Numbers, fps: float, seconds: float
) -> tuple[str, Path, Path, Numbers]:
    """Of clips that were drawn in so many seconds; `told` is how.

    The video has all clips in a grid; the picture a row a clip, frames of each block with its tokens under them.
    """
    video, picture = folder / "clips.mp4", folder / "clips.png"
    config = pipeline().tokenizer.config
    most, fixed = max(config.block_lengths), fixed_length(config) * config.num_blocks
    title = f"{samples[0].label}: {_plural(len(samples), 'clip')}"
    grid = SampleGrid(samples, most, None, None, title)
    with VideoWriter(video, fps, *grid.size) as writer:
        writer.write(grid.frames())
    save_picture(contact_sheet(samples, most, title, _listed(told)), picture)
    total = sum(sample.tokens for sample in samples)
    rows = [(str(i), " + ".join(map(str, s.lengths)), f"{s.tokens:,}") for i, s in enumerate(samples, start=1)]
    summary = (
        f'<p class="headline"><strong>{total / len(samples):.0f} tokens</strong> a clip on average, chosen by the '
        f"generator; a fixed length has {fixed}</p>"
        + _table("Tokens of each block of each clip", ("Clip", "Tokens of its blocks", "Sum"), rows)
        + f'<p class="note">Drawn in {seconds:.1f} s.</p>'
    )
    numbers = {
        "samples": [{"class": s.label, "seed": s.seed, "lengths": s.lengths, "tokens": s.tokens} for s in samples],
        "tokens": total,
        **told,
        "fps": fps,
        "checkpoint": pipeline().name,
    }
    return summary, video, picture, numbers


def continuation(
    folder: Path, done: Continuation, name: str | None, told: Numbers, seconds: float
) -> tuple[str, Path, Path, Numbers]:
    """Of a video of a class, or of none, that was continued in so many seconds; `told` is how.

    The video has known frames in a grey frame, predicted ones in a blue one, the true ones beside them where there are
    any; the picture a row of frames, the true ones above them, and the tokens of the first clip.
    """
    video, picture = folder / "continued.mp4", folder / "continued.png"
    config, known, tokens = pipeline().tokenizer.config, done.known, done.tokens.ids.numel()
    predicted, lengths = len(done.frames) - known, done.tokens.lengths.tolist()
    write_video(video, _known_and_predicted(done, max(1, round(_SHOWN / config.image_size))), told["fps"])
    title = f"{predicted} frames predicted from {known}"
    subtitle = f"class {name}; seed {told['seed']}" if name else f"seed {told['seed']}"
    most = max(config.block_lengths)
    save_picture(prediction_picture(done.frames, done.truth, known, lengths[0], most, title, subtitle), picture)
    if done.psnr:
        places = sorted({0, len(done.psnr) // 2, len(done.psnr) - 1})
        rows = [(str(known + i + 1), decibels(done.psnr[i], 2), decibels(done.copied[i], 2)) for i in places]
        head = ("Frame", "PSNR, predicted", "PSNR, last known frame repeated")
        compared = _table("Prediction against the true frames", head, rows)
    else:
        compared = '<p class="note">The video ends with the known frames, so there is nothing to compare with.</p>'
    summary = (
        f'<p class="headline"><strong>{_plural(predicted, "frame")} predicted</strong> from {known} known, '
        f'{tokens:,} tokens</p>{compared}<p class="note">Predicted in {seconds:.1f} s.</p>'
    )
    numbers = {
        "known": known,
        "predicted": predicted,
        "tokens": tokens,
        "clips": [{"lengths": row, "tokens": sum(row)} for row in lengths],
        "psnr": [_finite(value) for value in done.psnr],
        "psnr_of_copying": [_finite(value) for value in done.copied],
        **told,
        "checkpoint": pipeline().name,
    }
    return summary, video, picture, numbers


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


def _cells(tokens: int, kept: Measured | None) -> tuple[str, str, str]:
    if kept is None:
        return f"{tokens:,}", "not measured", "not measured"
    return f"{tokens:,}", decibels(kept.psnr, 2), f"{kept.perceptual:.4f}"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first cells are headings of their rows."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    inside = f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<table class="numbers">{inside}</table>'


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _listed(told: Numbers) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in told.items())
