"""Ways to choose how many tokens each temporal block of each clip gets, behind one call: clips in, lengths out.

| name | chooses | needs |
|---|---|---|
| `uniform` | the same length for every block | |
| `fixed` | one assignment for every clip | |
| `router` | the largest predicted reward at a preference w_q (the paper) | a router |
| `budget` | the largest predicted quality within N tokens, of a video or of each clip | a router for every preference |
| `max-proxy-reward` | the largest measured reward at a preference w_q (the paper's upper bound) | tokenizer, metric |
| `threshold` | the fewest tokens whose measured distance is within a bound (ElasticTok's way) | tokenizer, metric |

The last two reconstruct every clip under every assignment; the others never run a decoder. `allocate` makes any of them
by name. But for a budget over a whole video, a clip's lengths never depend on other clips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..metrics.perceptual import PerceptualDistance, load_perceptual
from ..models.configuration_evatok import AssignmentSpace, LengthsLike
from ..models.modeling_evatok import EvatokModel
from ..models.modeling_evatok_router import DEFAULT_QUALITY, EvatokRouter, check_quality
from .reward import DistanceBounds, best_assignments, proxy_reward
from .search import search_assignments

ALLOCATION_NAMES = ("uniform", "fixed", "router", "budget", "max-proxy-reward", "threshold")
SEARCHES = ("max-proxy-reward", "threshold")
Allocation = Callable[[torch.Tensor], torch.Tensor]  # clips (B, F, C, H, W) -> lengths (B, T)

# --- choices from tables of all assignments ---------------------------------------------------------------------------


def shortest_within(distances: torch.Tensor, space: AssignmentSpace, bound: float) -> torch.Tensor:
    """Of each clip, the assignment with the fewest tokens whose distance is at most `bound`, (B, A) -> (B,) int64.

    Of equally short ones the nearest; where none is within the bound, the nearest of all.
    """
    _check(distances, space)
    total = space.all().sum(-1).double()
    nearness = distances.double() / distances.double().max().clamp_min(1e-12)  # at most 1, less than a token
    cost = torch.where(distances <= bound, total + 0.5 * nearness, torch.inf)
    return torch.where(cost.isinf().all(-1), distances.argmin(-1), cost.argmin(-1))


def best_within(qualities: torch.Tensor, space: AssignmentSpace, tokens: int) -> torch.Tensor:
    """Of each clip, the assignment of the largest quality with at most `tokens` tokens, (B, A) -> (B,) int64.

    Raises:
        ValueError: fewer tokens than the shortest assignment has.
    """
    _check(qualities, space)
    _check_budget(tokens, space, 1)
    total = space.all().sum(-1)
    allowed = torch.where(total <= tokens, qualities.double(), -torch.inf)
    order = total.argsort(stable=True)
    return order[allowed[:, order].argmax(-1)]


def split_budget(qualities: torch.Tensor, space: AssignmentSpace, tokens: int) -> torch.Tensor:
    """The assignments of all clips of a video with the largest sum of qualities within `tokens` tokens in all.

    A multiple-choice knapsack, solved exactly as an integer program (HiGHS, through SciPy). Unlike an allocation inside
    a training batch (AdapTok's), a clip only competes with the other clips of its own video.

    Args:
        qualities: (B, A) of the clips of one video.
        space: of the assignments.
        tokens: for the whole video.

    Returns:
        (B,) int64 assignment indices.

    Raises:
        ValueError: fewer tokens than the shortest assignments have together.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    _check(qualities, space)
    _check_budget(tokens, space, len(qualities))
    if len(qualities) == 0:
        return torch.empty(0, dtype=torch.int64)
    total = space.all().sum(-1)
    # Only assignments that no shorter one equals or beats can be chosen: dozens instead of hundreds.
    order = total.argsort(stable=True)
    clips, chosen = [], []
    for clip, row in enumerate(qualities.double().cpu()):
        before = torch.cat([row.new_tensor([-torch.inf]), row[order].cummax(0).values[:-1]])
        kept = order[row[order] > before]
        clips.append(torch.full_like(kept, clip))
        chosen.append(kept)
    clip, index = torch.cat(clips).numpy(), torch.cat(chosen)
    ones, columns = [1.0] * len(clip), range(len(clip))
    one_each = coo_array((ones, (clip, columns)), shape=(len(qualities), len(clip))).tocsr()
    solution = milp(
        -qualities.double().cpu()[torch.from_numpy(clip), index].numpy(),
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(total[index].numpy()[None], 0, tokens)],
        options={"mip_rel_gap": 0},
    )
    if not solution.success:
        raise ValueError(f"no split of {tokens} tokens over {len(qualities)} clips was found: {solution.message}")
    taken = torch.from_numpy(solution.x) > 0.5
    return index[taken][torch.from_numpy(clip)[taken].argsort()]


def best_fixed(distances: torch.Tensor, space: AssignmentSpace, tokens: float) -> int:
    """The one assignment with at most `tokens` tokens whose mean distance over all clips is smallest, an index.

    Raises:
        ValueError: fewer tokens than the shortest assignment has.
    """
    return int(best_within(-distances.double().mean(0, keepdim=True), space, tokens))


# --- strategies -------------------------------------------------------------------------------------------------------


def fixed(space: AssignmentSpace, lengths: LengthsLike) -> Allocation:
    """The same assignment for every clip; one number gives the same length to every block."""
    row = space.validate(lengths)
    if row.ndim != 1:
        raise ValueError(f"one assignment for all clips has {space.num_blocks} lengths, got shape {tuple(row.shape)}.")
    return lambda clips: row.repeat(len(clips), 1)


def routed(router: EvatokRouter, quality: float | None = None) -> Allocation:
    """One router pass a clip at preference `quality`."""
    router.check_quality(quality)
    return lambda clips: router.assign(clips, quality)


class VideoBudget:
    """At most `tokens` tokens for all clips of one video together, split by the router's predicted qualities.

    Called with all clips of a video it answers at once. Where they do not fit into memory, `look` at them one after
    another, keep A numbers of each, and `split`.

    Raises:
        ValueError: a router for one preference, which predicts no qualities.
    """

    def __init__(self, router: EvatokRouter, tokens: int) -> None:
        _check_predicts(router)
        self.router, self.tokens = router, tokens

    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        return self.split(self.look(clips))

    def check(self, clips: int) -> None:
        """Raises ValueError, naming the smallest possible budget, where there is too little for so many clips."""
        _check_budget(self.tokens, self.router.assignment_space, clips)

    def look(self, clips: torch.Tensor) -> torch.Tensor:
        """The predicted qualities of each clip, (B, F, C, H, W) -> (B, A) on the CPU."""
        return _predicted(self.router, clips)

    def split(self, qualities: torch.Tensor) -> torch.Tensor:
        """The lengths of all clips, (B, A) -> (B, T). Raises ValueError as `check`."""
        space = self.router.assignment_space
        return space.to_lengths(split_budget(qualities, space, self.tokens))


def budgeted(router: EvatokRouter, tokens: int) -> VideoBudget:
    """At most `tokens` tokens for all clips of a video (all clips of a call) together. Raises as `VideoBudget`."""
    return VideoBudget(router, tokens)


def limited(router: EvatokRouter, tokens: int) -> Allocation:
    """At most `tokens` tokens for each clip, by the router's predicted qualities.

    Raises:
        ValueError: as `VideoBudget`; fewer tokens than a clip needs.
    """
    _check_predicts(router)
    space = router.assignment_space
    _check_budget(tokens, space, 1)
    return lambda clips: space.to_lengths(best_within(_predicted(router, clips), space, tokens))


def searched(
    model: EvatokModel,
    metric: PerceptualDistance,
    bounds: DistanceBounds,
    quality: float = DEFAULT_QUALITY,
    nodes_per_batch: int = 8,
    progress: bool = False,
) -> Allocation:
    """The largest measured proxy reward of all assignments; `progress` shows a bar of the search."""
    check_quality(quality)
    model.check_decoder("search")
    space = model.assignment_space

    def allocate(clips: torch.Tensor) -> torch.Tensor:
        distances = search_assignments(model, clips, metric, nodes_per_batch, progress=progress).table()[..., 0]
        return space.to_lengths(best_assignments(proxy_reward(distances, space, bounds, quality), space))

    return allocate


def thresholded(
    model: EvatokModel, metric: PerceptualDistance, bound: float, nodes_per_batch: int = 8, progress: bool = False
) -> Allocation:
    """The fewest tokens whose measured distance is at most `bound`; `progress` shows a bar of the search."""
    if not bound > 0:
        raise ValueError(f"the bound on the distance must be positive, got {bound}.")
    model.check_decoder("search")
    space = model.assignment_space

    def allocate(clips: torch.Tensor) -> torch.Tensor:
        distances = search_assignments(model, clips, metric, nodes_per_batch, progress=progress).table()[..., 0]
        return space.to_lengths(shortest_within(distances, space, bound))

    return allocate


# --- by name ----------------------------------------------------------------------------------------------------------

# What each strategy can be told, and which strategy an option stands for by itself.
_TAKES = {
    "uniform": ("lengths",),
    "fixed": ("lengths",),
    "router": ("quality",),
    "budget": ("budget", "budget_per_clip"),
    "max-proxy-reward": ("quality", "metric", "bounds"),
    "threshold": ("threshold", "metric"),
}
_IMPLIES = {"quality": "router", "budget": "budget", "budget_per_clip": "budget", "threshold": "threshold"}


def find_strategy(strategy: str | None, options: Mapping[str, Any], spell: Callable[[str], str] = str) -> str | None:
    """The strategy that a choice of options means.

    Args:
        strategy: one of `ALLOCATION_NAMES`, or None to conclude it from the options.
        options: those of `allocate` by name; None stands for one that was not given.
        spell: how messages write the name of an option.

    Returns:
        A name, or None where nothing was given: then the default holds.

    Raises:
        ValueError: an unknown strategy, options that contradict it or each other, or one that it lacks.
    """
    given = [name for name, value in options.items() if value is not None]
    if strategy is not None and strategy not in _TAKES:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(ALLOCATION_NAMES)}.")
    if "budget" in given and "budget_per_clip" in given:
        raise ValueError(f"give either {spell('budget')} or {spell('budget_per_clip')}, not both.")
    if strategy is None:
        implied = {}
        for name in given:
            if name == "lengths":
                implied["uniform" if isinstance(options[name], int) else "fixed"] = name
            elif name in _IMPLIES:
                implied[_IMPLIES[name]] = name
        if len(implied) > 1:
            raise ValueError(
                f"{' and '.join(spell(name) for name in implied.values())} contradict each other; give only one, or "
                f"{spell('strategy')} with what it takes."
            )
        if not implied and given:
            raise ValueError(
                f"{spell(given[0])} says nothing by itself; add {spell('threshold')}, or {spell('strategy')} "
                "max-proxy-reward."
            )
        strategy = next(iter(implied), None)
        if strategy is None:
            return None
    takes = _TAKES[strategy]
    for name in given:
        if name not in takes:
            raise ValueError(
                f"strategy {strategy} does not take {spell(name)}; it takes {' and '.join(map(spell, takes))}."
            )
    needs = {"fixed": ("lengths",), "budget": takes, "threshold": ("threshold",)}.get(strategy)
    if needs and not set(needs) & set(given):
        raise ValueError(f"strategy {strategy} needs {' or '.join(map(spell, needs))}.")
    return strategy


def allocate(
    strategy: str | None,
    model: EvatokModel,
    router: EvatokRouter | None = None,
    *,
    lengths: LengthsLike | None = None,
    quality: float | None = None,
    budget: int | None = None,
    budget_per_clip: int | None = None,
    threshold: float | None = None,
    metric: str | PerceptualDistance | None = None,
    bounds: DistanceBounds | tuple[float, float] | None = None,
    progress: bool = False,
) -> Allocation:
    """Any strategy by its name and what it needs.

    Args:
        strategy: one of `ALLOCATION_NAMES`; None concludes it from the options, and without any takes the router, or
            the middle candidate for every block where there is none.
        model: the tokenizer; the searches run it, the others only ask for its assignments.
        router: of the same assignments, or None.
        lengths: for uniform one candidate (the middle one by default), for fixed T of them.
        quality: w_q in 0..2 for router and max-proxy-reward; by default the router's own, or 1.2.
        budget: tokens for all clips of a video together.
        budget_per_clip: tokens for each clip at most.
        threshold: the largest distance allowed.
        metric: a perceptual distance, or the name of one, for the searches; by default the router's.
        bounds: of the distance, for max-proxy-reward; by default the router's.
        progress: show a bar of each search.

    Raises:
        ValueError: as `find_strategy`; values out of range; a router or a metric that is needed and not there.
    """
    options = {
        "lengths": lengths,
        "quality": quality,
        "budget": budget,
        "budget_per_clip": budget_per_clip,
        "threshold": threshold,
        "metric": metric,
        "bounds": bounds,
    }
    strategy = find_strategy(strategy, options) or default_strategy(router)
    space = model.assignment_space
    if strategy == "uniform":
        if lengths is None:
            lengths = space.block_lengths[len(space.block_lengths) // 2]
        if not isinstance(lengths, int):
            raise ValueError(f"strategy uniform takes one length for all blocks, got {lengths}; fixed takes a list.")
        return fixed(space, lengths)
    if strategy == "fixed":
        return fixed(space, lengths)
    if strategy in ("router", "budget"):
        if router is None:
            raise ValueError(
                f"strategy {strategy} needs a router and this model has none; take a model with router/ beside "
                "tokenizer/, or another strategy."
            )
        if strategy == "router":
            return routed(router, quality)
        return limited(router, budget_per_clip) if budget is None else budgeted(router, budget)
    if strategy == "threshold":
        return thresholded(model, _find_metric(metric, model, router), threshold, progress=progress)
    limits = _find_bounds(bounds, metric, router)
    quality = DEFAULT_QUALITY if quality is None else quality
    check_quality(quality)
    return searched(model, _find_metric(metric, model, router), limits, quality, progress=progress)


def default_strategy(router: EvatokRouter | None) -> str:
    return "uniform" if router is None else "router"


def _find_metric(
    metric: str | PerceptualDistance | None, model: EvatokModel, router: EvatokRouter | None
) -> PerceptualDistance:
    if metric is None and router is not None:
        metric = router.config.distance
    if metric is None:
        raise ValueError(
            "a search needs a perceptual metric, and there is no router that names one; give a metric, such as "
            "perceptual-effnet-lite0."
        )
    return (load_perceptual(metric) if isinstance(metric, str) else metric).to(model.device)


def _find_bounds(
    bounds: DistanceBounds | tuple[float, float] | None,
    metric: str | PerceptualDistance | None,
    router: EvatokRouter | None,
) -> DistanceBounds:
    if bounds is not None:
        return bounds if isinstance(bounds, DistanceBounds) else DistanceBounds(*bounds)
    config = None if router is None else router.config
    if config is None or config.distance_low is None or config.distance_high is None:
        raise ValueError(
            "max-proxy-reward needs the bounds at which a distance means quality 1 and 0, and there is no router that "
            "has them; give bounds, low and high."
        )
    name = metric if metric is None or isinstance(metric, str) else metric.name
    if name not in (None, config.distance):
        raise ValueError(f"the router's bounds are of {config.distance}, not of {name}; give bounds for it.")
    return DistanceBounds(config.distance_low, config.distance_high)


@torch.no_grad()
def _predicted(router: EvatokRouter, clips: torch.Tensor) -> torch.Tensor:
    """(B, F, C, H, W) -> (B, A) on the CPU, clip by clip, so that a clip's do not depend on its batch-mates."""
    rows = [router(clip[None]).qualities.cpu() for clip in clips]
    return torch.cat(rows) if rows else torch.empty(0, len(router.assignment_space))


def _check_predicts(router: EvatokRouter) -> None:
    if router.config.quality is not None:
        raise ValueError(
            f"this router was trained for quality {router.config.quality} alone and predicts no qualities; a budget "
            "needs a router that was trained for every quality."
        )


def _check(table: torch.Tensor, space: AssignmentSpace) -> None:
    if table.ndim != 2 or table.shape[1] != len(space):
        raise ValueError(
            f"a table for {space} has shape (clips, {len(space)}), got {tuple(table.shape)}; it is of another space."
        )


def _check_budget(tokens: float, space: AssignmentSpace, clips: int) -> None:
    if tokens < space.min_tokens * clips:
        raise ValueError(
            f"{tokens} tokens are too few: {clips} clip(s) need at least {space.min_tokens * clips} "
            f"({space.min_tokens} each)."
        )
