"""What the benchmark of assignments makes of tables: curves, savings at equal distance, intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.quality import curve_figures as figures
from evatok_hf import AssignmentSpace
from evatok_hf.allocation.reward import DistanceBounds, best_assignments, proxy_reward

SPACE = AssignmentSpace((8, 16, 32), 2)
UNIFORM = [int(SPACE.to_index([length] * 2)) for length in SPACE.block_lengths]


def made_up_table(clips: int, seed: int = 0) -> torch.Tensor:
    """(N, A, 3): distance falls with tokens, faster in block 1, and by another factor for each clip."""
    generator = torch.Generator().manual_seed(seed)
    hardness = torch.rand(clips, 1, generator=generator) * 2
    first, second = SPACE.all().double().log2().T
    distance = 2 + hardness - 0.2 * hardness * first - 0.1 * second * (2 - hardness)
    return torch.stack([distance, 30 - 5 * distance, distance / 100], dim=-1).float()


def test_tokens_at_a_distance_lie_between_the_points_of_a_curve():
    curve = np.array([[32, 1.0], [64, 0.8], [128, 0.6]])
    assert figures.tokens_at(curve, 0.8) == pytest.approx(64)
    assert figures.tokens_at(curve[::-1], 0.7) == pytest.approx(64 * 2**0.5)
    assert np.isnan(figures.tokens_at(curve, 0.5)) and np.isnan(figures.tokens_at(curve, 1.1))


def test_savings_against_itself_are_nothing_and_half_the_tokens_are_half():
    table = made_up_table(40)
    uniform = figures.points(UNIFORM, table, SPACE)
    assert uniform.shape == (3, 40, 3) and uniform[1, :, 0].tolist() == [32] * 40
    assert figures.savings(uniform[1], uniform) == pytest.approx(0, abs=1e-9)
    half = uniform[1].copy()
    half[:, 0] /= 2
    result = figures.savings_with_interval(half, uniform, rounds=200)
    assert result["percent"] == pytest.approx(50) and result["low"] <= 50 <= result["high"]


def test_search_beats_fixed_and_fixed_beats_uniform():
    training, table = made_up_table(60, seed=1), made_up_table(40)
    bounds = DistanceBounds.of(training[..., 0])
    fixed = figures.points(figures.fixed_choices(training[..., 0], SPACE), table, SPACE)
    mean = fixed.mean(1)
    assert (np.diff(mean[:, 0]) > 0).all() and (np.diff(mean[:, 1]) < 0).all()
    slopes = np.diff(mean[:, 1]) / np.diff(np.log2(mean[:, 0]))
    assert (np.diff(slopes) > -0.05).all()  # a hull, but for clips other than those it was fitted on
    uniform = figures.points(UNIFORM, table, SPACE)
    searched = [best_assignments(proxy_reward(table[..., 0], SPACE, bounds, q), SPACE) for q in (1.3, 1.6)]
    for point in figures.points(searched, table, SPACE):
        assert figures.savings(point, fixed) > 0
        assert figures.savings(point, uniform) > figures.savings(point, fixed)


def test_thresholds_spend_more_for_a_nearer_bound():
    table = made_up_table(40)
    choices = figures.threshold_choices(table[..., 0], SPACE, levels=5)
    tokens = figures.points(choices, table, SPACE)[..., 0].mean(1)
    assert (np.diff(tokens) <= 0).all() and tokens[0] > tokens[-1]


def test_top_k():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert figures.top_k(logits, torch.tensor([1, 2]), 1) == 50
    assert figures.top_k(logits, torch.tensor([1, 1]), 2) == 100
