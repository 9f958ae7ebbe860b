"""The Frechet distance and the statistics that it is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from evatok_hf.metrics.frechet import FrechetStatistics, frechet_distance


def features(count: int, dim: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    """(N, D) float64, correlated."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + offset)


def statistics(*batches: torch.Tensor) -> FrechetStatistics:
    made = FrechetStatistics(batches[0].shape[1])
    for batch in batches:
        made.update(batch)
    return made


def reference(a: torch.Tensor, b: torch.Tensor) -> float:
    """As it is usually written: the matrix square root of the product of the covariances."""
    cov_a, cov_b = (np.atleast_2d(np.cov(x.numpy(), rowvar=False, bias=True)) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    shift = (a.mean(0) - b.mean(0)).square().sum().item()
    return shift + float(np.trace(cov_a + cov_b - 2 * np.real(root)))


@pytest.mark.parametrize("dim", [1, 5, 24])
def test_equal_to_the_usual_formula(dim):
    a, b = features(200, dim, 0), features(300, dim, 1, offset=0.5)
    found = frechet_distance(statistics(a), statistics(b))
    assert found == pytest.approx(reference(a, b), abs=1e-6, rel=1e-9) and found > 0.1
    assert frechet_distance(statistics(b), statistics(a)) == pytest.approx(found, rel=1e-9)


def test_one_dimension_by_hand():
    # Means 1 and 5; standard deviations, divided by N, 1 and 3.
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[2.0], [8.0]])
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx((1 - 5) ** 2 + (1 - 3) ** 2, abs=1e-9)


def test_independent_dimensions_add_up():
    # Four corners of rectangles of half sides (1, 2) and (3, 5).
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    a, b = statistics(corners * torch.tensor([1.0, 2.0])), statistics(corners * torch.tensor([3.0, 5.0]) + 1)
    assert frechet_distance(a, b) == pytest.approx(2 + (3 - 1) ** 2 + (5 - 2) ** 2)


@pytest.mark.parametrize(("count", "dim"), [(50, 8), (6, 40)])
def test_equal_sets_are_at_distance_zero(count, dim):
    x = features(count, dim)
    distance = frechet_distance(statistics(x), statistics(x.flip(0)))
    assert isinstance(distance, float) and abs(distance) < 1e-6


def test_fewer_features_than_dimensions():
    a, b = features(5, 30, 0), features(7, 30, 1)
    # The root of a product of covariances of rank 4 and 6, by the singular values of the features themselves.
    left, right = ((x - x.mean(0)) / math.sqrt(len(x)) for x in (a, b))
    root = np.linalg.svd((left @ right.T).numpy(), compute_uv=False).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + left.square().sum() + right.square().sum() - 2 * root
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streaming_and_merging_equal_one_pass(offset):
    x = features(97, 6, offset=offset)
    whole = statistics(x)
    streamed = statistics(*x.split([1, 2, 0, 30, 64]))
    first, second = statistics(*x[:40].split(7)), statistics(x[40:])
    first.merge(second)
    empty = FrechetStatistics(6)
    empty.merge(first)
    empty.merge(FrechetStatistics(6))
    sent = FrechetStatistics.from_state_dict(empty.state_dict())
    expected = np.cov(x.numpy(), rowvar=False, bias=True)
    for made in (whole, streamed, first, sent):
        assert made.count == 97 and second.count == 57
        assert torch.allclose(made.mean, x.mean(0), rtol=1e-13)
        assert np.allclose(made.covariance.numpy(), expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())
        assert abs(frechet_distance(made, whole)) < 1e-6


def test_merging_leaves_the_other_as_it_is():
    a, b = statistics(features(9, 3)), statistics(features(5, 3, 1))
    empty = FrechetStatistics(3)
    empty.merge(b)
    empty.merge(a)
    copy = FrechetStatistics.from_state_dict(b.state_dict())
    copy.update(features(4, 3, 2))
    assert b.count == 5 and torch.equal(b.covariance, statistics(features(5, 3, 1)).covariance)


def test_single_precision_is_summed_in_double():
    x = features(1000, 2).float() + 100
    assert torch.allclose(statistics(*x.split(1)).mean, x.double().mean(0), rtol=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite(value):
    x = features(4, 3)
    x[2, 1] = value
    made = FrechetStatistics(3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        made.update(x)
    assert made.count == 0


def test_mistakes_are_refused():
    one, two = statistics(features(1, 3)), statistics(features(2, 3))
    with pytest.raises(ValueError, match="at least two features, got 1"):
        frechet_distance(two, one)
    with pytest.raises(ValueError, match="no features"):
        _ = FrechetStatistics(3).mean
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(two, statistics(features(9, 4)))
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        two.merge(FrechetStatistics(4))
    for wrong in (features(2, 4), features(2, 3)[0], torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"must be floats \(N, 3\)"):
            two.update(wrong)
    with pytest.raises(ValueError, match="at least one dimension"):
        FrechetStatistics(0)
