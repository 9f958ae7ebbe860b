"""Limits on the size of a picture and on what is held at once, so that a small file cannot ask for all memory.

Both bounds can be raised: `EVATOK_MAX_FRAME_PIXELS`, by default 64 million (an 8K frame has 33), and
`EVATOK_MAX_HELD_BYTES`, by default 2 GiB of frames that a caller is given in one array.
"""

from __future__ import annotations

import os

from .source import VideoReadError

_FRAME, _HELD = "EVATOK_MAX_FRAME_PIXELS", "EVATOK_MAX_HELD_BYTES"
_DEFAULTS = {_FRAME: 1 << 26, _HELD: 2 << 30}


def check_frame(name: str, height: int, width: int) -> None:
    """Raises VideoReadError for pictures of too many pixels, before one is decoded."""
    if height * width > (most := _bound(_FRAME)):
        raise VideoReadError(
            f"{name}: its pictures have {width}x{height} pixels, more than {most:,} in all: make them smaller, or "
            f"raise the bound by {_FRAME}"
        )


def fits(frames: int, height: int, width: int) -> bool:
    """Tells whether so many frames may be held at once."""
    return frames * height * width * 3 <= _bound(_HELD)


def check_held(name: str, frames: int, height: int, width: int) -> None:
    """Raises VideoReadError where so many frames together take too much memory."""
    if not fits(frames, height, width):
        size = frames * height * width * 3
        raise VideoReadError(
            f"{name}: {frames} frames of {width}x{height} take {size:,} bytes at once, more than {_bound(_HELD):,}: "
            f"read fewer at a time, or raise the bound by {_HELD}"
        )


def _bound(name: str) -> int:
    value = os.environ.get(name)
    if value is None:
        return _DEFAULTS[name]
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise ValueError(f"{name} is {value!r}: give a whole number, 1 or more")
    return int(value)
