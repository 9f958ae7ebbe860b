"""Intervals of figures, by drawing the clips again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ROUNDS = 2000


def bootstrap(figure: Callable[..., float], *counts: int, rounds: int = ROUNDS) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of `figure(places of set 1, places of set 2, ..)`, sets being drawn independently.

    Rounds that give no number are left out; (None, None) if none gives one.
    """
    rng = np.random.default_rng(0)
    values = np.array([figure(*(rng.integers(n, size=n) for n in counts)) for _ in range(rounds)])
    values = values[np.isfinite(values)]
    return tuple(np.percentile(values, [2.5, 97.5]).tolist()) if len(values) else (None, None)


def with_interval(figure: Callable[..., float], *counts: int, rounds: int = ROUNDS) -> dict[str, float | None]:
    """The figure of all clips as "value", its interval as "low" and "high"; None where there is no number."""
    value = float(figure(*map(np.arange, counts)))
    low, high = bootstrap(figure, *counts, rounds=rounds)
    return {"value": value if np.isfinite(value) else None, "low": low, "high": high}
