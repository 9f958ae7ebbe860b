"""training/tokenizer/losses.py: the terms add up as documented, and the schedules have the documented values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from evatok_hf import EvatokConfig, EvatokOutput
from evatok_hf.metrics import psnr
from evatok_hf.metrics.perceptual import PerceptualDistance
from evatok_hf.models.modeling_evatok import VectorQuantizer
from training.common.optimizers import learning_rate_factor
from training.tokenizer.losses import (
    QuantizationBlend,
    TokenizerLoss,
    spectral_factor,
)

CONFIG = EvatokConfig(
    image_size=32, num_frames=4, block_lengths=(2, 4), commitment_weight=0.25, entropy_weight=0.02, codebook_size=16
)


class BrightnessDistance(PerceptualDistance):
    """Squared difference of mean brightness; notes the frames that it sees."""

    def __init__(self):
        super().__init__("brightness")
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.seen.append(y.mean((1, 2, 3)))
        return (x.mean((1, 2, 3)) - y.mean((1, 2, 3))).square()


def numbered_video(clips: int = 2) -> torch.Tensor:
    """(B, 4, 3, 8, 8): frame f of clip b is 0.1 * f + 0.4 * b - 0.5 all over."""
    frame, clip = torch.arange(4.0), torch.arange(float(clips))
    return (0.1 * frame[None] + 0.4 * clip[:, None] - 0.5)[..., None, None, None].expand(-1, -1, 3, 8, 8).clone()


def output_for(video: torch.Tensor, error: float) -> EvatokOutput:
    reconstruction = (video + error).requires_grad_()
    return EvatokOutput(
        reconstruction=reconstruction,
        reconstruction_loss=(reconstruction - video).abs().mean(),
        codebook_loss=torch.tensor(0.3),
        commitment_loss=torch.tensor(0.2),
        entropy_loss=torch.tensor(-1.5),
    )


def test_the_total_is_the_weighted_sum_of_its_terms():
    video = numbered_video()
    output = output_for(video, error=0.2)
    criterion = TokenizerLoss(CONFIG, {"l1": 1.0, "l2": 2.0, "perceptual": 0.5}, BrightnessDistance())
    total, terms = criterion(output, video, torch.Generator())
    values = {
        name: pytest.approx(value, abs=1e-5) for name, value in {"l1": 0.2, "l2": 0.04, "perceptual": 0.04}.items()
    }
    expected = 0.2 + 2.0 * 0.04 + 0.5 * 0.04 + 0.3 + 0.25 * 0.2 + 0.02 * -1.5
    values |= {"codebook": pytest.approx(0.3), "commitment": pytest.approx(0.2), "entropy": pytest.approx(-1.5)}
    assert {name: float(term) for name, term in terms.items()} == {**values, "total": pytest.approx(expected, abs=1e-5)}
    assert not any(term.requires_grad for term in terms.values())
    total.backward()
    # Every pixel is 0.2 too bright, so that every term but the quantiser's pushes it down.
    assert (output.reconstruction.grad > 0).all()


def test_without_a_perceptual_metric_there_is_no_such_term():
    video = numbered_video()
    total, terms = TokenizerLoss(CONFIG, {"l1": 1.0, "perceptual": 9.0})(
        output_for(video, 0.1), video, torch.Generator()
    )
    assert set(terms) == {"l1", "l2", "codebook", "commitment", "entropy", "total"}
    assert float(total.detach()) == pytest.approx(0.1 + 0.3 + 0.05 - 0.03, abs=1e-5)


def test_the_spectral_term_counts_fine_detail_more_than_brightness():
    video, weights = numbered_video(), {"spectral": 2.0}
    flat, _ = TokenizerLoss(CONFIG, weights)(output_for(video, 0.2), video, torch.Generator())
    assert float(flat.detach()) == pytest.approx(2.0 * 0.04 + 0.3 + 0.05 - 0.03, abs=1e-5)  # as the squared error
    stripes = torch.tensor([0.2, -0.2]).repeat(4)
    fine, terms = TokenizerLoss(CONFIG, weights)(output_for(video, stripes), video, torch.Generator())
    assert float(terms["l2"]) == pytest.approx(0.04, abs=1e-5)
    assert float(terms["spectral"]) > 10 * 0.04
    half, _ = TokenizerLoss(CONFIG, weights)(output_for(video, 0.2), video, torch.Generator(), spectral_factor=0.5)
    assert float((flat - half).detach()) == pytest.approx(0.04, abs=1e-5)


def test_the_metric_sees_random_frames_of_each_clip():
    video, metric = numbered_video(), BrightnessDistance()
    criterion = TokenizerLoss(CONFIG, {"l1": 1.0, "perceptual": 1.0}, metric, perceptual_frames=2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        criterion(output_for(video, 0.1), video, generator)
    frames = torch.stack(metric.seen).view(40, 2, 2)  # (times, clips, frames)
    assert ((frames[:, 1] - frames[:, 0]) - 0.4).abs().max() < 1e-5  # the same frames of both clips
    numbers = ((frames[:, 0] + 0.5) * 10).round().int()
    assert (numbers[:, 0] < numbers[:, 1]).all() and set(numbers.flatten().tolist()) == {0, 1, 2, 3}
    again = BrightnessDistance()
    criterion = TokenizerLoss(CONFIG, {"l1": 1.0, "perceptual": 1.0}, again, perceptual_frames=2)
    criterion(output_for(video, 0.1), video, torch.Generator().manual_seed(0))
    assert torch.equal(again.seen[0], metric.seen[0])


def test_losses_of_a_bf16_reconstruction_are_taken_in_float32():
    video = numbered_video()
    output = output_for(video, 0.1)
    output.reconstruction = output.reconstruction.bfloat16()
    _, terms = TokenizerLoss(CONFIG, {"l1": 1.0, "l2": 1.0, "perceptual": 1.0}, BrightnessDistance())(
        output, video, torch.Generator()
    )
    assert terms["l2"].dtype == terms["perceptual"].dtype == terms["total"].dtype == torch.float32


@pytest.mark.parametrize("frames", [-1, 5])
def test_more_frames_than_a_clip_has_are_refused(frames):
    with pytest.raises(ValueError, match=r"perceptual_frames must lie in 0\.\.4"):
        TokenizerLoss(CONFIG, {"l1": 1.0, "perceptual": 1.0}, None, frames)


def test_learning_rate():
    def factor(step: int) -> float:
        return learning_rate_factor(step, total=110, warmup=10, minimum=0.1)

    assert factor(0) == pytest.approx(0.01) and factor(5) == pytest.approx(0.505) and factor(10) == 1.0
    assert factor(60) == pytest.approx(0.55)  # half way down
    assert factor(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(110) == pytest.approx(0.1) == factor(500)
    assert all(factor(step) > factor(step + 1) for step in range(10, 110))
    assert learning_rate_factor(0, total=5, warmup=0, minimum=0.1) == 1.0
    assert learning_rate_factor(5, total=5, warmup=5, minimum=0.1) == 1.0  # nothing but warm-up


def test_blend_goes_from_features_to_codes():
    quantizer = VectorQuantizer(32, 8, entropy_temperature=0.1)
    torch.nn.init.normal_(quantizer.weight)
    features = torch.randn(50, 8, requires_grad=True)
    z, whole = F.normalize(features, dim=-1), quantizer(features)
    blend = QuantizationBlend(quantizer, 10, 20)
    assert [blend.at(step) for step in (0, 10, 15, 20, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert torch.equal(quantizer(features).codes, whole.codes)
    blend.at(0)
    assert torch.allclose(quantizer(features).codes, z)
    blend.at(15)
    half = quantizer(features)
    assert torch.allclose(half.codes, (z + whole.codes) / 2, atol=1e-6) and torch.equal(half.ids, whole.ids)
    direction = torch.randn(50, 8)
    gradients = [torch.autograd.grad((codes * direction).sum(), features)[0] for codes in (half.codes, whole.codes)]
    assert torch.allclose(*gradients, atol=1e-6)
    assert torch.equal(quantizer.eval()(features).codes, whole.codes)  # nothing of it outside training
    assert QuantizationBlend(quantizer).at(0) == 1.0
    at_once = QuantizationBlend(quantizer, 5, 5)
    assert [at_once.at(step) for step in (0, 4, 5)] == [0.0, 0.0, 1.0]


def test_spectral_factor():
    assert [spectral_factor(step, 10) for step in (0, 5, 10, 20)] == [1.0, 0.5, 0.0, 0.0]
    assert spectral_factor(99, 0) == 1.0


def test_the_psnr_term_counts_easy_and_hard_clips_alike():
    video = numbered_video()
    output = output_for(video, error=0.0)
    output.reconstruction = (video + torch.tensor([0.01, 0.1]).view(2, 1, 1, 1, 1)).requires_grad_()
    criterion = TokenizerLoss(CONFIG, {"log_l2": 1.0})
    total, terms = criterion(output, video, torch.Generator())
    decibels = psnr(video, output.reconstruction).mean().item()  # of values in [0, 1], whose errors are half as large
    assert terms["log_l2"].item() == pytest.approx(math.log10(4) - decibels / 10, abs=1e-4)
    assert decibels == pytest.approx((46.02 + 26.02) / 2, abs=0.01)
    total.backward()
    easy, hard = output.reconstruction.grad.flatten(1).norm(dim=1) * torch.tensor([0.01, 0.1])
    assert easy.item() == pytest.approx(hard.item(), rel=1e-3)  # of a relative change


def test_a_perfect_clip_has_no_endless_psnr():
    video = numbered_video()
    criterion = TokenizerLoss(CONFIG, {"log_l2": 1.0})
    total, _ = criterion(output := output_for(video, error=0.0), video, torch.Generator())
    total.backward()
    assert total.isfinite() and output.reconstruction.grad.isfinite().all()
