"""Reports of results: a short table for people, the same numbers as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ..pictures.clips import decibels
from ..pictures.samples import Sample
from .jobs import METRIC, Continuation, Measured, Reconstruction, fixed_length, pipeline, tokenizer

_FIXED = "Fixed length"


def reconstruction_numbers(done: Reconstruction, told: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a reconstruction; `told` is how lengths were chosen. PSNR is None where both sides are equal."""
    tokens = done.tokens
    return {
        "tokens": done.adaptive.tokens,
        "frames": tokens.num_frames,
        "fps": tokens.fps,
        **told,
        "psnr": _finite(done.adaptive.psnr),
        "perceptual": {"name": METRIC, "distance": done.adaptive.perceptual},
        "fixed_length": {
            "tokens_per_block": fixed_length(tokenizer().model.config),
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


def reconstruction_summary(done: Reconstruction, name: str) -> str:
    """HTML: tokens, what was saved, and a table of both ways."""
    saved = done.saved
    words = f"{saved:.0%} fewer" if saved >= 0 else f"{-saved:.0%} more"
    blocks, length = len(done.clips[0].lengths), fixed_length(tokenizer().model.config)
    frames = done.tokens.num_frames
    rows = [("Adaptive", *_cells(done.adaptive.tokens, done.adaptive))]
    rows.append((_FIXED, *_cells(done.fixed_tokens, done.fixed)))
    note = f"Fixed length: {length} tokens for every block, {length * blocks} a clip (in the paper 256, 1024 a clip)."
    if done.fixed is None:
        note += " Its quality was not measured: the saving is not at equal quality."
    note += f" {METRIC} is a distance of network features (0: equal), not LPIPS."
    clips = _plural(len(done.clips), "clip")
    note += f" Encoding and decoding took {done.seconds:.1f} s; PSNR and distance are means over {clips}."
    return (
        f'<p class="headline"><strong>{done.adaptive.tokens:,} tokens</strong> for {_plural(frames, "frame")} of '
        f"{escape(name)}: {words} than a fixed length</p>"
        + _table("Adaptive and fixed length", ("", "Tokens", "PSNR", "Distance"), rows)
        + f'<p class="note">{note}</p>'
    )


def generation_numbers(samples: Sequence[Sample], told: dict[str, Any]) -> dict[str, Any]:
    return {
        "samples": [{"class": s.label, "seed": s.seed, "lengths": s.lengths, "tokens": s.tokens} for s in samples],
        "tokens": sum(sample.tokens for sample in samples),
        **told,
        "checkpoint": pipeline().name,
    }


def generation_summary(samples: Sequence[Sample], seconds: float) -> str:
    """HTML: the lengths that the generator chose."""
    total = sum(sample.tokens for sample in samples)
    fixed = fixed_length(pipeline().tokenizer.config) * len(samples[0].lengths)
    rows = [(str(i), " + ".join(map(str, s.lengths)), f"{s.tokens:,}") for i, s in enumerate(samples, start=1)]
    return (
        f'<p class="headline"><strong>{total / len(samples):.0f} tokens</strong> a clip on average, chosen by the '
        f"generator; a fixed length has {fixed}</p>"
        + _table("Tokens of each block of each clip", ("Clip", "Tokens of its blocks", "Sum"), rows)
        + f'<p class="note">Drawn in {seconds:.1f} s.</p>'
    )


def continuation_numbers(done: Continuation, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "known": done.known,
        "predicted": len(done.frames) - done.known,
        "tokens": done.tokens.ids.numel(),
        "clips": [{"lengths": row, "tokens": sum(row)} for row in done.tokens.lengths.tolist()],
        "psnr": [_finite(value) for value in done.psnr],
        "psnr_of_copying": [_finite(value) for value in done.copied],
        **told,
        "checkpoint": pipeline().name,
    }


def continuation_summary(done: Continuation, seconds: float) -> str:
    """HTML: what is known, what predicted, and how near it is where the truth is there."""
    predicted = len(done.frames) - done.known
    text = (
        f'<p class="headline"><strong>{_plural(predicted, "frame")} predicted</strong> from {done.known} known, '
        f"{done.tokens.ids.numel():,} tokens</p>"
    )
    if done.psnr:
        places = sorted({0, len(done.psnr) // 2, len(done.psnr) - 1})
        rows = [(str(done.known + i + 1), decibels(done.psnr[i], 2), decibels(done.copied[i], 2)) for i in places]
        head = ("Frame", "PSNR, predicted", "PSNR, last known frame repeated")
        text += _table("Prediction against the true frames", head, rows)
    else:
        text += '<p class="note">The video ends with the known frames, so there is nothing to compare with.</p>'
    return text + f'<p class="note">Predicted in {seconds:.1f} s.</p>'


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
