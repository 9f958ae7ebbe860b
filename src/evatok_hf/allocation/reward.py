"""The proxy reward: quality against tokens, and what follows from it (paper, section 3).

`R = w_q Q - w_l L` with `w_l = 2 - w_q`. Q is 1 at the lower and 0 at the upper of two bounds on a perceptual distance,
which belong to a whole set of clips and never to one: a clip's own range would hide how easy it is. L is 0 for the
shortest assignment and 1 for the longest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..models.configuration_evatok import AssignmentSpace
from ..models.modeling_evatok_router import DEFAULT_QUALITY, check_quality, token_cost


@dataclass(frozen=True)
class DistanceBounds:
    """Distances at which quality is 1 (`low`) and 0 (`high`).

    Raises:
        ValueError: unless 0 <= low < high.
    """

    low: float
    high: float

    def __post_init__(self):
        if not 0 <= self.low < self.high:
            raise ValueError(f"bounds of the distance must satisfy 0 <= low < high, got {self.low} and {self.high}.")

    @classmethod
    def of(cls, distances: torch.Tensor, lower: float = 1.0, upper: float = 99.0) -> DistanceBounds:
        """Percentiles of the distances of all clips under all assignments (1 and 99, our choice, against outliers).

        Raises:
            ValueError: no distances, or all equal.
        """
        if distances.numel() == 0 or not distances.isfinite().all():
            raise ValueError("bounds need at least one distance, and only finite ones.")
        # Not torch.quantile, which refuses more than 2**24 values.
        low, high = np.percentile(distances.double().cpu().numpy(), [lower, upper]).tolist()
        if low == high:
            raise ValueError(f"all distances are {low:.4g}; bounds need clips that differ.")
        return cls(low, high)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def proxy_reward(
    distances: torch.Tensor,
    space: AssignmentSpace,
    bounds: DistanceBounds,
    quality: float | torch.Tensor = DEFAULT_QUALITY,
) -> torch.Tensor:
    """R of every clip under every assignment.

    Args:
        distances: (B, A) perceptual distances in the index order of the space.
        space: of the assignments.
        bounds: of the distance; distances outside them give Q outside 0..1, so that order is never lost.
        quality: w_q, one for all clips or (B,).

    Returns:
        (B, A) float64.

    Raises:
        ValueError: a table of another space, or a quality outside 0..2.
    """
    check_table(distances, space)
    weight = check_quality(quality).reshape(-1, 1)
    if len(weight) not in (1, len(distances)):
        raise ValueError(f"quality has {len(weight)} values for {len(distances)} clips; give one, or one a clip.")
    normalised = (bounds.high - distances.double()) / (bounds.high - bounds.low)
    return weight * normalised - (2 - weight) * token_cost(space)


def best_assignments(rewards: torch.Tensor, space: AssignmentSpace) -> torch.Tensor:
    """Index of the largest reward of every clip, (B, A) -> (B,) int64; of equal ones the shortest assignment."""
    check_table(rewards, space)
    order = space.all().sum(-1).argsort(stable=True)
    return order[rewards[:, order].argmax(-1)]


def reward_percentile(rewards: torch.Tensor, chosen: torch.Tensor) -> float:
    """P of the paper: where the mean reward of the choices lies between those of the worst and the best ones, in %.

    Args:
        rewards: (B, A).
        chosen: (B,) assignment indices.

    Returns:
        100 for the best possible choices, 0 for the worst.

    Raises:
        ValueError: no clips, or rewards that are all equal.
    """
    if len(rewards) == 0 or len(rewards) != len(chosen):
        raise ValueError(f"rewards of {len(rewards)} clips do not fit {len(chosen)} choices; both need the same clips.")
    best, worst = rewards.max(-1).values.mean(), rewards.min(-1).values.mean()
    if best == worst:
        raise ValueError("all assignments have the same reward; a percentile needs rewards that differ.")
    mean = rewards.gather(1, chosen[:, None].to(rewards.device)).mean()
    return float((mean - worst) / (best - worst) * 100)


def check_table(table: torch.Tensor, space: AssignmentSpace) -> None:
    """Raises ValueError unless a table has a column for each assignment."""
    if table.ndim != 2 or table.shape[1] != len(space):
        raise ValueError(
            f"a table for {space} has shape (clips, {len(space)}), got {tuple(table.shape)}; it is of another space."
        )
