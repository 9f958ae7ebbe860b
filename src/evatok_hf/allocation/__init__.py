"""The choice of how many tokens each block gets: strategies, the reward, and the search over all assignments."""

from .._lazy import lazy

ALLOCATION_NAMES = ("uniform", "fixed", "router", "budget", "max-proxy-reward", "threshold")
# Of a whole data set; the others would reconstruct every clip hundreds of times.
DATASET_STRATEGIES = ALLOCATION_NAMES[:4]

__getattr__, __dir__, __all__ = lazy(__name__, {"strategies": "Allocation split_budget"})
