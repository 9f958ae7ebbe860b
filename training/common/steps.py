"""What every optimiser step of the training scripts does: numbers that are checked, gradients that are clipped."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator

from training.common.sharding import whole


def check_finite(value: torch.Tensor, what: str, step: int) -> None:
    """Raises ValueError otherwise: nothing is saved after a step that went wrong."""
    if not math.isfinite(value := float(value.detach())):
        raise ValueError(
            f"the {what} became {value} at step {step}; the last checkpoint is kept. Lower --learning_rate and use "
            "--resume latest."
        )


def take_step(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    max_grad_norm: float,
    step: int,
) -> None:
    """Clips the gradients, steps, and forgets them."""
    if accelerator.sync_gradients:
        norm = whole(accelerator.clip_grad_norm_(parameters, max_grad_norm))
        if accelerator.scaler is None:  # with fp16 it skips such steps by itself
            check_finite(norm, "gradient", step)
    optimizer.step()
    optimizer.zero_grad()
