"""Reconstruction metrics on frames in memory, and how much of a codebook is used."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

_SSIM_WINDOW, _SSIM_SIGMA, _SSIM_K1, _SSIM_K2 = 11, 1.5, 0.01, 0.03  # of the SSIM paper


def to_unit_range(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] or float [-1, 1] frames -> float64 [0, 1]. Raises ValueError for other dtypes."""
    if frames.dtype == torch.uint8:
        return frames.double() / 255
    if frames.is_floating_point():
        return (frames.double() + 1) / 2
    raise ValueError(f"frames must be uint8 or floats in [-1, 1], got {frames.dtype}.")


def psnr(reference: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each clip, over all its pixels and frames.

    Args:
        reference, reconstruction: (B, ...) uint8, or floats in [-1, 1]; both are taken as they are, nothing is clamped.

    Returns:
        (B,) float64; infinite for equal clips.

    Raises:
        ValueError: shapes that differ.
    """
    if reference.shape != reconstruction.shape:
        raise ValueError(f"clips differ in shape: {tuple(reference.shape)} and {tuple(reconstruction.shape)}.")
    error = (to_unit_range(reference) - to_unit_range(reconstruction)).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def frame_psnr(reference: np.ndarray, reconstruction: np.ndarray) -> float:
    """`psnr` of a frame or a video, uint8 arrays of one shape, over all of it."""
    return float(psnr(torch.from_numpy(reference)[None], torch.from_numpy(reconstruction)[None]))


def ssim(reference: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each clip: the mean over its frames of each frame's SSIM.

    The convention of Wang et al. 2004 (IEEE TIP 13(4)): an 11 x 11 Gaussian window of sigma 1.5 whose weights sum to 1,
    K1 0.01, K2 0.03, weighted variances without a correction for the sample size, only windows that lie wholly inside
    the frame. Computed in float64 for a data range of 1. Our choice where conventions differ: on each of the RGB
    channels, of which the mean is taken, rather than on luma.

    Args:
        reference, reconstruction: (B, F, C, H, W) uint8, or floats in [-1, 1]; taken as they are, nothing is clamped.

    Returns:
        (B,) float64, 1 for equal clips.

    Raises:
        ValueError: shapes that differ or are not five-dimensional, or frames smaller than the window.
    """
    if reference.shape != reconstruction.shape:
        raise ValueError(f"clips differ in shape: {tuple(reference.shape)} and {tuple(reconstruction.shape)}.")
    if reference.ndim != 5:
        raise ValueError(f"clips must be (B, F, C, H, W), got {tuple(reference.shape)}.")
    if min(reference.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs frames of at least {_SSIM_WINDOW} x {_SSIM_WINDOW} pixels, got "
            f"{reference.shape[-2]} x {reference.shape[-1]}; leave it out for smaller ones."
        )
    values = [_ssim(a, b) for a, b in zip(reference, reconstruction, strict=True)]
    return torch.stack(values) if values else torch.empty(0, dtype=torch.float64)


def _ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two clips (F, C, H, W) -> the mean of the map."""
    a, b = to_unit_range(a).flatten(0, 1)[:, None], to_unit_range(b).flatten(0, 1)[:, None]  # (F * C, 1, H, W)
    place = torch.arange(_SSIM_WINDOW, dtype=torch.float64, device=a.device) - _SSIM_WINDOW // 2
    weights = torch.exp(-(place**2) / (2 * _SSIM_SIGMA**2))
    weights = weights / weights.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:  # the window is the product of a column and a row
        return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = _SSIM_K1**2, _SSIM_K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (variance_a + variance_b + c2)).mean()


class CodebookUse:
    """Counts of how often each entry of a codebook was chosen, over any number of batches and processes.

    Args:
        size: entries of the codebook.
        counts: (size,) integers to begin with, such as those of another process; zeros by default.

    Attributes:
        counts: (size,) int64 on the CPU, the whole state: sums of it over processes are the state of all together.

    Raises:
        ValueError: a size below 1, or counts of another shape or below 0.
    """

    def __init__(self, size: int, counts: torch.Tensor | None = None):
        if size < 1:
            raise ValueError(f"a codebook has at least one entry, got size {size}.")
        self.size = size
        counts = torch.zeros(size, dtype=torch.int64) if counts is None else counts.detach().cpu().to(torch.int64)
        if counts.shape != (size,) or (counts < 0).any():
            raise ValueError(f"counts must be {size} numbers of 0 or more, got shape {tuple(counts.shape)}.")
        self.counts = counts.clone()

    def update(self, ids: torch.Tensor) -> None:
        """Counts ids, integers of any shape.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook.
        """
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers, got {ids.dtype}.")
        ids = ids.detach().flatten().cpu().to(torch.int64)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.size):
            raise ValueError(
                f"ids run from {int(ids.min())} to {int(ids.max())}, but the codebook has {self.size} entries."
            )
        self.counts += torch.bincount(ids, minlength=self.size)

    def __add__(self, other: CodebookUse) -> CodebookUse:
        """Both together. Raises ValueError for codebooks of different sizes."""
        if self.size != other.size:
            raise ValueError(f"codebooks of {self.size} and {other.size} entries cannot be counted together.")
        return CodebookUse(self.size, self.counts + other.counts)

    @property
    def total(self) -> int:
        """Ids counted."""
        return int(self.counts.sum())

    @property
    def use(self) -> float:
        """Share of the entries that were chosen at least once, 0 to 1."""
        return int((self.counts > 0).sum()) / self.size

    @property
    def entropy(self) -> float:
        """Entropy in bits of the distribution of the ids counted, 0 to log2(size). Raises ValueError without ids."""
        if self.total == 0:
            raise ValueError("no id was counted, so that there is no distribution; update with ids first.")
        shares = self.counts[self.counts > 0].double() / self.total
        return float(-(shares * shares.log2()).sum()) + 0.0  # not -0

    @property
    def perplexity(self) -> float:
        """2 to the power of the entropy: the entries of an evenly used codebook of equal entropy."""
        return 2**self.entropy
