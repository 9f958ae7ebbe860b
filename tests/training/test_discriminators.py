"""training/tokenizer/discriminators.py: shapes, independence of the batch, and losses against values worked out by
hand.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from training.tokenizer.discriminators import (
    LeCam,
    PatchDiscriminator,
    SemanticHeads,
    adaptive_weight,
    hinge_discriminator_loss,
)


@pytest.mark.parametrize(
    ("frames", "side", "logits"), [(16, 64, 4 * 6 * 6), (16, 128, 4 * 14 * 14), (8, 32, 2 * 2 * 2), (4, 24, 1)]
)
def test_patch_logits(frames, side, logits):
    network = PatchDiscriminator(channels=2)
    assert network(torch.rand(1, frames, 3, side, side) * 2 - 1).shape == (1, logits)


def test_patch_logits_of_a_clip_do_not_depend_on_the_others():
    torch.manual_seed(0)
    network = PatchDiscriminator(channels=4)
    clips = torch.rand(3, 8, 3, 32, 32) * 2 - 1
    together, alone = network(clips), torch.cat([network(clip[None]) for clip in clips])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    assert not torch.allclose(network(clips.flip(1)), together, atol=1e-3)  # it sees the order of frames


@pytest.mark.parametrize("shape", [(1, 3, 3, 32, 32), (1, 8, 3, 32, 16), (1, 8, 4, 32, 32), (8, 3, 32, 32)])
def test_clips_that_a_patch_discriminator_cannot_take(shape):
    with pytest.raises(ValueError, match="clips must"):
        PatchDiscriminator(channels=2)(torch.zeros(shape))


def test_a_head_has_the_size_of_the_published_one_at_the_width_of_videomae_base():
    heads = SemanticHeads(768, 1)
    assert sum(parameter.numel() for parameter in heads.parameters()) == 5_903_617


def test_semantic_heads():
    torch.manual_seed(0)
    heads = SemanticHeads(16, 2)
    readouts = [torch.randn(3, 6, 16), torch.randn(3, 8, 16)]
    logits = heads.eval()(readouts)
    assert logits.shape == (3, 14)
    alone = torch.cat([heads([readout[i : i + 1] for readout in readouts]) for i in range(3)])
    assert torch.allclose(logits, alone, atol=1e-5)
    # Circular: tokens moved round move the logits round.
    moved = heads([readouts[0].roll(2, dims=1), readouts[1]])
    assert torch.allclose(moved[:, :6], logits[:, :6].roll(2, dims=1), atol=1e-5)
    assert torch.equal(moved[:, 6:], logits[:, 6:])


def test_every_convolution_of_a_head_is_spectrally_normalised():
    torch.manual_seed(0)
    heads = SemanticHeads(16, 1)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            if name.endswith("original"):
                parameter.mul_(50)
    for _ in range(30):  # each pass in training comes nearer to the largest singular value
        heads([torch.randn(1, 4, 16)])
    convolutions = [module for module in heads.modules() if isinstance(module, nn.Conv1d)]
    assert len(convolutions) == 3
    for convolution in convolutions:
        assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_readouts_that_do_not_fit_the_heads():
    with pytest.raises(ValueError, match="shorter"):
        SemanticHeads(16, 2)([torch.zeros(1, 8, 16)])
    with pytest.raises(ValueError, match="at least 4 tokens"):
        SemanticHeads(16, 1)([torch.zeros(1, 3, 16)])


def test_the_hinge_loss_by_hand():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-2.0, 0.0], [1.0, -0.5]])
    # relu(1 - real) = 0, 0.5, 2, 0; relu(1 + fake) = 0, 1, 2, 0.5
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 4 + 3.5 / 4))
    assert hinge_discriminator_loss(torch.zeros(3), torch.zeros(3)).item() == 1.0


def test_steps_along_the_gradients_separate_and_raise_logits():
    torch.manual_seed(0)
    network = PatchDiscriminator(channels=4)
    real, fake = torch.rand(2, 4, 3, 24, 24), torch.rand(2, 4, 3, 24, 24) - 1
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def gap() -> float:
        return (network(real).mean() - network(fake).mean()).item()

    before = gap()
    for _ in range(10):
        optimizer.zero_grad()
        hinge_discriminator_loss(network(real), network(fake)).backward()
        optimizer.step()
    assert gap() > before + 0.5

    fake.requires_grad_()
    before = network(fake).mean()
    (gradient,) = torch.autograd.grad(-network(fake).mean(), fake)
    assert network(fake - 0.1 * gradient / gradient.norm()).mean() > before


def test_lecam_by_hand():
    term = LeCam(weight=0.5)
    term.decay = 0.75
    real, fake = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([-1.0, 1.0])
    # First means 2 and 0: relu(real - 0)^2 = 1, 9; relu(2 - fake)^2 = 9, 1.
    value = term(real, fake)
    assert value.item() == pytest.approx(0.5 * (5 + 5))
    value.backward()
    assert real.grad.tolist() == pytest.approx([0.5, 1.5])  # none through the means
    # Then 0.75 * 2 + 0.25 * 6 = 3 and 0.25 * 4 = 1: relu(6 - 1)^2 = 25; relu(3 - 4) = 0.
    assert term(torch.tensor([6.0]), torch.tensor([4.0])).item() == pytest.approx(12.5)


def test_lecam_goes_on_from_its_state():
    logits = [(torch.randn(4), torch.randn(4)) for _ in range(3)]
    straight, first = LeCam(1.0), LeCam(1.0)
    for pair in logits[:2]:
        straight(*pair), first(*pair)
    resumed = LeCam(1.0)
    resumed.load_state_dict(first.state_dict())
    assert resumed(*logits[2]).item() == pytest.approx(straight(*logits[2]).item())
    fresh = LeCam(1.0)
    fresh.load_state_dict(LeCam(1.0).state_dict())
    assert fresh(*logits[2]).item() == pytest.approx(LeCam(1.0)(*logits[2]).item())


def test_adaptive_weight_by_hand():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, adversarial = (3 * weight).sum(), (torch.tensor([0.0, 2.0]) * weight).sum()
    ratio = adaptive_weight(reconstruction, adversarial, weight)
    assert ratio.item() == pytest.approx(math.sqrt(18) / 2, rel=1e-3)  # norms of (3, 3) and (0, 2)
    assert not ratio.requires_grad and weight.grad is None
    (reconstruction + ratio * adversarial).backward()  # the graphs are still there
    assert weight.grad.norm().item() > 0
    assert adaptive_weight((3 * weight).sum(), (0 * weight).sum(), weight).item() == 1e4
