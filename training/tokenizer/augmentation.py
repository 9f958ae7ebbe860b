"""DiffAugment (Zhao et al. 2020) for clips: one draw a clip, the same for all of its frames.

A discriminator that sees only augmented clips, real and fake alike, cannot learn the few training clips by heart. All
operations pass gradients to the video. Translation by up to 1/8 of the side, brightness, saturation and contrast, and a
cutout of 0.2 of the side are the paper's policies; one draw a clip is our choice, so that motion stays motion.
"""

from __future__ import annotations

import torch

DRAWS = 8  # numbers a clip: whether, three of colour, two of translation, two of the cutout
TRANSLATION = 0.125  # of the side
CUTOUT = 0.2  # of the side


def augment(video: torch.Tensor, draws: torch.Tensor, probability: float = 1.0) -> torch.Tensor:
    """(B, F, 3, H, W) in [-1, 1] -> the same shape, which colours may leave by some; what moves in from outside is 0.

    Args:
        draws: (B, DRAWS), uniform in [0, 1): whether a clip is augmented (below `probability`); brightness,
            saturation, contrast; where between the furthest moves down and right it goes; where from top and left the
            centre of the cutout lies, a square that the border may cut.
        probability: of a clip being augmented at all.
    """
    draws = draws.to(video, non_blocking=True)
    chosen, brightness, saturation, contrast, *places = draws[..., None, None, None, None].unbind(1)  # (B, 1, 1, 1, 1)
    changed = video + (brightness - 0.5)
    grey = changed.mean(2, keepdim=True)
    changed = (changed - grey) * (2 * saturation) + grey
    mean = changed.mean((1, 2, 3, 4), keepdim=True)  # of the whole clip, so that flicker is neither made nor hidden
    changed = (changed - mean) * (contrast + 0.5) + mean

    cut = torch.ones((), dtype=torch.bool, device=video.device)
    for axis, move, centre in zip((3, 4), places[:2], places[2:], strict=True):
        size = video.shape[axis]
        furthest, side = int(size * TRANSLATION + 0.5), int(size * CUTOUT + 0.5)
        place = torch.arange(size, device=video.device).view(size, *[1] * (4 - axis))
        source = place - ((move * (2 * furthest + 1)).long() - furthest)
        inside = (source >= 0) & (source < size)
        changed = changed.gather(axis, source.clamp(0, size - 1).expand(video.shape)) * inside.to(video.dtype)
        beyond = place - ((centre * (size + 1 - side % 2)).long() - side // 2)
        cut = cut & (beyond >= 0) & (beyond < side)
    return torch.where(chosen < probability, changed * (~cut).to(video.dtype), video)
