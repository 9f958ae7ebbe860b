"""Colours and axes that the pictures of benchmarks share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN, OTHER, LIMIT = "tab:red", "tab:grey", "black"


def plain_ticks(axis: Axes, which: str, values: list[float]) -> None:
    """Numbers instead of powers of ten on a logarithmic axis, those within its limits."""
    low, high = getattr(axis, f"get_{which}lim")()
    shown = [value for value in values if low <= value <= high]
    getattr(axis, f"set_{which}ticks")(shown, [f"{value:g}" for value in shown])
    getattr(axis, f"set_{which}ticks")([], minor=True)


def log_axis(axis: Axes, label: str) -> None:
    """Powers of two along x, as numbers; with a grid."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
