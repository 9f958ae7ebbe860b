"""Figures of `assignment_curves.py` from tables of all assignments: curves, savings, intervals. Pure functions.

N clips, A assignments. A choice is (N,) assignment indices, or one for all clips. Distances are (N, A).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.common.bootstrap import bootstrap
from evatok_hf.allocation.strategies import best_within, shortest_within
from evatok_hf.models.configuration_evatok import AssignmentSpace


def fixed_choices(training: torch.Tensor, space: AssignmentSpace) -> list[int]:
    """The assignments that are best for all clips alike, one for each budget, fitted on training clips (N', A).

    Of those of all budgets, only the ones on the lower convex hull of distance over log tokens: others are beaten by
    mixing their neighbours.
    """
    mean = training.double().mean(0, keepdim=True)
    total = space.all().sum(-1)
    best = sorted({int(best_within(-mean, space, budget)) for budget in set(total.tolist())}, key=lambda i: total[i])
    hull: list[tuple[float, float, int]] = []  # log tokens, distance, assignment
    for index in best:
        x, y = float(total[index].double().log2()), float(mean[0, index])
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y, index))
    return [index for _, _, index in hull]


def threshold_choices(distances: torch.Tensor, space: AssignmentSpace, levels: int = 9) -> list[torch.Tensor]:
    """The fewest tokens within each of some bounds, percentiles of the distances of all assignments."""
    some = distances.double().flatten()[:: max(1, distances.numel() // 10**6)]
    bounds = torch.quantile(some, torch.linspace(0.1, 0.9, levels).double())
    return [shortest_within(distances, space, float(bound)) for bound in bounds]


def points(choices: Sequence[torch.Tensor | int], table: torch.Tensor, space: AssignmentSpace) -> np.ndarray:
    """Tokens, distance and PSNR of every clip under each choice: (points, N, 3); table (N, A, 3)."""
    total = space.all().sum(-1).double().expand(len(table), -1)
    figures = torch.cat([total[..., None], table[..., :2].double()], dim=-1)  # (N, A, 3)
    return torch.stack([figures[torch.arange(len(table)), choice] for choice in choices]).numpy()


def tokens_at(curve: np.ndarray, distance: float) -> float:
    """Tokens at which a curve (points, 2) of mean tokens and mean distance reaches a distance.

    Linear in log tokens between points, from shortest to longest; NaN outside the curve.
    """
    order = np.argsort(curve[:, 0])
    log_tokens, distances = np.log2(curve[order, 0]), np.minimum.accumulate(curve[order, 1])
    if not distances[-1] <= distance <= distances[0]:
        return float("nan")
    return float(2 ** np.interp(-distance, -distances, log_tokens))


def savings(point: np.ndarray, curve: np.ndarray) -> float:
    """Share of tokens that a point (N, 3) saves against a curve (points, N, 3) at equal mean distance, in %."""
    mine, other = point.mean(0), curve.mean(1)
    return 100 * (1 - mine[0] / tokens_at(other[:, :2], mine[1]))


def savings_with_interval(point: np.ndarray, curve: np.ndarray, rounds: int = 2000) -> dict[str, float]:
    """`savings`, and its 95 % interval over clips."""
    ends = bootstrap(lambda index: savings(point[index], curve[:, index]), len(point), rounds=rounds)
    low, high = (float("nan") if end is None else end for end in ends)
    return {"percent": savings(point, curve), "low": low, "high": high}


def top_k(logits: torch.Tensor, best: torch.Tensor, k: int) -> float:
    """The share of clips whose best assignment is among the k likeliest, in %."""
    return 100 * float((logits.topk(k, dim=-1).indices == best[:, None]).any(-1).double().mean())
