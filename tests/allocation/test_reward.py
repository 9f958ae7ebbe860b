"""The proxy reward: what it prefers, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from evatok_hf import AssignmentSpace
from evatok_hf.allocation.reward import DistanceBounds, best_assignments, proxy_reward, reward_percentile
from evatok_hf.models.modeling_evatok_router import check_quality, token_cost

SPACE = AssignmentSpace((2, 4, 8), 2)  # (2, 2), (2, 4), (2, 8), (4, 2), .. (8, 8): 4 to 16 tokens
BOUNDS = DistanceBounds(0.2, 1.2)


def distances_of(clips: list[list[float]]) -> torch.Tensor:
    """Distance of each clip as a function of its first and second block's candidate: start - gain_1 - gain_2."""
    gains = torch.tensor(clips)
    first, second = torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij")
    return gains[:, :1] - gains[:, 1:2] * first.flatten() - gains[:, 2:] * second.flatten()


def test_cost_runs_from_the_shortest_to_the_longest_assignment():
    assert token_cost(SPACE).tolist() == pytest.approx([(total - 4) / 12 for total in (4, 6, 10, 6, 8, 12, 10, 12, 16)])
    assert token_cost(AssignmentSpace((8,), 4)).tolist() == [0.0]


def test_reward_is_weighted_quality_minus_weighted_cost():
    distances = torch.linspace(0.2, 1.2, 9).repeat(2, 1)
    rewards = proxy_reward(distances, SPACE, BOUNDS, 1.2)
    expected = 1.2 * torch.linspace(1, 0, 9).double() - 0.8 * token_cost(SPACE)
    assert torch.allclose(rewards, expected.expand(2, -1), atol=1e-6)
    each = proxy_reward(distances, SPACE, BOUNDS, torch.tensor([1.2, 2.0]))
    assert torch.allclose(each[0], rewards[0], atol=1e-6)
    assert torch.allclose(each[1], 2 * torch.linspace(1, 0, 9).double(), atol=1e-6)


def test_tokens_go_where_they_help():
    still, early, late = [0.5, 0.0, 0.0], [1.0, 0.3, 0.01], [1.0, 0.01, 0.3]
    distances = distances_of([still, early, late])
    chosen = SPACE.to_lengths(best_assignments(proxy_reward(distances, SPACE, BOUNDS), SPACE)).tolist()
    assert chosen == [[2, 2], [4, 2], [2, 4]] or chosen == [[2, 2], [8, 2], [2, 8]]


def test_more_weight_on_quality_never_shortens_the_choice():
    distances = distances_of([[1.0, 0.2, 0.1], [0.9, 0.05, 0.3], [0.7, 0.1, 0.1]])
    totals = []
    for quality in torch.linspace(0, 2, 21).tolist():
        chosen = best_assignments(proxy_reward(distances, SPACE, BOUNDS, quality), SPACE)
        totals.append(SPACE.to_lengths(chosen).sum(-1))
    totals = torch.stack(totals)
    assert (totals.diff(dim=0) >= 0).all()
    assert totals[0].tolist() == [4] * 3 and totals[-1].tolist() == [16] * 3


def test_equal_rewards_give_the_shortest_assignment():
    assert best_assignments(torch.zeros(1, 9), SPACE).tolist() == [0]
    rewards = torch.zeros(1, 9)
    rewards[0, [2, 4]] = 1.0  # (2, 8) and (4, 4)
    assert best_assignments(rewards, SPACE).tolist() == [4]


def test_percentile_of_best_worst_and_middle():
    rewards = torch.tensor([[0.0, 1.0, 0.5], [0.0, 3.0, 1.5]])
    assert reward_percentile(rewards, torch.tensor([1, 1])) == pytest.approx(100)
    assert reward_percentile(rewards, torch.tensor([0, 0])) == pytest.approx(0)
    assert reward_percentile(rewards, torch.tensor([2, 2])) == pytest.approx(50)
    assert reward_percentile(rewards, torch.tensor([0, 1])) == pytest.approx(75)  # means first, then their ratio


def test_bounds_ignore_outliers_and_belong_to_the_whole_set():
    distances = torch.cat([torch.linspace(0.3, 1.3, 1001), torch.tensor([50.0])])[None]
    bounds = DistanceBounds.of(distances)
    assert bounds.low == pytest.approx(0.31, abs=1e-3) and bounds.high == pytest.approx(1.29, abs=2e-3)
    assert DistanceBounds(**bounds.to_dict()) == bounds


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_quality(2.5), "quality must lie between 0 .* and 2 .*2.5"),
        (lambda: check_quality(float("nan")), "quality must lie between"),
        (lambda: proxy_reward(torch.zeros(2, 8), SPACE, BOUNDS), r"\(clips, 9\), got \(2, 8\); it is of another space"),
        (lambda: best_assignments(torch.zeros(9), SPACE), "another space"),
        (lambda: proxy_reward(torch.zeros(2, 9), SPACE, BOUNDS, torch.ones(3)), "3 values for 2 clips"),
        (lambda: DistanceBounds(0.5, 0.5), "low < high, got 0.5 and 0.5"),
        (lambda: DistanceBounds.of(torch.ones(3, 9)), "all distances are 1"),
        (lambda: DistanceBounds.of(torch.tensor([[1.0, torch.nan]])), "finite"),
        (lambda: DistanceBounds.of(torch.empty(0, 9)), "at least one distance"),
        (lambda: reward_percentile(torch.ones(2, 9), torch.zeros(2, dtype=torch.long)), "same reward"),
        (lambda: reward_percentile(torch.ones(2, 9), torch.zeros(1, dtype=torch.long)), "2 clips do not fit 1 choices"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
