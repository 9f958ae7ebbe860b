"""PSNR of frames in memory."""

from __future__ import annotations

import math

import pytest
import torch

from evatok_hf import psnr
from evatok_hf.metrics import to_unit_range


def clips(seed: int = 0) -> torch.Tensor:
    """uint8 (2, 4, 3, 8, 8)."""
    return torch.randint(0, 256, (2, 4, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_known_values():
    black, grey = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8), torch.full((1, 2, 3, 4, 4), 51, dtype=torch.uint8)
    assert psnr(black, grey).item() == pytest.approx(-20 * math.log10(51 / 255))
    assert psnr(torch.full((1, 3), -1.0), torch.full((1, 3), 1.0)).item() == pytest.approx(0.0)


def test_each_clip_has_its_own_value_over_all_its_frames():
    a, b = clips(), clips(1)
    b[0] = a[0]
    b[1, 1:] = a[1, 1:]
    values = psnr(a, b)
    assert values.shape == (2,) and values.dtype == torch.float64
    assert math.isinf(values[0]) and values[0] > 0
    error = ((a[1].double() - b[1].double()) / 255).square().mean()
    assert values[1].item() == pytest.approx(-10 * math.log10(error))


def test_bytes_and_floats_of_the_same_frames_agree():
    a, b = clips(), clips(1)
    expected = psnr(a, b)
    as_float = [x.float() / 127.5 - 1 for x in (a, b)]
    assert torch.allclose(psnr(*as_float), expected, atol=1e-5)
    assert torch.allclose(psnr(a, as_float[1]), expected, atol=1e-5)
    assert torch.equal(psnr(a, b), psnr(b, a))


def test_values_outside_the_range_are_not_clamped():
    assert psnr(torch.ones(1, 3), torch.full((1, 3), 3.0)).item() == pytest.approx(0.0)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"differ in shape: \(2, 4, 3, 8, 8\) and \(1, 4, 3, 8, 8\)"):
        psnr(clips(), clips()[:1])
    with pytest.raises(ValueError, match="uint8 or floats in .*int64"):
        to_unit_range(clips().long())
