"""training/tokenizer/augmentation.py: each operation by itself against values worked out by hand, and what all have
in common.
"""

from __future__ import annotations

import pytest
import torch

from training.tokenizer.augmentation import DRAWS, augment

SIDE = 20  # moves by up to 3, cuts out 4 x 4


def draw(clips: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(clips, DRAWS, generator=torch.Generator().manual_seed(seed))


def chosen(
    clips: int = 1,
    brightness: float | list[float] = 0.0,
    saturation: float = 1.0,
    contrast: float = 1.0,
    translation: tuple[float, float] = (0.5, 0.5),
    cutout: tuple[float, float] = (0.9999, 0.9999),
) -> torch.Tensor:
    """Draws for these changes: without any, of nothing but what the cutout, at the lower right, hides."""
    draws = torch.tensor([0.4, 0.5, saturation / 2, contrast - 0.5, *translation, *cutout]).repeat(clips, 1)
    draws[:, 1] += torch.tensor(brightness)
    return draws


def clips(number: int = 2, frames: int = 3) -> torch.Tensor:
    return torch.rand(number, frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_same_draw_does_the_same_to_real_and_fake():
    draws, real = draw(2, 3), clips()
    assert torch.equal(augment(real, draws), augment(real.clone(), draws))
    assert torch.equal(augment(real, draw(2, 3)), augment(real, draws))
    assert not torch.equal(augment(real, draw(2, 4)), augment(real, draws))


def test_all_frames_of_a_clip_are_changed_alike_and_clips_differently():
    still = clips(1, 1).expand(2, 5, -1, -1, -1)
    changed = augment(still, draw(2))
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    assert not torch.equal(changed[0], changed[1]) and not torch.equal(changed[0], still[0])


def test_rows_are_the_draws_of_those_clips():
    video, draws = clips(4), draw(4)
    whole = augment(video, draws)
    assert torch.allclose(augment(video[2:], draws[2:]), whole[2:], atol=1e-6)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(2\)"):
        augment(video[:2], draws)


def test_probability():
    video = clips(2)
    assert torch.equal(augment(video, draw(2), probability=0), video)
    many = torch.ones(1000, 1, 3, 1, 1)
    assert 0.25 < (augment(many, draw(1000), probability=0.3) != many).flatten(1).any(1).float().mean() < 0.35
    mixed = chosen(2, brightness=0.25)
    mixed[0, 0] = 0.5
    changed = augment(video, mixed, probability=0.5)
    assert torch.equal(changed[0], video[0]) and not torch.equal(changed[1], video[1])


def test_colours_by_hand():
    video = torch.zeros(1, 2, 3, SIDE, SIDE)
    video[:, :, 0] = 0.6  # red: the grey is 0.2, as is the mean of the clip
    inside = (slice(None), slice(None), slice(None), 0, 0)

    def pixel(**draws: float) -> list[float]:
        return augment(video, chosen(**draws))[inside][0, 0].tolist()

    assert pixel() == pytest.approx([0.6, 0, 0])
    assert pixel(brightness=-0.25) == pytest.approx([0.35, -0.25, -0.25])
    assert pixel(saturation=0.0) == pytest.approx([0.2, 0.2, 0.2])
    assert pixel(saturation=1.5) == pytest.approx([0.8, -0.1, -0.1])
    assert pixel(contrast=0.5) == pytest.approx([0.4, 0.1, 0.1])


def test_translation_moves_and_leaves_grey_behind():
    video = clips(1)
    moved = augment(video, chosen(translation=(0.0, 0.9999)))  # three pixels up, three to the right
    shown = (slice(None), slice(None), slice(None), slice(0, 15), slice(3, 15))  # away from the cutout
    assert torch.allclose(moved[shown], video[..., 3:18, 0:12], atol=1e-6)
    assert (moved[..., :3] == 0).all() and (moved[..., -3:, :] == 0).all()


def test_cutout_hides_a_square_that_the_border_may_cut():
    video = torch.ones(1, 2, 3, SIDE, SIDE)
    middle = augment(video, chosen(cutout=(0.5, 0.5)))
    assert (middle == 0).sum() == 2 * 3 * 16 and (middle[..., 8:12, 8:12] == 0).all()
    corner = augment(video, chosen())
    assert (corner == 0).sum() == 2 * 3 * 4 and (corner[..., 18:, 18:] == 0).all()


def test_gradients_reach_all_that_is_seen():
    video = clips(2).requires_grad_()
    draws = chosen(2, translation=(0.0, 0.0), brightness=[0.1, -0.2])
    augment(video, draws).sum().backward()
    # Three rows and columns move out of the picture, a square is cut out.
    assert (video.grad[..., :3, :] == 0).all() and (video.grad[..., :3] == 0).all()
    assert (video.grad[..., 3:18, 3:18] == 1).all()

    torch.manual_seed(0)
    small = torch.rand(1, 2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: augment(x, draw(1, 1)), small)
