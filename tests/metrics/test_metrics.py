"""PSNR and SSIM of frames in memory, and the use of a codebook."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
import torch

from evatok_hf.metrics import psnr
from evatok_hf.metrics.pixels import CodebookUse, ssim, to_unit_range


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


def frames(seed: int, size: int = 13, count: int = 2) -> torch.Tensor:
    """uint8 (B, F, 3, S, S + 2) that are not mere noise."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, size + 2)[None, None, None, None]
    noisy = ramp + rng.normal(60, 25, size=(count, 2, 3, size, size + 2))
    return torch.from_numpy(np.clip(noisy, 0, 255).astype(np.uint8))


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of one channel of one frame in [0, 1], window by window."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(x):
        return scipy.signal.convolve2d(x, window, mode="valid")

    m, n = mean(a), mean(b)
    v, w, c = mean(a * a) - m * m, mean(b * b) - n * n, mean(a * b) - m * n
    return float(((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4))).mean())


def test_ssim_equals_an_independent_implementation():
    a, b = frames(0), frames(1)
    b[0] = (a[0].double() * 0.8 + b[0].double() * 0.2).to(torch.uint8)
    values = ssim(a, b)
    assert values.shape == (2,) and values.dtype == torch.float64
    for clip in range(2):
        pairs = zip(a[clip].flatten(0, 1).numpy() / 255, b[clip].flatten(0, 1).numpy() / 255, strict=True)
        assert values[clip].item() == pytest.approx(np.mean([reference_ssim(x, y) for x, y in pairs]), abs=1e-12)
    assert values[0] > values[1] + 0.3
    as_float = [x.float() / 127.5 - 1 for x in (a, b)]
    assert torch.allclose(ssim(*as_float), values, atol=1e-6) and torch.equal(ssim(b, a), values)
    assert torch.equal(ssim(a[:1], b[:1]), values[:1]) and ssim(a[:0], b[:0]).shape == (0,)


def test_ssim_by_hand():
    a = frames(3)
    assert torch.allclose(ssim(a, a), torch.ones(2, dtype=torch.float64), atol=1e-12)
    # Flat frames have no structure: what is left is the comparison of their brightness.
    flat = torch.full((1, 1, 3, 11, 11), 51, dtype=torch.uint8)
    brighter = torch.full((1, 1, 3, 11, 11), 204, dtype=torch.uint8)
    expected = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert ssim(flat, brighter).item() == pytest.approx(expected)


def test_ssim_refuses_mistakes():
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 12"):
        ssim(frames(0, size=10), frames(1, size=10))
    with pytest.raises(ValueError, match="differ in shape"):
        ssim(frames(0), frames(0)[:1])
    with pytest.raises(ValueError, match=r"must be \(B, F, C, H, W\)"):
        ssim(frames(0)[0], frames(1)[0])


def test_use_of_a_codebook():
    counted = CodebookUse(8)
    counted.update(torch.tensor([[0, 0], [1, 2]]))
    counted.update(torch.empty(0, dtype=torch.int64))
    # Shares 1/2, 1/4, 1/4: 1.5 bits.
    assert (counted.use, counted.entropy, counted.perplexity) == (3 / 8, 1.5, 2**1.5)
    other = CodebookUse(8)
    other.update(torch.tensor([3, 3, 7, 7]))
    both = counted + other
    assert both.counts.tolist() == [2, 1, 1, 2, 0, 0, 0, 2] and both.total == 8 and counted.total == 4
    assert CodebookUse(8, counted.counts + other.counts).entropy == both.entropy
    even = CodebookUse(4, torch.full((4,), 5))
    assert (even.use, even.entropy, even.perplexity) == (1.0, 2.0, 4.0)
    one = CodebookUse(4, torch.tensor([0, 9, 0, 0]))
    assert (one.use, one.entropy, one.perplexity) == (0.25, 0.0, 1.0)


def test_use_of_a_codebook_refuses_mistakes():
    counted = CodebookUse(4)
    with pytest.raises(ValueError, match="ids run from -1 to 4, but the codebook has 4"):
        counted.update(torch.tensor([-1, 4]))
    with pytest.raises(ValueError, match="must be integers"):
        counted.update(torch.zeros(2))
    with pytest.raises(ValueError, match="no id was counted"):
        _ = counted.entropy
    with pytest.raises(ValueError, match="4 and 5 entries"):
        counted + CodebookUse(5)
    with pytest.raises(ValueError, match="counts must be 4"):
        CodebookUse(4, torch.zeros(3))
    with pytest.raises(ValueError, match="at least one entry"):
        CodebookUse(0)
    assert counted.use == 0.0 and counted.total == 0
