"""Lengths of the clips of a training step: stage 1 draws them, stage 4 asks a router."""

from __future__ import annotations

import torch

from evatok_hf import EvatokModel, EvatokRouter
from evatok_hf.allocation import Allocation
from evatok_hf.models.modeling_evatok_router import check_same_space
from training.common.draws import Draws
from training.tokenizer.arguments import TokenizerArguments


class StepLengths:
    """Lengths as `args.assignment` says, as functions of (seed, step, micro-step) and, with a router, of the clips.

    Raises:
        ValueError: a uniform length outside the model's space; a router that cannot be loaded or is of another space.
    """

    def __init__(self, args: TokenizerArguments, model: EvatokModel, draws: Draws):
        self.args, self.space, self.draws, self.router = args, model.assignment_space, draws, None
        self.kind, _, value = args.assignment.partition(":")
        if self.kind == "uniform":
            self.allocation = Allocation(lengths=int(value)).bind(model)
        if self.kind == "router":
            self.router = EvatokRouter.from_pretrained(value, dtype=torch.float32).eval().requires_grad_(False)
            check_same_space(model, self.router)
            self.router.check_quality(args.quality)

    def __call__(self, video: torch.Tensor, step: int, micro: int) -> torch.Tensor:
        """(B, T) int64 for clips (B, F, C, H, W) in [-1, 1]."""
        if self.kind == "uniform":
            return self.allocation(video)
        # Shared, all clips have one draw, so that their lengths are equal or, with a router, much alike.
        shared = self.args.shared_assignment
        count = 1 if shared else self.draws.world_size * len(video)
        rows = slice(0, 1) if shared else self.draws.rows(len(video))
        generator = self.draws.generator("lengths", step, micro)
        if self.kind == "random":
            return self.space.random(count, generator)[rows].expand(len(video), -1)
        quality = self.args.quality
        if quality is None and self.router.config.quality is None:
            lo, hi = self.args.quality_range
            quality = lo + (hi - lo) * torch.rand(count, generator=self.draws.generator("quality", step, micro))[rows]
        lengths = self.router.to(video.device).assign(video, quality, exact=False)
        strays = torch.rand(count, generator=generator)[rows] < self.args.random_fraction
        return torch.where(strays[:, None], self.space.random(count, generator)[rows], lengths)
