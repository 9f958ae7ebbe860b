"""Optimisers: AdamW, and Muon for the matrices of the layers beside it; and the schedule of learning rates."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from training.common.run import Run


OPTIMIZERS = ("adamw", "muon")

# Of the quintic iteration that brings all singular values near 1 in five steps (Jordan et al. 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Matrices with the singular vectors of these (n, rows, columns) and singular values near 1, in `dtype`."""
    a, b, c = _COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` (Nesterov momentum, then `orthogonalize`) to its rounding, with matrices of a shape together.

    On CPUs it computes in float32; many of them take five times as long for bfloat16, which torch's always uses.

    Args:
        matrices: parameters of two dimensions.
        lr: learning rate; an update is `lr * sqrt(max(1, rows / columns))` times a matrix with singular values near 1.
        momentum: of the gradients.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                updates = torch.stack([self._update(parameter, group["momentum"]) for parameter in parameters])
                updates = orthogonalize(updates, torch.float32 if updates.device.type == "cpu" else torch.bfloat16)
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.to(parameter), alpha=scale)

    def _update(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum)


class Together(torch.optim.Optimizer):
    """Several optimisers as one. Schedules and gradient clipping see the parameter groups of all, each with its own
    learning rate."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()


def layer_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trained matrices of a module's transformer layers, without embeddings, projections and the codebook."""
    return [
        parameter
        for name, parameter in module.named_parameters()
        if "layers" in name.split(".") and parameter.ndim == 2 and parameter.requires_grad
    ]


def make_optimizer(
    kind: str,
    module: nn.Module,
    learning_rate: float,
    matrix_learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimiser of the trained parameters of a module: "adamw", or "muon" for its transformer layers beside it.

    Raises:
        ValueError: "muon" where no matrix of a transformer layer is trained.
    """
    adamw = partial(torch.optim.AdamW, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if kind == "adamw":
        return adamw(trained)
    matrices = layer_matrices(module)
    if not matrices:
        raise ValueError("no matrix of a transformer layer is trained; use --optimizer adamw.")
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in trained if id(parameter) not in chosen]
    return Together(adamw(others), Muon(matrices, lr=matrix_learning_rate, weight_decay=weight_decay))


def learning_rate_factor(step: int, total: int, warmup: int, minimum: float, cooldown: int = 0) -> float:
    """Linear warm-up from 1 % over `warmup` steps, then a cosine from 1 to `minimum` (GigaTok: 0.1).

    With `cooldown`, 1 until that many steps before the end, then linear to `minimum`: such a run can go on with more
    steps from any checkpoint before its cooldown (our choice).
    """
    if step < warmup:
        return 0.01 + 0.99 * step / warmup
    if cooldown:
        return minimum + (1 - minimum) * min(1.0, max(0, total - step) / cooldown)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def make_schedule(optimizer: torch.optim.Optimizer, run: Run, start: int = 0) -> LambdaLR:
    """The run's schedule of learning rates, from step `start` on."""
    args = run.args

    def factor(step: int) -> float:
        return learning_rate_factor(
            start + step if args.minutes is None else run.place,
            args.steps,
            args.warmup_steps,
            args.min_learning_rate_ratio,
            args.cooldown_steps,
        )

    return LambdaLR(optimizer, factor)
