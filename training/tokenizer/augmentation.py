"""DiffAugment (Zhao et al. 2020) for clips: one draw a clip, the same for all of its frames.

A discriminator that sees only augmented clips, real and fake alike, cannot learn the few training clips by heart. All
operations pass gradients to the video. Translation by up to 1/8 of the side, brightness, saturation and contrast, and a
cutout of 0.2 of the side are the paper's policies; one draw a clip is our choice, so that motion stays motion.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

TRANSLATION = 0.125  # of the side
CUTOUT = 0.2  # of the side


@dataclass(frozen=True)
class ClipAugmentation:
    """What is done to each of B clips, whatever their size.

    Attributes:
        applied: (B,) bool, False leaves a clip as it is.
        brightness: (B,) in [-0.5, 0.5), added.
        saturation: (B,) in [0, 2), factor of the distance from a pixel's grey.
        contrast: (B,) in [0.5, 1.5), factor of the distance from the clip's mean.
        translation: (B, 2) in [0, 1), where between the furthest moves up and down, left and right.
        cutout: (B, 2) in [0, 1), where the centre of the square lies, from top and left.
    """

    applied: torch.Tensor
    brightness: torch.Tensor
    saturation: torch.Tensor
    contrast: torch.Tensor
    translation: torch.Tensor
    cutout: torch.Tensor

    def __len__(self) -> int:
        return len(self.applied)

    def rows(self, chosen: slice) -> ClipAugmentation:
        """Those of some clips, e.g. of one process's part of the batch."""
        return ClipAugmentation(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def to(self, device: torch.device | str) -> ClipAugmentation:
        return ClipAugmentation(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def draw_augmentation(batch_size: int, generator: torch.Generator, probability: float = 1.0) -> ClipAugmentation:
    """Draws for a batch, all processes' clips together.

    Args:
        batch_size: B.
        generator: on the CPU, the only source of chance.
        probability: of a clip being augmented at all.
    """
    drawn = torch.rand(batch_size, 8, generator=generator)
    return ClipAugmentation(
        applied=drawn[:, 0] < probability,
        brightness=drawn[:, 1] - 0.5,
        saturation=drawn[:, 2] * 2,
        contrast=drawn[:, 3] + 0.5,
        translation=drawn[:, 4:6],
        cutout=drawn[:, 6:8],
    )


def augment(video: torch.Tensor, augmentation: ClipAugmentation) -> torch.Tensor:
    """(B, F, 3, H, W) in [-1, 1] -> the same shape, which colours may leave by some; what moves in from outside is 0.

    Raises:
        ValueError: draws for another number of clips.
    """
    if len(augmentation) != len(video):
        raise ValueError(
            f"there are draws for {len(augmentation)} clips and {len(video)} clips; take the rows of these."
        )
    draws = augmentation.to(video.device)
    changed = _translate(_colour(video, draws), draws.translation)
    changed = changed * _outside_cutout(draws.cutout, *video.shape[-2:]).to(video.dtype)
    return torch.where(_as_factor(draws.applied), changed, video)


def _as_factor(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None, None]  # (B, 1, 1, 1, 1)


def _colour(video: torch.Tensor, draws: ClipAugmentation) -> torch.Tensor:
    brightness, saturation, contrast = (
        _as_factor(values).to(video.dtype) for values in (draws.brightness, draws.saturation, draws.contrast)
    )
    video = video + brightness
    grey = video.mean(2, keepdim=True)
    video = (video - grey) * saturation + grey
    mean = video.mean((1, 2, 3, 4), keepdim=True)  # of the whole clip, so that flicker is neither made nor hidden
    return (video - mean) * contrast + mean


def _translate(video: torch.Tensor, translation: torch.Tensor) -> torch.Tensor:
    for axis, where in ((3, translation[:, 0]), (4, translation[:, 1])):
        size = video.shape[axis]
        furthest = int(size * TRANSLATION + 0.5)
        move = (where * (2 * furthest + 1)).long() - furthest  # (B,)
        source = torch.arange(size, device=video.device) - move[:, None]  # (B, size)
        inside = (source >= 0) & (source < size)
        shape = [len(video), 1, 1, 1, 1]
        shape[axis] = size
        index = source.clamp(0, size - 1).view(shape).expand(video.shape)
        video = video.gather(axis, index) * inside.view(shape).to(video.dtype)
    return video


def _outside_cutout(centre: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Centres (B, 2) in [0, 1) -> (B, 1, 1, H, W), False within the square, which the border may cut."""
    within = []
    for size, where in ((height, centre[:, 0]), (width, centre[:, 1])):
        side = int(size * CUTOUT + 0.5)
        first = (where * (size + 1 - side % 2)).long() - side // 2  # (B,)
        place = torch.arange(size, device=centre.device) - first[:, None]  # (B, size)
        within.append((place >= 0) & (place < side))
    return ~(within[0][:, None, None, :, None] & within[1][:, None, None, None, :])
