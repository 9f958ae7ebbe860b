"""Reconstruction metrics on frames in memory."""

from __future__ import annotations

import torch


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
