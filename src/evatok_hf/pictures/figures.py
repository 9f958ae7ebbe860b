"""Figures of matplotlib that go to files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ..models.files_evatok import Replacement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pyplot() -> ModuleType:
    """matplotlib's pyplot, which draws without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as loaded

    return loaded


def draw_lengths(axis: Axes, lengths: np.ndarray, candidates: Sequence[int], title: str) -> None:
    """Stacked bars of how often the blocks of clips, lengths (N, T), have each of the candidates."""
    blocks = np.arange(1, lengths.shape[1] + 1)
    bottom = np.zeros(len(blocks))
    for length in candidates:
        part = (lengths == length).mean(0) * 100
        axis.bar(blocks, part, bottom=bottom, label=str(length))
        bottom += part
    axis.set(title=title, xlabel="block", ylabel="% of clips", xticks=blocks)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure of pyplot in the format of the extension, and closes it.

    Raises:
        ValueError: a folder that cannot be written to.
    """
    with Replacement(path) as partial:
        figure.savefig(partial, dpi=110)
    pyplot().close(figure)
