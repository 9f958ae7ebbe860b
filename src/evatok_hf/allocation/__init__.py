"""Who chooses how many tokens each block gets: strategies, the reward, and the search over all assignments."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "ALLOCATION_NAMES": "strategies",
        "Allocation": "strategies",
        "VideoBudget": "strategies",
        "allocate": "strategies",
        "split_budget": "strategies",
    },
)
