"""What frame prediction is shown, and the detail that it carries on."""

from __future__ import annotations

import math

import pytest
import torch

from evatok_hf.prediction import held_clip, hold_last_frame, keep_detail


def numbered(frames=6, size=2):
    """(1, F, 3, size, size), frame f has the value f."""
    return torch.arange(frames).float().view(1, frames, 1, 1, 1).expand(1, frames, 3, size, size)


def test_the_clip_stands_still_from_the_last_known_frame_on():
    assert hold_last_frame(numbered(), 3)[0, :, 0, 0, 0].tolist() == [0, 1, 2, 2, 2, 2]
    assert torch.equal(held_clip(numbered()[:, :3], 6), hold_last_frame(numbered(), 3))


@pytest.mark.parametrize("known", [0, 6, 7])
def test_something_must_be_known_and_something_not(known):
    for wrong in (lambda: hold_last_frame(numbered(), known), lambda: held_clip(numbered(8)[:, :known], 6)):
        with pytest.raises(ValueError, match="from 1 to 5"):
            wrong()


@pytest.fixture
def sharp():
    """A known frame (1, 3, 32, 32) of fine stripes, and what a blurring tokenizer makes of it: grey, (1, 5, ..)."""
    frame = torch.full((1, 3, 32, 32), 0.5)
    frame[..., ::2] = -0.5
    return frame, torch.zeros(1, 5, 3, 32, 32)


def test_what_stands_still_stays_sharp(sharp):
    frame, decoded = sharp
    out = keep_detail(decoded, frame, 1)
    assert torch.equal(out[:, :2], decoded[:, :2])  # the known ones are the caller's
    assert torch.allclose(out[:, 2:], frame[:, None].expand(-1, 3, -1, -1, -1))


def test_what_has_moved_is_the_decoders_also_when_it_moves_back(sharp):
    frame, decoded = sharp
    decoded[:, 2, :, :, 16:] = 0.8
    out = keep_detail(decoded, frame, 1, blur=1.0)
    assert torch.allclose(out[:, 2:, :, :, 20:], decoded[:, 2:, :, :, 20:], atol=1e-6)
    assert torch.allclose(out[:, 2:, :, :, :12], frame[:, None, :, :, :12].expand(-1, 3, -1, -1, -1), atol=1e-3)


def test_the_weight_is_a_gaussian_of_the_change_averaged_over_colours(sharp):
    frame, decoded = sharp
    decoded[:, 3, 0] = 0.3  # a mean of 0.1 over the three colours
    out = keep_detail(decoded, frame, 1, sigma=0.1, blur=0)
    expected = decoded[:, 3] + math.exp(-1) * frame
    assert torch.allclose(out[:, 3], expected) and torch.allclose(out[:, 4], math.exp(-1) * frame)


def test_values_stay_in_range_and_the_last_frame_may_be_known(sharp):
    frame, decoded = sharp
    assert keep_detail(decoded + 0.9, frame + 0.4, 1).max() <= 1
    assert torch.equal(keep_detail(decoded, frame, 4), decoded)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"index": 5}, "frame 5"), ({"index": -1}, "frame -1"), ({"sigma": 0}, "sigma"), ({"blur": -1}, "blur")],
)
def test_what_does_not_fit_is_refused(sharp, change, message):
    frame, decoded = sharp
    with pytest.raises(ValueError, match=message):
        keep_detail(decoded, frame, **{"index": 1, **change})
    with pytest.raises(ValueError, match="shape"):
        keep_detail(decoded, frame[..., :8], 1)
