"""The choice of how many tokens each block gets: strategies, the reward, and the search over all assignments."""

from importlib import import_module
from typing import Any

from .._lazy import lazy

ALLOCATION_NAMES = ("uniform", "fixed", "router", "budget", "max-proxy-reward", "threshold")
# Of a whole data set; the others would reconstruct every clip hundreds of times.
DATASET_STRATEGIES = ALLOCATION_NAMES[:4]

_get, __dir__, __all__ = lazy(__name__, {"strategies": "Allocation split_budget"})


def __getattr__(name: str) -> Any:
    if name in ("allocate", "VideoBudget"):  # of the release before; they warn when they are called
        return getattr(import_module(".strategies", __name__), name)
    return _get(name)
