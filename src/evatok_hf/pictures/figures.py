"""Figures of matplotlib that go to files."""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING

from ..models.files_evatok import Replacement

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pyplot() -> ModuleType:
    """matplotlib's pyplot, which draws without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as loaded

    return loaded


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure of pyplot in the format of the extension, and closes it.

    Raises:
        ValueError: a folder that cannot be written to.
    """
    with Replacement(path) as partial:
        figure.savefig(partial, dpi=110)
    pyplot().close(figure)
