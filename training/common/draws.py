"""Random draws of the training steps, the same whatever the number of processes."""

from __future__ import annotations

import hashlib

import torch


class Draws:
    """Draws that are functions of (seed, purpose, step, micro-step), so that resuming needs no state.

    They are made for the clips of all processes at once, each of which takes its own rows: a clip gets the same draw
    with one process as with eight, if the global batch is the same.

    Args:
        seed: of the run.
        rank, world_size: which of how many processes this is.
    """

    def __init__(self, seed: int, rank: int = 0, world_size: int = 1):
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def generator(self, purpose: str, step: int, micro: int = 0) -> torch.Generator:
        """A CPU generator in the same state on all processes, independent for each purpose."""
        key = f"{self.seed} {purpose} {step} {micro}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)

    def rows(self, batch_size: int) -> slice:
        """This process's rows of what was drawn for `world_size * batch_size` clips."""
        return slice(self.rank * batch_size, (self.rank + 1) * batch_size)


def splice(video: torch.Tensor, probability: float, draws: Draws, step: int, micro: int = 0) -> torch.Tensor:
    """Cuts some clips, at a random frame, to what the next clip of this process's batch shows from there on.

    (B, F, 3, H, W) -> the same shape.
    """
    if probability == 0:
        return video
    generator, count = draws.generator("splice", step, micro), draws.world_size * len(video)
    chosen = torch.rand(count, generator=generator) < probability
    cuts = torch.randint(1, video.shape[1], (count,), generator=generator)
    cuts = torch.where(chosen, cuts, video.shape[1])[draws.rows(len(video))]
    cuts = cuts.to(video.device, non_blocking=True)
    kept = torch.arange(video.shape[1], device=video.device) < cuts[:, None]  # (B, F)
    return torch.where(kept[:, :, None, None, None], video, video.roll(-1, 0))


def shuffle_channels(video: torch.Tensor, probability: float, draws: Draws, step: int, micro: int = 0) -> torch.Tensor:
    """Permutes the colour channels of some clips, each as a whole. (B, F, 3, H, W) -> the same shape."""
    if probability == 0:
        return video
    generator, count = draws.generator("channels", step, micro), draws.world_size * len(video)
    chosen = torch.rand(count, generator=generator) < probability
    order = torch.stack([torch.randperm(video.shape[2], generator=generator) for _ in chosen])
    order = torch.where(chosen[:, None], order, torch.arange(video.shape[2]))[draws.rows(len(video))]
    order = order.to(video.device, non_blocking=True)
    return torch.stack([clip[:, channels] for clip, channels in zip(video, order, strict=True)])
