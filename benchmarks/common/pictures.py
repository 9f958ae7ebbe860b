"""What the pictures of benchmarks share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN, OTHER, LIMIT = "tab:red", "tab:grey", "black"


def plain_ticks(axis: Axes, which: str, values: list[float], limits: tuple[float, float] = (0, math.inf)) -> None:
    """Numbers instead of powers of ten on a logarithmic axis, those within the limits."""
    shown = [value for value in values if limits[0] <= value <= limits[1]]
    getattr(axis, f"set_{which}ticks")(shown, [f"{value:g}" for value in shown])
    getattr(axis, f"set_{which}ticks")([], minor=True)
