"""Which calls would wait for an accelerator, found out on a CPU: tensors are followed from where they are put on it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from training.common.run import Run

# Of a tensor on the device: they need its values, or their number.
READS = {"item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__contains__"}
READS |= {"nonzero", "argwhere", "masked_select", "unique", "equal", "allclose", "new_tensor"}


class DeviceWaits(TorchFunctionMode):
    """Inside, `found` gets the place of every call that waits: that reads what is on the device, or copies to it and
    blocks. On the device are parameters, what `Tensor.to` put there, what was made there, and what came of these."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(map(self._is_there, tensors))
        to_device = name == "to" and any(isinstance(leaf, torch.device) for leaf in tree_leaves((args[1:], kwargs)))
        masked = name in ("__getitem__", "__setitem__") and any(
            leaf.dtype == torch.bool and self._is_there(leaf)
            for leaf in tree_leaves(args[1])
            if isinstance(leaf, torch.Tensor)
        )
        blocks = to_device and not there and not kwargs.get("non_blocking")
        made_there = (
            isinstance(kwargs.get("device"), torch.device)
            and "transformers" in sys._getframe(1).f_code.co_filename  # ours also names the CPU by a variable
        )
        if masked or blocks or (there and name in READS):
            ours = [frame for frame in traceback.extract_stack()[:-1] if "site-packages" not in frame.filename]
            self.found.append(f"{name} at {ours[-1].filename}:{ours[-1].lineno} {ours[-1].line}")
        result = func(*args, **kwargs)
        if to_device and result is args[0]:
            result = result.view_as(result)
        if there or to_device or made_there:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    leaf.is_there = True
        return result

    @staticmethod
    def _is_there(tensor: torch.Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or getattr(tensor, "is_there", False)


def waits_of_steps(train: Callable[[list[str]], Any], argv: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the steps of a run wait at, from the second on, since the first works some things out, to the log line."""
    waits, seen, stepped = DeviceWaits(), [], Run.stepped

    def counted(run: Run) -> None:
        stepped(run)
        seen.append(len(waits.found))

    monkeypatch.setattr(Run, "stepped", counted)
    with waits:
        train([*argv, "--steps=4", "--log_every=4"])
    assert len(seen) == 4 and len(waits.found) > seen[-1]  # the log line and the result are noticed
    return waits.found[seen[0] : seen[-1]]
