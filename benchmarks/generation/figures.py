"""Figures of the generation benchmark, from features, token counts, answers and errors of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import rankdata

from benchmarks.common.bootstrap import ROUNDS, with_interval

# A frame that stands still equals the copied one to the last bit; its PSNR counts no more than this, dB (our choice).
HIGHEST_PSNR = 50.0


def same_proportions(sets: Sequence[torch.Tensor], num_classes: int, most: int | None = None) -> list[torch.Tensor]:
    """The first clips of each class of sets with these labels, (N_i,) int64, as many as every set has of that class, or
    `most`: their places in each set, (M,) int64, class after class."""
    chosen = []
    for label in range(num_classes):
        places = [torch.nonzero(labels == label)[:most, 0] for labels in sets]
        count = min(map(len, places))
        chosen.append([place[:count] for place in places])
    return [torch.cat(rows) for rows in zip(*chosen, strict=True)]


def of_other_classes(labels: torch.Tensor, label: int, count: int) -> torch.Tensor:
    """`count` places (or all there are) of clips of any class but one, evenly spread, (n,) int64."""
    others = torch.nonzero(labels != label)[:, 0]
    return others[torch.linspace(0, len(others) - 1, min(count, len(others))).round().long()]


def frozen(video: torch.Tensor) -> torch.Tensor:
    """Clips (B, F, ...) that stand still: their first frame, held."""
    return video[:, :1].expand_as(video).contiguous()


def frechet(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """The distance of `evatok_hf.metrics.frechet` between features (N, D) and (M, D), where these are few; None where
    there are fewer than two.

    tr((S_a S_b)^(1/2)) is the sum of the singular values of A B^T, where A^T A = S_a and B^T B = S_b: with rows of
    centred features over the root of their number, a matrix of N x M instead of two of D x D. Exact; no eigenvalue is
    cut off.
    """
    if min(len(a), len(b)) < 2:
        return None
    a, b = a.double(), b.double()
    means = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / len(x) ** 0.5 for x in (a, b))
    return float(means + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def ratio(right: torch.Tensor, reference: torch.Tensor, rounds: int = ROUNDS) -> dict[str, float | None]:
    """Share of true values in `right` over that in `reference`, and its interval over the clips of both."""
    a, b = right.double().numpy(), reference.double().numpy()

    def figure(i: np.ndarray, j: np.ndarray) -> float:
        return a[i].mean() / b[j].mean() if b[j].any() else np.nan

    return with_interval(figure, len(a), len(b), rounds=rounds)


def rank_correlation(a: Sequence[float], b: Sequence[float], rounds: int = ROUNDS) -> dict[str, float | None]:
    """Spearman's rank correlation of two figures of each class, and its interval over the classes.

    Ties get their mean rank. No number where all values of a side are equal, or with fewer than three classes.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)

    def figure(i: np.ndarray) -> float:
        if len(i) < 3 or len(set(a[i])) < 2 or len(set(b[i])) < 2:
            return np.nan
        return np.corrcoef(rankdata(a[i]), rankdata(b[i]))[0, 1]

    return with_interval(figure, len(a), rounds=rounds)


def squared_errors(truth: torch.Tensor, made: torch.Tensor, frames: Sequence[int]) -> np.ndarray:
    """Mean squared error of single frames of clips (B, F, 3, H, W) in [-1, 1], for values in 0..1: (B, frames)."""
    places = list(frames)
    return ((truth[:, places].double() - made[:, places].double()) / 2).square().flatten(2).mean(2).numpy()


def psnr_of_clips(errors: np.ndarray) -> np.ndarray:
    """dB of each squared error, at most `HIGHEST_PSNR`."""
    return np.minimum(HIGHEST_PSNR, -10 * np.log10(np.maximum(errors, 1e-12)))


def compare_predictions(
    errors: dict[str, np.ndarray], distances: dict[str, np.ndarray], against: str, rounds: int = ROUNDS
) -> dict[str, dict]:
    """Figures of one frame for each way to have it, of squared errors and perceptual distances (B,) of the same clips.

    Returns:
        For each way "psnr_by_clip" (mean of the clips' PSNR), "psnr_of_mean_error", "distance" and "capped" (clips
        whose PSNR was cut to `HIGHEST_PSNR`); and for all but `against` "difference", what the first three have more
        than those of `against`, with intervals over clips, pairs kept together.
    """
    measures: dict[str, tuple[dict[str, np.ndarray], Callable[[np.ndarray], float]]] = {
        "psnr_by_clip": ({way: psnr_of_clips(values) for way, values in errors.items()}, np.mean),
        "psnr_of_mean_error": (errors, lambda values: -10 * np.log10(max(values.mean(), 1e-12))),
        "distance": (distances, np.mean),
    }

    def gain(name: str, way: str) -> dict[str, float | None]:
        values, figure = measures[name]
        mine, other = values[way], values[against]
        return with_interval(lambda i: figure(mine[i]) - figure(other[i]), len(mine), rounds=rounds)

    report: dict[str, dict] = {}
    for way in errors:
        report[way] = {name: float(figure(values[way])) for name, (values, figure) in measures.items()}
        report[way]["capped"] = int((psnr_of_clips(errors[way]) >= HIGHEST_PSNR).sum())
        if way != against:
            report[way]["difference"] = {name: gain(name, way) for name in measures}
    return report
