"""Frechet distance between two sets of features, each taken as a Gaussian.

The conventions are those of LARP's evaluation (public code, `utils/fvd/fvd.py`), which the tables of adaptive video
tokenizers follow: float64, the population covariance (divided by N, not N - 1), eigenvalues below 1e-10 not rooted.
"""

from __future__ import annotations

import torch

_SMALLEST_EIGENVALUE = 1e-10


class FrechetStatistics:
    """Mean and covariance of features that come batch by batch, in memory that does not grow with their number.

    Batches are merged by the mean and the scatter around it (Chan, Golub and LeVeque 1979), in float64: no large
    second moments are subtracted from each other, so that features far from zero lose no digits.

    Args:
        dim: width D of the features.

    Attributes:
        count: features seen, N.
        scatter: (D, D) float64 on the CPU, sum over features of the outer products of their deviations from the mean.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, dim: int):
        if dim < 1:
            raise ValueError(f"features have at least one dimension, got {dim}.")
        self.dim = dim
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        """Adds features, (N, D) floats on any device.

        Raises:
            ValueError: another shape, or a feature that is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            raise ValueError(
                f"features must be floats (N, {self.dim}), got {features.dtype} of shape {tuple(features.shape)}."
            )
        features = features.detach().cpu().double()
        if not torch.isfinite(features).all():
            raise ValueError("features hold NaN or infinity; check the videos and the weights that they come from.")
        if len(features) == 0:
            return
        mean = features.mean(0)
        centred = features - mean
        self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: FrechetStatistics) -> None:
        """Adds all features that another has seen, which stays as it is. Raises ValueError for another width."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of {self.dim} and {other.dim} dimensions cannot be merged.")
        if other.count:
            self._add(other.count, other._mean, other.scatter)

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total = self.count + count
        shift = mean - self._mean
        self._mean = self._mean + shift * (count / total)
        self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.count = total

    @property
    def mean(self) -> torch.Tensor:
        """The mean of the features, (D,) float64. Raises ValueError without features."""
        if self.count == 0:
            raise ValueError("there are no features, so that they have no mean; update with some first.")
        return self._mean

    @property
    def covariance(self) -> torch.Tensor:
        """The covariance of the features, (D, D) float64, divided by N. Raises ValueError for fewer than two."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two features, got {self.count}; measure more clips.")
        return self.scatter / self.count

    def state_dict(self) -> dict[str, int | torch.Tensor]:
        """The state that `from_state_dict` takes, such as to send it to another process."""
        return {"count": self.count, "mean": self._mean, "scatter": self.scatter}

    @classmethod
    def from_state_dict(cls, state: dict[str, int | torch.Tensor]) -> FrechetStatistics:
        """The statistics whose `state_dict` this is."""
        made = cls(len(state["mean"]))
        made.count, made._mean, made.scatter = int(state["count"]), state["mean"].clone(), state["scatter"].clone()
        return made


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> float:
    """The distance |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S being covariances.

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2): real, and exact for covariances of
    any rank, as they are with fewer features than dimensions. Eigenvalues of S_a and S_b below 1e-10 count as 0 in the
    roots, which can add up to 2e-10 a dimension. Nothing else is cut off: between equal sets of features the result
    is 0 but for rounding, about 1e-13 of the traces, and may then be negative.

    Raises:
        ValueError: different widths, or fewer than two features in one of them.
    """
    if a.dim != b.dim:
        raise ValueError(f"features of {a.dim} and {b.dim} dimensions cannot be compared; use one extractor for both.")
    covariance_a, covariance_b = a.covariance, b.covariance
    root = torch.linalg.svdvals(_root(covariance_a).T @ _root(covariance_b)).sum()
    trace = covariance_a.trace() + covariance_b.trace() - 2 * root
    return float((a.mean - b.mean).square().sum() + trace)


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """R (D, D) with R R^T = S for a symmetric S (D, D) without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * torch.where(values < _SMALLEST_EIGENVALUE, 0.0, values).sqrt()
