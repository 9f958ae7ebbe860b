"""Discriminators for clips and their losses: a 3D PatchGAN, heads on frozen features, hinge, LeCAM, adaptive weight.

Nothing here takes statistics over the batch: one process with eight clips and two processes with four each give the
same losses and gradients. What needs means over all clips goes through `mean_over_processes`.

Shapes: B clips, F frames, L logits or tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all training processes, the tensor itself in a single one; without a gradient."""
    tensor = tensor.detach()
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


# --- networks ---------------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017) in 3D: a logit for every patch of space and time.

    Three convolutions of stride 2, then two of stride 1, kernels of 4. Only the first two halve time, as a tokenizer
    of temporal patch 4 does; where time is not halved its kernel is 3, so that short clips keep a length. GroupNorm in
    the place of BatchNorm is our choice: a clip's logits must not depend on the batch that it is in.

    Args:
        channels: of the first layer; they double with every layer.
    """

    smallest = (4, 24)  # frames, side

    def __init__(self, channels: int = 64):
        super().__init__()
        widths = [channels * factor for factor in (1, 2, 4, 8)]
        # The first layer sees pixels, whose brightness a norm would hide.
        layers = [nn.Conv3d(3, widths[0], 4, 2, padding=1), nn.LeakyReLU(0.2)]
        shapes = ((4, 2), ((3, 4, 4), (1, 2, 2)), ((3, 4, 4), 1))
        for (before, after), (kernel, stride) in zip(pairwise(widths), shapes, strict=True):
            layers.append(nn.Conv3d(before, after, kernel, stride, padding=1, bias=False))
            layers += [_group_norm(after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, (3, 4, 4), padding=1))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, 3, H, W) in [-1, 1] -> logits (B, L), high for real.

        Raises:
            ValueError: clips that are too small for a single logit.
        """
        frames, side = self.smallest
        if video.ndim != 5 or video.shape[1] < frames or video.shape[2] != 3 or min(video.shape[-2:]) < side:
            raise ValueError(
                f"clips must be (B, F, 3, H, W) of at least {frames} frames of {side} x {side} pixels, got "
                f"{tuple(video.shape)}."
            )
        return self.layers(video.transpose(1, 2)).flatten(1)  # (B, 1, t, h, w) -> (B, L)


class _SemanticHead(nn.Module):
    """(B, L, C) features of one layer -> (B, L) logits. C = 768: 5,903,617 parameters."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Sequential(
            spectral_norm(nn.Conv1d(channels, channels, 1)), _group_norm(channels), nn.LeakyReLU(0.2)
        )
        wide = nn.Conv1d(channels, channels, 9, padding=4, padding_mode="circular")
        self.residual = nn.Sequential(spectral_norm(wide), _group_norm(channels), nn.LeakyReLU(0.2))
        self.last = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.first(features.transpose(1, 2))  # (B, C, L)
        x = (self.residual(x) + x) / math.sqrt(2)
        return self.last(x).squeeze(1)


class SemanticHeads(nn.Module):
    """Trainable 1D-CNN heads on the features of several layers of a frozen network, a logit a token (paper, losses).

    The head is that of StyleGAN-T's (Sauer et al. 2023) and GigaTok's discriminators on image features. GroupNorm over
    a clip's own tokens in the place of their norm over groups of clips is our choice: a clip's logits must not depend
    on the batch that it is in. Convolutions are spectrally normalised.

    Args:
        hidden_size: C of the features.
        num_readouts: how many layers are read, with a head for each.
    """

    def __init__(self, hidden_size: int, num_readouts: int):
        super().__init__()
        self.heads = nn.ModuleList(_SemanticHead(hidden_size) for _ in range(num_readouts))

    def forward(self, readouts: Sequence[torch.Tensor]) -> torch.Tensor:
        """A list of (B, L, C), one a readout -> logits (B, sum of L), high for real.

        Raises:
            ValueError: another number of readouts, or fewer than four tokens.
        """
        if min(readout.shape[1] for readout in readouts) < 4:
            raise ValueError(f"readouts must have at least 4 tokens, got {[tuple(one.shape) for one in readouts]}.")
        return torch.cat([head(readout) for head, readout in zip(self.heads, readouts, strict=True)], dim=1)


# --- losses -----------------------------------------------------------------------------------------------------------


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Half of mean relu(1 - real) + mean relu(1 + fake): 1 where nothing is told apart, 0 where all is by a margin."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


class LeCam:
    """The LeCAM regulariser (Tseng et al. 2021): keeps logits near the moving mean of the other kind's.

    mean relu(real - moving mean of fake)^2 + mean relu(moving mean of real - fake)^2 (one-sided: the authors' code).
    The moving means, of the authors' decay, start at the first step's means and are equal on all processes.

    Args:
        weight: factor of the term, applied here and nowhere else.
    """

    decay = 0.99

    def __init__(self, weight: float):
        self.weight = weight
        self._means: torch.Tensor | None = None  # real, fake

    def __call__(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """Takes the logits into the moving means; returns the weighted term, a scalar."""
        now = mean_over_processes(torch.stack([real_logits.mean(), fake_logits.mean()]).float())
        if self._means is None:
            self._means = now
        self._means = self.decay * self._means.to(now.device) + (1 - self.decay) * now
        real_mean, fake_mean = self._means
        above, below = F.relu(real_logits - fake_mean), F.relu(real_mean - fake_logits)
        return self.weight * (above.square().mean() + below.square().mean())

    def state_dict(self) -> dict[str, list[float] | None]:
        return {"means": None if self._means is None else self._means.tolist()}

    def load_state_dict(self, state: dict[str, list[float] | None]) -> None:
        self._means = None if state["means"] is None else torch.tensor(state["means"])


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_weight: torch.Tensor
) -> torch.Tensor:
    """VQGAN's weight of the adversarial loss (Esser et al. 2021): the ratio of the norms of both losses' gradients.

    Gradients are averaged over the processes before their norms are taken. Both graphs are kept for the backward pass
    to come, and no `.grad` is touched.

    Args:
        reconstruction_loss, adversarial_loss: scalars that depend on `last_weight`.
        last_weight: weight of the generator's last layer.

    Returns:
        A scalar without a gradient, in [0, 10000].
    """
    norms = []
    for loss in (reconstruction_loss, adversarial_loss):
        (gradient,) = torch.autograd.grad(loss, last_weight, retain_graph=True)
        norms.append(mean_over_processes(gradient.float()).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
