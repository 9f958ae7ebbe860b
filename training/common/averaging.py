"""The moving average of a network's weights, whole in checkpoints also where the weights are sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from training.common.sharding import like, whole

_POWER = 0.75  # of the warm-up: the average reaches a decay of 0.999 after ten thousand steps


class AveragedWeights:
    """An exponential moving average of weights, which forgets its first steps sooner (Crowson's warm-up of the decay).

    Its state holds whole tensors, so that it can be loaded by any number of processes, under the names that diffusers'
    `EMAModel` has for them. Under FSDP all processes must ask for the state together, as accelerate does when it saves.

    Args:
        parameters: the weights; always the same ones in the same order.
        decay: that the average has after the warm-up.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float = 0.9999):
        self.decay, self.steps = decay, 0
        self.averages = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Takes the weights after an optimiser step in."""
        decay = min(1 - (1 + self.steps) ** -_POWER, self.decay)  # 0 at first
        self.steps += 1
        change = torch._foreach_sub(self.averages, list(parameters))
        torch._foreach_mul_(change, 1 - decay)
        torch._foreach_sub_(self.averages, change)

    @contextmanager
    def in_place(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """The network has its averaged weights inside, and its own again afterwards."""
        parameters = list(parameters)
        own = [parameter.detach().clone() for parameter in parameters]
        _copy(self.averages, parameters)
        try:
            yield
        finally:
            _copy(own, parameters)

    def state_dict(self) -> dict:
        return {"optimization_step": self.steps, "shadow_params": [whole(tensor) for tensor in self.averages]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes the state over, on the devices and in the shards that the averages had before.

        Raises:
            ValueError: the state of another network.
        """
        given = state_dict["shadow_params"]
        if [tensor.shape for tensor in given] != [tensor.shape for tensor in self.averages]:
            raise ValueError("the averaged weights are of another network; resume with their settings.")
        self.steps = state_dict["optimization_step"]
        self.averages = [like(tensor, other) for tensor, other in zip(given, self.averages, strict=True)]


@torch.no_grad()
def _copy(values: Iterable[torch.Tensor], parameters: Iterable[torch.nn.Parameter]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)


def averaged_copy(network: PreTrainedModel, ema: AveragedWeights) -> PreTrainedModel:
    """The network with its averaged weights, on the CPU; training goes on as if nothing had been.

    Where the weights are sharded all processes must ask for it together.
    """
    with ema.in_place(network.parameters()):
        weights = {name: whole(tensor).detach().cpu().clone() for name, tensor in network.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # new weights are drawn first
        averaged = type(network)(copy.deepcopy(network.config))
    averaged.load_state_dict(weights)
    return averaged.eval()
