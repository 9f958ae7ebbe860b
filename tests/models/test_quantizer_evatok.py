"""The vector quantiser: nearest codes, where gradients go, and the entropy term in any number of chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from evatok_hf.models import modeling_evatok
from evatok_hf.models.modeling_evatok import VectorQuantizer, codebook_entropy_loss, nearest_codes


@pytest.fixture
def quantizer() -> VectorQuantizer:
    module = VectorQuantizer(32, 8, entropy_temperature=0.1)
    with torch.no_grad():
        module.weight.copy_(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))
    return module


def features(count: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_ids_are_the_nearest_codes_on_the_sphere(quantizer):
    z, codes = F.normalize(features(), dim=-1), F.normalize(quantizer.weight, dim=-1)
    assert torch.equal(quantizer.to_ids(features()), torch.cdist(z, codes).argmin(-1))
    assert torch.equal(quantizer(features()).ids, quantizer.to_ids(features()))


def test_the_norm_of_features_and_codes_does_not_matter(quantizer):
    ids = quantizer.to_ids(features())
    assert torch.equal(quantizer.to_ids(1000 * features()), ids)
    with torch.no_grad():
        quantizer.weight.mul_(torch.linspace(0.1, 9, 32)[:, None])
    assert torch.equal(quantizer.to_ids(features()), ids)
    assert torch.allclose(quantizer.to_codes(ids).norm(dim=-1), torch.ones(50))


def test_codes_quantise_to_themselves(quantizer):
    assert torch.equal(quantizer.to_ids(quantizer.to_codes(torch.arange(32))), torch.arange(32))


def test_the_decoder_gets_the_codes_that_ids_stand_for(quantizer):
    out = quantizer(features())
    assert torch.allclose(out.codes, quantizer.to_codes(out.ids), atol=1e-6)


def test_gradient_goes_straight_through_to_the_features_and_not_to_the_codebook(quantizer):
    x, direction = features(), torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    (quantizer(x).codes * direction).sum().backward()
    reference = features()
    (F.normalize(reference, dim=-1) * direction).sum().backward()
    assert torch.allclose(x.grad, reference.grad, atol=1e-6)
    assert quantizer.weight.grad is None or not quantizer.weight.grad.any()


def test_codebook_loss_moves_codes_and_commitment_loss_moves_features(quantizer):
    x = features()
    out = quantizer(x)
    distance = F.mse_loss(F.normalize(x, dim=-1), quantizer.to_codes(out.ids))
    assert out.codebook_loss.item() == pytest.approx(distance.item(), rel=1e-5)
    assert out.commitment_loss.item() == pytest.approx(distance.item(), rel=1e-5)
    to_features, to_codes = torch.autograd.grad(
        out.codebook_loss, (x, quantizer.weight), retain_graph=True, allow_unused=True
    )
    assert (to_features is None or not to_features.any()) and to_codes.any()
    to_features, to_codes = torch.autograd.grad(out.commitment_loss, (x, quantizer.weight), allow_unused=True)
    assert to_features.any() and (to_codes is None or not to_codes.any())


def test_entropy_loss_equals_its_definition():
    z, codes = F.normalize(features(), dim=-1), F.normalize(features(16, seed=3), dim=-1)
    p = torch.softmax(-torch.cdist(z, codes).square().double() / 0.1, dim=-1)
    mean = p.mean(0)
    expected = -(p * p.log()).sum(-1).mean() + (mean * mean.log()).sum()
    assert codebook_entropy_loss(z, codes, 0.1).item() == pytest.approx(expected.item(), rel=1e-4)


def test_entropy_loss_is_lowest_where_every_code_is_used_surely_and_equally():
    codes = torch.eye(8)
    assert codebook_entropy_loss(codes, codes, 0.01).item() == pytest.approx(-math.log(8), abs=1e-4)
    assert codebook_entropy_loss(codes[:1].expand(8, -1), codes, 0.01).item() == pytest.approx(0, abs=1e-4)


def test_entropy_loss_reaches_every_code(quantizer):
    quantizer(features(2000)).entropy_loss.backward()
    assert quantizer.weight.grad.abs().sum(-1).min() > 0


@pytest.mark.parametrize("rows", [1, 7, 49, 50, 51])
def test_chunks_change_neither_values_nor_gradients(quantizer, monkeypatch, rows):
    def run() -> tuple[torch.Tensor, ...]:
        x = features()
        out = quantizer(x)
        total = out.entropy_loss + out.codebook_loss + out.commitment_loss
        return (out.ids, out.entropy_loss, *torch.autograd.grad(total, (x, quantizer.weight)))

    whole = run()
    monkeypatch.setattr(modeling_evatok, "_ROWS_PER_CHUNK", rows)
    chunked = run()
    assert torch.equal(whole[0], chunked[0])
    for a, b in zip(whole[1:], chunked[1:], strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_more_than_65536_tokens_in_one_step(quantizer):
    x = features(70_001)
    out = quantizer(x)
    (out.codes.sum() + out.entropy_loss + out.codebook_loss + out.commitment_loss).backward()
    assert out.ids.shape == (70_001,) and out.codes.shape == (70_001, 8)
    assert torch.equal(out.ids[-5:], quantizer.to_ids(x[-5:]))
    assert torch.isfinite(x.grad).all() and x.grad[-1].any() and torch.isfinite(quantizer.weight.grad).all()


def test_arithmetic_is_fp32_in_a_bfloat16_model_and_under_autocast(quantizer):
    x = features().detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(x)
        assert torch.equal(quantizer.to_ids(x), quantizer.to_ids(x.clone()))
    assert out.codes.dtype == out.entropy_loss.dtype == torch.float32
    assert torch.equal(out.ids, quantizer.to_ids(x))
    half = VectorQuantizer(32, 8, 0.1).to(torch.bfloat16)
    half.load_state_dict(quantizer.state_dict())
    wide = VectorQuantizer(32, 8, 0.1)
    wide.load_state_dict(half.state_dict())
    assert torch.equal(half.to_ids(x.bfloat16()), wide.to_ids(x.bfloat16().float()))
    assert half(x.bfloat16()).codes.dtype == torch.float32


@pytest.mark.parametrize("codes", [1, 77, 96, 1024])
def test_nearest_codes_are_those_of_a_plain_comparison_with_all(codes):
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.randn(count, 3, generator=generator).round() for count in (200, codes)]  # so that many are equal
    features, codebook = (torch.nn.functional.normalize(x + 0.5, dim=-1) for x in coarse)
    ids, cosines = nearest_codes(features, codebook), features @ codebook.T
    assert torch.allclose(cosines.gather(1, ids[:, None])[:, 0], cosines.amax(-1), atol=1e-6, rtol=0)
    first = (codebook[:, None] == codebook).all(-1).int().argmax(-1)
    assert torch.equal(ids, first[ids])  # of codes that are the same
    features, codebook = (torch.randn(len(x), 8, generator=generator) for x in coarse)
    assert torch.equal(nearest_codes(features, codebook), (features @ codebook.T).argmax(-1))


def test_nearest_codes_takes_no_features():
    assert nearest_codes(torch.empty(0, 8), torch.eye(8)).shape == (0,)


def test_the_entropy_of_some_tokens_estimates_that_of_all():
    features = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    losses = []
    for tokens in (0, 1000):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(64, 8, 0.1, tokens).train()
        torch.nn.init.normal_(quantizer.weight)
        losses.append(quantizer(features).entropy_loss.detach())
        assert torch.equal(losses[-1], quantizer(features).entropy_loss.detach())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0].item(), rel=0.02)
