"""Operations of a clip in a step of tokenizer training, by what they are for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from evatok_hf import EvatokConfig, EvatokRouter
from evatok_hf.metrics.perceptual import PerceptualDistance
from training.common.flops import counted, router_flops
from training.tokenizer.adversarial import AdversarialLoss
from training.tokenizer.teachers import Teacher


def other_flops(
    config: EvatokConfig,
    perceptual: PerceptualDistance | None,
    perceptual_frames: int,
    alignment: Teacher | None,
    router: EvatokRouter | None,
) -> dict[str, float]:
    """Of the frozen networks beside the tokenizer. A backward pass to the pixels alone costs one forward pass."""
    flops, side = {}, config.image_size
    if perceptual is not None:  # both clips forward, backward to one
        frames = (perceptual_frames or config.num_frames, 3, side, side)
        flops["perceptual"] = 1.5 * counted(lambda: copy.deepcopy(perceptual).to("meta"), frames, frames)
    if alignment is not None:
        flops["alignment"] = _of_teacher(alignment, (1, config.num_frames, 3, side, side))
    if router is not None:
        flops["router"] = router_flops(router.config)
    return flops


def discriminator_flops(config: EvatokConfig, adversarial: AdversarialLoss) -> dict[str, float]:
    """Of the discriminators: the tokenizer's pass to the pixels and back, then real and reconstructed clips with both
    gradients."""
    flops, networks = {}, adversarial.networks
    shape = (1, config.num_frames, 3, config.image_size, config.image_size)
    if hasattr(networks, "patch"):
        flops["patch discriminator"] = 8 * counted(lambda: copy.deepcopy(networks.patch).to("meta"), shape)
    if (teacher := adversarial.teacher) is not None:
        flops["semantic teacher"] = 4 * _of_teacher(teacher, shape)
        head = networks.semantic.heads[0]
        features = (1, torch.Size(teacher.grid).numel(), teacher.width)
        one = counted(lambda: copy.deepcopy(head).to("meta"), features)
        flops["semantic heads"] = 8 * len(teacher.layers) * one
    return flops


def _of_teacher(teacher: Teacher, shape: tuple[int, ...]) -> float:
    """Of a teacher's forward pass."""

    def features() -> Callable[[torch.Tensor], torch.Tensor]:
        on_meta = copy.copy(teacher)
        on_meta.model = type(teacher.model)(teacher.model.config)
        return on_meta.grid_features

    return counted(features, shape)
