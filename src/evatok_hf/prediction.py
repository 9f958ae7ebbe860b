"""Frame prediction: what a generator is shown of a clip whose first frames are known, and mends of its answer."""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Chosen on 114 training clips of game video that evatok-tiny predicted from 5 frames: with them the frames 4, 8 and 11
# after the last known one are nearer to the truth than copies of it, by PSNR and by perceptual distance.
STILL_SIGMA = 0.25
HOLD, HOLD_HALF_LIFE = 0.8, 16


def hold_last_frame(video: torch.Tensor, known_frames: int) -> torch.Tensor:
    """The condition of frame prediction: the clip stands still from its last known frame on, as in LARP.

    Args:
        video: (B, F, C, H, W).
        known_frames: how many frames are known, from 1 to F - 1 (5 of 16 on K600).

    Returns:
        (B, F, C, H, W); frames from number `known_frames` on are frame `known_frames - 1`.

    Raises:
        ValueError: a number of known frames outside that range.
    """
    check_known_frames(known_frames, video.shape[1])
    frames = torch.arange(video.shape[1], device=video.device).clamp_max(known_frames - 1)
    return video[:, frames]


def check_known_frames(known_frames: int, num_frames: int) -> None:
    """Raises ValueError unless some frames of a clip of `num_frames` are known and some are not."""
    if not 1 <= known_frames < num_frames:
        raise ValueError(
            f"known_frames must be from 1 to {num_frames - 1} of the {num_frames} frames of a clip, got {known_frames}."
        )


def held_clip(known: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Known frames (B, n, C, H, W) as the clip (B, num_frames, C, H, W) that `hold_last_frame` makes of a whole one.

    Raises:
        ValueError: no known frame, or so many that nothing is left to predict.
    """
    check_known_frames(known.shape[1], num_frames)
    return known[:, torch.arange(num_frames, device=known.device).clamp_max(known.shape[1] - 1)]


def keep_still(
    decoded: torch.Tensor, frame: torch.Tensor, index: int, sigma: float = STILL_SIGMA, blur: float | None = None
) -> torch.Tensor:
    """Puts a known frame as it truly is in place of later decoded ones where these did not change (our choice).

    With D the decoded clip, n the known frame's place and x its true picture, frame t becomes w_t x + (1 - w_t) D_t
    with w_t = exp(-c_t / sigma) and c_t the mean over channels of |D_s - D_n|, blurred, at its largest of n < s <= t.
    So what stands still keeps its sharpness and does not flicker, and what has once moved is the decoder's.

    Args:
        decoded: (B, F, C, H, W) in [-1, 1].
        frame: (B, C, H, W), frame `index` as it truly is.
        index: n, from 0 to F - 1.
        sigma: change at which a weight has fallen to 1/e, in units of the values.
        blur: standard deviation of the Gaussian that smooths the change, pixels; 0 for none, a quarter of the frame's
            height by default.

    Returns:
        (B, F, C, H, W) in [-1, 1]; frames up to `index` as they were.

    Raises:
        ValueError: shapes that do not fit, an index outside the clip, a sigma or blur out of range.
    """
    if decoded.ndim != 5 or frame.shape != decoded[:, 0].shape or not 0 <= index < decoded.shape[1]:
        raise ValueError(
            f"a frame of shape {tuple(frame.shape)} is not frame {index} of clips of {tuple(decoded.shape)}; give "
            "(B, C, H, W) and (B, F, C, H, W)."
        )
    blur = decoded.shape[-2] / 4 if blur is None else blur
    if not (sigma > 0 and blur >= 0):
        raise ValueError(f"sigma must be positive and blur 0 or more, got {sigma} and {blur}.")
    before, after = decoded[:, : index + 1], decoded[:, index + 1 :]
    if not after.shape[1]:
        return decoded
    change = (after - before[:, -1:]).abs().mean(2, keepdim=True).cummax(1).values  # (B, f, 1, H, W)
    weight = torch.exp(-blurred(change, blur) / sigma)
    return torch.cat([before, after + weight * (frame[:, None] - after)], dim=1)


def check_hold(hold: float) -> None:
    """Raises ValueError for a share that is no share."""
    if not 0 <= hold <= 1:
        raise ValueError(f"hold is {hold}; give a share of the last known frame from 0 to 1.")


def fade_from_known(predicted: torch.Tensor, frame: torch.Tensor, hold: float = HOLD) -> torch.Tensor:
    """Fades from the last known frame to what is predicted after it (our choice).

    A prediction is one of many ways in which a video may go on, so that between it and the frame that is known lies
    what is nearer to the truth on average. Frame k after the known one has `hold` 2^(-k / 16) of that.

    Args:
        predicted: (B, f, C, H, W), the frames right after the known one.
        frame: (B, C, H, W), the last known one.
        hold: share of the known frame at first, from 0 (the prediction itself) to 1.

    Returns:
        (B, f, C, H, W).

    Raises:
        ValueError: a share out of range.
    """
    check_hold(hold)
    after = torch.arange(1, predicted.shape[1] + 1, device=predicted.device).view(1, -1, 1, 1, 1)
    return predicted + hold * 0.5 ** (after / HOLD_HALF_LIFE) * (frame[:, None] - predicted)


def blurred(maps: torch.Tensor, std: float) -> torch.Tensor:
    """(B, f, 1, H, W) through a Gaussian; at the border the outermost values go on."""
    radius = round(3 * std)
    if radius == 0:
        return maps
    weights = torch.exp(-(torch.arange(-radius, radius + 1, device=maps.device) ** 2) / (2 * std**2)).to(maps)
    weights = weights / weights.sum()
    flat = F.pad(maps.flatten(0, 1), (radius,) * 4, mode="replicate")  # (B * f, 1, H + 2 r, W + 2 r)
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return flat.view(maps.shape)
