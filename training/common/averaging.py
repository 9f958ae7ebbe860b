"""The moving average of a network's weights, whole in checkpoints also where the weights are sharded."""

from __future__ import annotations

import copy

import torch
from diffusers.training_utils import EMAModel
from transformers import PreTrainedModel

from training.common.sharding import like, whole, whole_weights


class AveragedWeights(EMAModel):
    """diffusers' `EMAModel` for weights that may be sharded.

    Its state holds whole tensors, so that it can be loaded by any number of processes. Under FSDP all processes must
    ask for the state together, as accelerate does when it saves.
    """

    def state_dict(self) -> dict:
        state = super().state_dict()
        return {**state, "shadow_params": [whole(tensor) for tensor in state["shadow_params"]]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes the state over, on the devices and in the shards that the averages had before.

        Raises:
            ValueError: the state of another network.
        """
        before = self.shadow_params
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (state_dict["shadow_params"], before)]
        if shapes[0] != shapes[1]:
            raise ValueError("the averaged weights are of another network; resume with their settings.")
        super().load_state_dict(state_dict)
        self.shadow_params = [like(tensor, other) for tensor, other in zip(self.shadow_params, before, strict=True)]


def averaged_copy(network: PreTrainedModel, ema: EMAModel) -> PreTrainedModel:
    """The network with its averaged weights, on the CPU; training goes on as if nothing had been.

    Where the weights are sharded all processes must ask for it together.
    """
    ema.store(network.parameters())
    ema.copy_to(network.parameters())
    weights = {name: tensor.detach().cpu().clone() for name, tensor in whole_weights(network).items()}
    ema.restore(network.parameters())
    with torch.random.fork_rng(devices=[]):  # new weights are drawn first
        averaged = type(network)(copy.deepcopy(network.config))
    averaged.load_state_dict(weights)
    return averaged.eval()
