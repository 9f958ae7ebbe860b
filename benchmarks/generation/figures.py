"""What the generation benchmark makes of features, token counts, answers and errors of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import rankdata

from benchmarks.common.bootstrap import ROUNDS, bootstrap

# A frame that stands still equals the copied one to the last bit; its PSNR counts no more than this, dB (our choice).
HIGHEST_PSNR = 50.0


# --- sets of clips ----------------------------------------------------------------------------------------------------


def same_proportions(sets: Sequence[torch.Tensor], num_classes: int, most: int | None = None) -> list[torch.Tensor]:
    """The first clips of each class of each set, as many as every set has of that class.

    Args:
        sets: labels of the clips of each set, (N_i,) int64.
        num_classes: labels lie below it.
        most: no more of a class than that.

    Returns:
        Places of the chosen clips in each set, (M,) int64, all class after class.
    """
    chosen: list[list[torch.Tensor]] = [[] for _ in sets]
    for label in range(num_classes):
        places = [torch.nonzero(labels == label)[:, 0] for labels in sets]
        count = min([len(rows) for rows in places] + ([most] if most is not None else []))
        for rows, place in zip(chosen, places, strict=True):
            rows.append(place[:count])
    return [torch.cat(rows) for rows in chosen]


def of_other_classes(labels: torch.Tensor, label: int, count: int) -> torch.Tensor:
    """`count` places (or all there are) of clips of any class but one, evenly spread, (n,) int64."""
    others = torch.nonzero(labels != label)[:, 0]
    return others[torch.linspace(0, len(others) - 1, min(count, len(others))).round().long()]


def frozen(video: torch.Tensor) -> torch.Tensor:
    """Clips (B, F, ...) that stand still: their first frame, held."""
    return video[:, :1].expand_as(video).contiguous()


# --- Frechet distance -------------------------------------------------------------------------------------------------


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """The distance of `evatok_hf.metrics.frechet` between features (N, D) and (M, D), where these are few.

    tr((S_a S_b)^(1/2)) is the sum of the singular values of A B^T, where A^T A = S_a and B^T B = S_b: with rows of
    centred features over the root of their number, a matrix of N x M instead of two of D x D. Exact; no eigenvalue is
    cut off.
    """
    a, b = a.double(), b.double()
    means = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / len(x) ** 0.5 for x in (a, b))
    return float(means + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def frechet_by_class(a: torch.Tensor, b: torch.Tensor, labels: torch.Tensor, num_classes: int) -> list[float | None]:
    """Distances between the clips of each class, of two sets with the same labels; None for fewer than two clips."""
    masks = [labels == label for label in range(num_classes)]
    return [frechet(a[mine], b[mine]) if int(mine.sum()) > 1 else None for mine in masks]


def mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# --- intervals --------------------------------------------------------------------------------------------------------


def ratio(right: torch.Tensor, reference: torch.Tensor, rounds: int = ROUNDS) -> dict[str, float | None]:
    """Share of true values in `right` over that in `reference`, and its interval over the clips of both."""
    a, b = right.double().numpy(), reference.double().numpy()

    def figure(i: np.ndarray, j: np.ndarray) -> float:
        return a[i].mean() / b[j].mean() if b[j].any() else np.nan

    low, high = bootstrap(figure, len(a), len(b), rounds=rounds)
    value = figure(np.arange(len(a)), np.arange(len(b)))
    return {"value": float(value) if np.isfinite(value) else None, "low": low, "high": high}


def rank_correlation(a: Sequence[float], b: Sequence[float], rounds: int = ROUNDS) -> dict[str, float | None]:
    """Spearman's rank correlation of two figures of each class, and its interval over the classes.

    Ties get their mean rank. No number where all values of a side are equal, or with fewer than three classes.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)

    def figure(i: np.ndarray) -> float:
        if len(set(a[i])) < 2 or len(set(b[i])) < 2:
            return float("nan")
        return float(np.corrcoef(rankdata(a[i]), rankdata(b[i]))[0, 1])

    value = figure(np.arange(len(a))) if len(a) > 2 else float("nan")
    low, high = bootstrap(figure, len(a), rounds=rounds) if np.isfinite(value) else (None, None)
    return {"value": value if np.isfinite(value) else None, "low": low, "high": high}


# --- prediction -------------------------------------------------------------------------------------------------------


def squared_errors(truth: torch.Tensor, made: torch.Tensor, frames: Sequence[int]) -> np.ndarray:
    """Mean squared error of single frames of clips (B, F, 3, H, W) in [-1, 1], for values in 0..1: (B, frames)."""
    places = list(frames)
    return ((truth[:, places].double() - made[:, places].double()) / 2).square().flatten(2).mean(2).numpy()


def psnr_of_clips(errors: np.ndarray) -> np.ndarray:
    """dB of each squared error, at most `HIGHEST_PSNR`."""
    return np.minimum(HIGHEST_PSNR, -10 * np.log10(np.maximum(errors, 1e-12)))


def psnr_of_mean(errors: np.ndarray) -> float:
    """dB of the mean over clips of their squared errors, (B,)."""
    return float(-10 * np.log10(max(float(errors.mean()), 1e-12)))


def compare_predictions(
    errors: dict[str, np.ndarray], distances: dict[str, np.ndarray], against: str, rounds: int = ROUNDS
) -> dict[str, dict]:
    """Figures of one frame for each way to have it, and how each differs from the one called `against`.

    Args:
        errors: squared errors of each way, (B,) of the same clips.
        distances: perceptual distances of each way, (B,).
        against: one of the ways.

    Returns:
        For each way "psnr_by_clip" (mean of the clips' PSNR), "psnr_of_mean_error", "distance" and "capped" (clips
        whose PSNR was cut to `HIGHEST_PSNR`); and for all but `against` the differences of the first three with 95 %
        bootstrap intervals over clips, pairs kept together.
    """
    measures: dict[str, tuple[dict[str, np.ndarray], Callable[[np.ndarray], float]]] = {
        "psnr_by_clip": ({way: psnr_of_clips(values) for way, values in errors.items()}, np.mean),
        "psnr_of_mean_error": (errors, psnr_of_mean),
        "distance": (distances, np.mean),
    }
    report: dict[str, dict] = {}
    for way in errors:
        row = {name: float(figure(values[way])) for name, (values, figure) in measures.items()}
        row["capped"] = int((psnr_of_clips(errors[way]) >= HIGHEST_PSNR).sum())
        if way != against:
            row["difference"] = {}
            for name, (values, figure) in measures.items():
                mine, other = values[way], values[against]
                low, high = bootstrap(
                    lambda i, mine=mine, other=other, figure=figure: figure(mine[i]) - figure(other[i]),
                    len(mine),
                    rounds=rounds,
                )
                row["difference"][name] = {"value": float(figure(mine) - figure(other)), "low": low, "high": high}
        report[way] = row
    return report
