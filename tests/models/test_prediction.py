"""What frame prediction is shown, and what it keeps of the last known frame."""

from __future__ import annotations

import math

import pytest
import torch

from evatok_hf.models.video_processing_evatok import (
    HOLD_HALF_LIFE,
    STILL_SIGMA,
    blurred,
    fade_from_known,
    held_clip,
    hold_last_frame,
    keep_still,
)


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
    out = keep_still(decoded, frame, 1)
    assert torch.equal(out[:, :2], decoded[:, :2])  # the known ones are the caller's
    assert torch.allclose(out[:, 2:], frame[:, None].expand(-1, 3, -1, -1, -1))


def test_what_has_moved_is_the_decoders_also_when_it_moves_back(sharp):
    frame, decoded = (torch.cat([each] * 4, dim=-1) for each in sharp)
    decoded[:, 2, :, :, 64:] = 2.0
    out = keep_still(decoded, frame, 1)
    assert torch.allclose(out[:, 2:, :, :, 90:], decoded[:, 2:, :, :, 90:], atol=1e-3)
    assert torch.allclose(out[:, 2:, :, :, :38], frame[:, None, :, :, :38].expand(-1, 3, -1, -1, -1), atol=1e-3)


def test_the_weight_falls_with_the_change_averaged_over_colours(sharp):
    frame, decoded = sharp
    decoded[:, 3, 0] = 0.3  # a mean of 0.1 over the three colours
    out = keep_still(decoded, frame, 1)
    weight = math.exp(-0.1 / STILL_SIGMA)
    assert torch.allclose(out[:, 3], weight * frame + (1 - weight) * decoded[:, 3])
    assert torch.allclose(out[:, 4], weight * frame)


def test_a_change_is_smoothed_over_a_quarter_of_the_frame(sharp):
    frame, decoded = sharp
    decoded[:, 2:, :, :8, :8] = 0.5
    change = torch.zeros(1, 3, 1, 32, 32)
    change[..., :8, :8] = 0.5
    weight = torch.exp(-blurred(change, 8) / STILL_SIGMA)
    out = keep_still(decoded, frame, 1)
    assert torch.allclose(out[:, 2:], decoded[:, 2:] + weight * (frame[:, None] - decoded[:, 2:]))


def test_the_last_frame_may_be_known(sharp):
    frame, decoded = sharp
    assert torch.equal(keep_still(decoded, frame, 4), decoded)


@pytest.mark.parametrize("index", [5, -1])
def test_what_does_not_fit_is_refused(sharp, index):
    frame, decoded = sharp
    with pytest.raises(ValueError, match=f"frame {index}"):
        keep_still(decoded, frame, index)
    with pytest.raises(ValueError, match="shape"):
        keep_still(decoded, frame[..., :8], 1)


def test_the_known_frame_fades_and_half_of_it_is_left_after_its_half_life():
    frame, predicted = torch.ones(2, 3, 4, 4), torch.zeros(2, 2 * HOLD_HALF_LIFE, 3, 4, 4)
    shares = fade_from_known(predicted, frame, 0.6)[1, :, 2, 0, 0]
    assert shares[HOLD_HALF_LIFE - 1] == pytest.approx(0.3) and shares[-1] == pytest.approx(0.15)
    assert (shares.diff() < 0).all() and shares[0] < 0.6
    assert torch.equal(fade_from_known(predicted, frame, 0), predicted)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            fade_from_known(predicted, frame, wrong)
