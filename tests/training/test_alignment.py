"""training/tokenizer/alignment.py: values worked out by hand, and that cells meet the cells that lie at the same
place.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.tokenizer.alignment import AlignmentLoss, GridBridge


def identity(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.copy_(torch.eye(len(linear.weight)))
        linear.bias.zero_()


def coordinates(grid: tuple[int, int, int]) -> torch.Tensor:
    """(1, T, h, w, 3): where the middle of every cell lies, in [0, 1]."""
    axes = [(torch.arange(size) + 0.5) / size for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]


def test_values_by_hand():
    loss = AlignmentLoss(2, (1, 1, 2), 2, (1, 1, 2))
    identity(loss.bridge.project)
    decoder = torch.tensor([[[[3.0, 0.0], [0.0, 2.0]]]])  # (1, 1, 2, 2)
    for teacher, expected in (
        ([[1.0, 0.0], [0.0, 5.0]], -1.0),  # equal but for length
        ([[0.0, 1.0], [-4.0, 0.0]], 0.0),  # orthogonal
        ([[-1.0, 0.0], [0.0, -1.0]], 1.0),  # opposite
        ([[1.0, 0.0], [1.0, 1.0]], -(1 + 0.5**0.5) / 2),
    ):
        assert loss(decoder, torch.tensor(teacher).view(1, 1, 1, 2, 2))[0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("direction", ["teacher", "decoder"])
def test_steps_along_the_gradients_align(direction):
    torch.manual_seed(0)
    loss = AlignmentLoss(8, (2, 4, 4), 6, (4, 2, 2), direction)
    decoder = nn.Parameter(torch.randn(2, 2, 16, 8))
    teacher = torch.randn(2, 4, 2, 2, 6, requires_grad=True)
    before, _ = loss(decoder, teacher)
    before.backward()
    assert before.shape == () and teacher.grad is None
    with torch.no_grad():
        decoder -= decoder.grad / decoder.grad.norm()
    between, _ = loss(decoder, teacher)
    assert between < before and all(parameter.grad.norm() > 0 for parameter in loss.parameters())
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter -= 0.1 * parameter.grad
    assert loss(decoder, teacher)[0] < between


@pytest.mark.parametrize("direction", ["teacher", "decoder"])
@pytest.mark.parametrize("teacher_grid", [(4, 4, 4), (8, 4, 4), (2, 2, 2), (8, 2, 8), (3, 6, 5), (1, 1, 1)])
def test_grids_of_any_size_meet(direction, teacher_grid):
    loss = AlignmentLoss(6, (4, 4, 4), 10, teacher_grid, direction)
    value, _ = loss(torch.randn(2, 4, 16, 6), torch.randn(2, *teacher_grid, 10))
    assert -1 <= value.item() <= 1


def test_merged_cells_are_those_that_lie_within_the_target():
    bridge = GridBridge(3, (8, 4, 4), 3, (4, 4, 2))
    assert (bridge.merged, bridge.expanded) == ((2, 1, 2), (1, 1, 1))
    with torch.no_grad():  # the mean of the merged cells
        bridge.project.weight.copy_(torch.eye(3).repeat(1, 4) / 4)
        bridge.project.bias.zero_()
    assert torch.allclose(bridge(coordinates((8, 4, 4))), coordinates((4, 4, 2)), atol=1e-6)


def test_a_cell_is_laid_out_over_those_that_lie_within_it():
    bridge = GridBridge(3, (2, 2, 1), 3, (4, 2, 3))
    assert (bridge.merged, bridge.expanded) == ((1, 1, 1), (2, 1, 3))
    offsets = coordinates((2, 1, 3)) - 0.5  # within a cell
    with torch.no_grad():
        bridge.project.weight.copy_(torch.eye(3).repeat(6, 1))
        bridge.project.bias.copy_((offsets / torch.tensor([2.0, 2.0, 1.0])).flatten())
    assert torch.allclose(bridge(coordinates((2, 2, 1))), coordinates((4, 2, 3)), atol=1e-6)


def test_grids_that_do_not_divide_are_resampled():
    bridge = GridBridge(3, (3, 6, 4), 3, (4, 4, 4))
    assert bridge.resampled == (4, 4, 4)
    identity(bridge.project)
    found, expected = bridge(coordinates((3, 6, 4))), coordinates((4, 4, 4))
    assert torch.allclose(found[:, 1:3], expected[:, 1:3], atol=1e-6)  # at the border the outermost value stays
    assert found[0, 0, 0, 0, 0].item() == pytest.approx(1 / 6)


def test_agreement_that_says_nothing_shows_in_the_contrast():
    torch.manual_seed(0)
    loss = AlignmentLoss(4, (2, 2, 2), 4, (2, 2, 2))
    teacher = torch.randn(2, 2, 2, 2, 4)
    with torch.no_grad():
        loss.bridge.project.weight.zero_()
        loss.bridge.project.bias.fill_(1.0)
    constant = torch.ones(2, 2, 4, 4)
    value, contrast = loss(constant, teacher)
    assert value.item() == pytest.approx(-1, abs=1e-6) and contrast.item() == pytest.approx(0, abs=1e-6)
    identity(loss.bridge.project)
    value, contrast = loss(teacher.flatten(2, 3), teacher)
    assert value.item() == pytest.approx(-1, abs=1e-6) and contrast.item() > 0.5 and not contrast.requires_grad


def test_low_precision_features_are_compared_in_float32():
    loss = AlignmentLoss(4, (2, 2, 2), 4, (2, 2, 2)).bfloat16()
    value, _ = loss(torch.randn(1, 2, 4, 4).bfloat16(), torch.randn(1, 2, 2, 2, 4).bfloat16())
    assert value.dtype == torch.float32


def test_what_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        AlignmentLoss(4, (2, 2), 4, (2, 2, 2))
    loss = AlignmentLoss(4, (2, 2, 2), 4, (2, 2, 2))
    with pytest.raises(RuntimeError, match="unflatten"):
        loss(torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 2, 2, 4))
    with pytest.raises(RuntimeError, match="size of tensor"):
        loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 2, 2, 4))
