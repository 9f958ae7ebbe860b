"""Training with weights, gradients and optimiser state sharded over the processes by FSDP2, through accelerate.

A sharded parameter is a DTensor. A network's weights are whole only inside its own forward and backward pass; elsewhere
`whole` gathers a tensor, which all processes must ask for together.

Mixed precision is that of the other ways to train, autocast over float32 weights, and not FSDP's own, which would round
the codebook. So the low-precision copies that a backward pass needs stay from the forward pass on, unless
`--gradient_checkpointing` makes them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from training.tokenizer.arguments import TokenizerArguments


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor with all its parts, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, equal on all processes, on the device of `other` and sharded if that is."""
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def forget_whole(network: nn.Module) -> None:
    """Frees what FSDP2 gathered for a forward pass without a backward pass, before sharded weights are changed."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_sharding(accelerator: Accelerator, args: TokenizerArguments) -> None:
    """Raises ValueError for launches with FSDP, or options beside it, with which training does not work."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    settings = {
        "fsdp_version: 2": plugin.fsdp_version == 2,
        "fsdp_reshard_after_forward: true": plugin.reshard_after_forward is True,
        "fsdp_state_dict_type: FULL_STATE_DICT": plugin.state_dict_type == StateDictType.FULL_STATE_DICT,
        "fsdp_offload_params: false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: false": not plugin.activation_checkpointing,
        "fsdp_cpu_ram_efficient_loading: false": not plugin.cpu_ram_efficient_loading,
    }
    if wrong := [setting for setting, right in settings.items() if not right]:
        raise ValueError(
            f"under FSDP the launch configuration must say {', '.join(wrong)}; see training/accelerate/fsdp2_8gpu.yaml."
        )
    if args.adaptive_weight:
        raise ValueError(
            "--adaptive_weight needs the gradient of one weight, which no process has whole under FSDP; leave it out."
        )
    if args.optimizer == "muon":
        raise ValueError("Muon needs whole matrices, which no process has under FSDP; use --optimizer adamw.")
    if args.compile:
        raise ValueError("--compile is not supported under FSDP; leave it out.")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16 does not work under FSDP; use bf16 or no.")


def prepare(
    accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer, layers: Sequence[str] = ()
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and its optimiser as accelerate makes them ready to be trained by its processes.

    Args:
        layers: names of the classes of modules that FSDP gathers one at a time; the rest is gathered together. They
            replace the launch configuration's, which has the same for all networks.
    """
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = None
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, list(layers)
    return accelerator.prepare(network, optimizer)
