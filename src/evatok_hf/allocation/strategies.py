"""Rules from clips to the number of tokens that each temporal block of each clip gets: `Allocation`, by strategy.

| name | chooses | needs |
|---|---|---|
| `uniform` | the same length for every block | |
| `fixed` | one assignment for every clip | |
| `router` | the largest predicted reward at a preference w_q (the paper) | a router |
| `budget` | the largest predicted quality within N tokens, of a video or of each clip | a router for every preference |
| `max-proxy-reward` | the largest measured reward at a preference w_q (the paper's upper bound) | tokenizer, metric |
| `threshold` | the fewest tokens whose measured distance is within a bound (ElasticTok's way) | tokenizer, metric |

The last two reconstruct every clip under every assignment; the others never run a decoder. But for a budget over a
whole video, a clip's lengths never depend on other clips.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..metrics.perceptual import PerceptualDistance, load_perceptual
from ..models.configuration_evatok import AssignmentSpace, LengthsLike
from ..models.modeling_evatok import EvatokModel
from ..models.modeling_evatok_router import DEFAULT_QUALITY, EvatokRouter, check_quality
from . import ALLOCATION_NAMES
from .reward import DistanceBounds, best_assignments, check_table, proxy_reward
from .search import search_assignments

# --- choices from tables of all assignments ---------------------------------------------------------------------------


def shortest_within(distances: torch.Tensor, space: AssignmentSpace, bound: float) -> torch.Tensor:
    """The assignment of each clip with the fewest tokens whose distance is at most `bound`, (B, A) -> (B,) int64.

    Of equally short ones the nearest; where none is within the bound, the nearest of all.
    """
    check_table(distances, space)
    total = space.all().sum(-1).double()
    nearness = distances.double() / distances.double().max().clamp_min(1e-12)  # at most 1, less than a token
    cost = torch.where(distances <= bound, total + 0.5 * nearness, torch.inf)
    return torch.where(cost.isinf().all(-1), distances.argmin(-1), cost.argmin(-1))


def best_within(qualities: torch.Tensor, space: AssignmentSpace, tokens: int) -> torch.Tensor:
    """The assignment of each clip with the largest quality within `tokens` tokens, (B, A) -> (B,) int64.

    Raises:
        ValueError: fewer tokens than the shortest assignment has.
    """
    check_table(qualities, space)
    _check_budget(tokens, space, 1)
    return best_assignments(torch.where(space.all().sum(-1) <= tokens, qualities.double(), -torch.inf), space)


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
        ValueError: fewer tokens than the shortest assignments have together, or a clip without any quality.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    check_table(qualities, space)
    _check_budget(tokens, space, len(qualities))
    if len(qualities) == 0:
        return torch.empty(0, dtype=torch.int64)
    total = space.all().sum(-1)
    order = total.argsort(stable=True)
    ordered = qualities.double().cpu()[:, order]
    # Only assignments that no shorter one equals or beats can be chosen: dozens instead of hundreds.
    before = F.pad(ordered.cummax(1).values[:, :-1], (1, 0), value=-torch.inf)
    clip, place = (ordered > before).nonzero(as_tuple=True)
    if len(clip.unique()) < len(qualities):
        raise ValueError("a clip has no quality that is a number, so that no budget can be split; look at the router.")
    index = order[place]
    one_each = coo_array((np.ones(len(clip)), (clip.numpy(), range(len(clip))))).tocsr()
    solution = milp(
        -ordered[clip, place].numpy(),
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(total[index].numpy()[None], 0, tokens)],
        options={"mip_rel_gap": 0},
    )
    if not solution.success:
        raise ValueError(f"no split of {tokens} tokens over {len(qualities)} clips was found: {solution.message}")
    return index[torch.from_numpy(solution.x) > 0.5]


# --- the rule ---------------------------------------------------------------------------------------------------------

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


def find_strategy(
    strategy: str | None,
    options: Mapping[str, Any],
    spell: Callable[[str], str] = str,
    known: Sequence[str] = ALLOCATION_NAMES,
) -> str | None:
    """The strategy that a choice of options means, None where nothing was given: then the default holds.

    Args:
        strategy: one of `known`, or None to conclude it from the options.
        options: those of `Allocation` by name that can be given; None stands for one that was not.
        spell: how messages write the name of an option.

    Raises:
        ValueError: an unknown strategy, options that contradict it or each other, or one that it lacks.
    """
    given = [name for name, value in options.items() if value is not None]
    if strategy not in (None, *known):
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(known)}.")
    if "budget" in given and "budget_per_clip" in given:
        raise ValueError(f"give either {spell('budget')} or {spell('budget_per_clip')}, not both.")
    if strategy is None:
        means = {**_IMPLIES, "lengths": "uniform" if isinstance(options.get("lengths"), int) else "fixed"}
        implied = {means[name]: name for name in given if name in means}
        if len(implied) > 1:
            raise ValueError(
                f"{' and '.join(spell(name) for name in implied.values())} contradict each other; give only one, or "
                f"{spell('strategy')} with what it takes."
            )
        if not given:
            return None
        if not implied:
            raise ValueError(
                f"{spell(given[0])} says nothing by itself; add {spell('threshold')}, or {spell('strategy')} "
                "max-proxy-reward."
            )
        (strategy,) = implied
    takes = [name for name in _TAKES[strategy] if name in options]
    for name in given:
        if name not in takes:
            raise ValueError(
                f"strategy {strategy} does not take {spell(name)}; it takes {' and '.join(map(spell, takes))}."
            )
    needs = {"fixed": ("lengths",), "budget": takes, "threshold": ("threshold",)}.get(strategy)
    if needs and not set(needs) & set(given):
        raise ValueError(f"strategy {strategy} needs {' or '.join(map(spell, needs))}.")
    return strategy


@dataclass(eq=False)
class Allocation:
    """A rule from clips to lengths: a strategy with its options.

        allocation = Allocation(quality=1.4)
        tokens = tokenizer.encode("video.mp4", allocation)
        lengths = allocation.bind(model, router)(clips)  # (B, F, C, H, W) -> (B, T)

    Made without a model it says what is wanted; `bind` gives the same rule for a model, with all that was left open
    settled, which can be called.

    Args:
        strategy: one of `ALLOCATION_NAMES`; None concludes it from the options, and without any takes the router, or
            the middle candidate for every block where there is none.
        lengths: for uniform one candidate (the middle one by default), for fixed T of them.
        quality: w_q in 0..2 for router and max-proxy-reward; by default the router's own, or 1.2.
        budget: tokens for all clips of a video together.
        budget_per_clip: tokens for each clip at most.
        threshold: the largest distance allowed.
        metric: a perceptual distance, or the name of one, for the searches; by default the router's.
        bounds: of the distance, for max-proxy-reward; by default the router's.
        progress: show a bar of each search.
        model, router: set by `bind`.

    Raises:
        ValueError: as `find_strategy`.
    """

    strategy: str | None = None
    lengths: LengthsLike | None = None
    quality: float | None = None
    budget: int | None = None
    budget_per_clip: int | None = None
    threshold: float | None = None
    metric: str | PerceptualDistance | None = None
    bounds: DistanceBounds | tuple[float, float] | None = None
    progress: bool = False
    model: EvatokModel | None = field(default=None, repr=False)
    router: EvatokRouter | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.strategy = find_strategy(self.strategy, {name: getattr(self, name) for name in _OPTIONS})

    @classmethod
    def from_options(
        cls,
        strategy: str | None = None,
        lengths: str | None = None,
        uniform: int | None = None,
        known: Sequence[str] = ALLOCATION_NAMES,
        **told: Any,
    ) -> Allocation:
        """The rule that options of a command mean.

        Args:
            strategy: its name, or None.
            lengths: those of all blocks, as text such as "128,32,16,64".
            uniform: one for every block.
            known: the strategies that the command has.
            told: the other options that it has, None where one was not given.

        Raises:
            ValueError: as `find_strategy`, in words of the command line; lengths that are no whole numbers, or both.
        """
        told["lengths"] = parse_lengths(lengths, uniform)
        spelled = {"lengths": "--lengths" if uniform is None else "--uniform"}
        find_strategy(strategy, told, lambda name: spelled.get(name, f"--{name.replace('_', '-')}"), known)
        return cls(strategy, **told)

    @property
    def searches(self) -> bool:
        """True for a strategy that reconstructs clips, which needs a decoder."""
        return self.strategy in ("max-proxy-reward", "threshold")

    def check_for_dataset(self) -> None:
        """Raises ValueError for a rule that is not for data sets: a search, or a budget over a whole video."""
        if self.searches:
            raise ValueError(f"strategy {self.strategy} takes too long for a data set; choose another.")
        if self.budget is not None:
            raise ValueError("a budget over a whole video says nothing of single clips; give budget_per_clip.")

    def bind(self, model: EvatokModel, router: EvatokRouter | None = None) -> Allocation:
        """The rule bound to a model, which can be called.

        Args:
            model: the tokenizer; the searches run it, the others only ask for its assignments.
            router: of the same assignments, or None.

        Raises:
            ValueError: lengths that the model does not have, values out of range; a router, a decoder or a metric that
                is needed and not there.
        """
        space, told = model.assignment_space, {}
        strategy = self.strategy or ("uniform" if router is None else "router")
        if strategy in ("uniform", "fixed"):
            lengths = space.block_lengths[len(space.block_lengths) // 2] if self.lengths is None else self.lengths
            if strategy == "uniform" and not isinstance(lengths, int):
                raise ValueError(
                    f"strategy uniform takes one length for all blocks, got {lengths}; fixed takes a list."
                )
            if (row := space.validate(lengths)).ndim != 1:
                raise ValueError(
                    f"one assignment for all clips has {space.num_blocks} lengths, got shape {tuple(row.shape)}."
                )
            told["lengths"] = lengths if strategy == "uniform" else row.tolist()
        elif self.searches:
            model.check_decoder("search")
            if strategy == "max-proxy-reward":
                told["bounds"] = _find_bounds(self.bounds, self.metric, router)
                told["quality"] = float(check_quality(DEFAULT_QUALITY if self.quality is None else self.quality))
            elif not self.threshold > 0:
                raise ValueError(f"the bound on the distance must be positive, got {self.threshold}.")
            told["metric"] = _find_metric(self.metric, model, router)
        elif router is None:
            raise ValueError(
                f"strategy {strategy} needs a router and this model has none; take a model with router/ beside "
                "tokenizer/, or another strategy."
            )
        elif strategy == "router":
            told["quality"] = float(router.check_quality(self.quality))
        elif router.config.quality is not None:
            raise ValueError(
                f"this router was trained for quality {router.config.quality} alone and predicts no qualities; a "
                "budget needs a router that was trained for every quality."
            )
        elif self.budget_per_clip is not None:
            _check_budget(self.budget_per_clip, space, 1)
        return replace(self, strategy=strategy, model=model, router=router, **told)

    @torch.no_grad()
    def __call__(self, clips: torch.Tensor, exact: bool | None = None) -> torch.Tensor:
        """The lengths of clips, (B, F, C, H, W) -> (B, T) int64 on the CPU.

        Args:
            clips: in [-1, 1]; under `budget` all clips of a video.
            exact: whether a router takes each clip on its own; see `EvatokRouter.assign`.

        Raises:
            ValueError: a rule without a model; fewer tokens than `budget` needs.
        """
        if self.model is None:
            raise ValueError("this allocation has no model yet; call what `bind` gives, or give it to VideoTokenizer.")
        space = self.model.assignment_space
        if self.lengths is not None:
            return space.validate(self.lengths, len(clips))
        if self.strategy == "router":
            return self.router.assign(clips, self.quality, exact)
        if self.budget is not None:
            return self.split(self.look(clips, exact))
        if self.budget_per_clip is not None:
            return space.to_lengths(best_within(self.look(clips, exact), space, self.budget_per_clip))
        found = search_assignments(self.model, clips, self.metric, 8, progress=self.progress)
        distances = found.table()[..., 0]
        if self.strategy == "threshold":
            return space.to_lengths(shortest_within(distances, space, self.threshold))
        return space.to_lengths(best_assignments(proxy_reward(distances, space, self.bounds, self.quality), space))

    # A budget over a whole video whose clips do not fit into memory: `look` at them one after another, keep A numbers
    # of each, and `split`.

    def look(self, clips: torch.Tensor, exact: bool | None = None) -> torch.Tensor:
        """The predicted qualities of each clip, (B, F, C, H, W) -> (B, A) on the CPU; `exact` as of a call."""
        return self.router.predict(clips, exact)

    def split(self, qualities: torch.Tensor) -> torch.Tensor:
        """The lengths of all clips of a video, (B, A) -> (B, T). Raises ValueError as `check_clips`."""
        space = self.model.assignment_space
        return space.to_lengths(split_budget(qualities, space, self.budget))

    def check_clips(self, clips: int) -> None:
        """Raises ValueError, naming the smallest possible budget, where it is too little for so many clips."""
        _check_budget(self.budget, self.model.assignment_space, clips)

    # --- in words, of a bound rule ---

    def report(self) -> dict[str, Any]:
        """The strategy and what it was told, None for what it does not take."""
        told = {name: getattr(self, name) for name in ("budget", "budget_per_clip", "threshold")}
        metric = None if self.metric is None else self.metric.name
        return {"strategy": self.strategy, "quality": self.quality, **told, "metric": metric}

    def label(self) -> str:
        """The strategy and its options in a few words, such as "router (quality 1.2)"."""
        words = {
            "quality": "quality {}",
            "budget": "{} tokens in all",
            "budget_per_clip": "{} tokens a clip",
            "threshold": "distance {}",
            "metric": "{}",
            "lengths": "{} tokens",
        }
        report = self.report() | {"lengths": self.lengths and str(self.lengths).strip("[]")}
        told = [text.format(report[name]) for name, text in words.items() if report[name] is not None]
        return f"{self.strategy} ({', '.join(told)})"

    def describe(self) -> dict[str, Any]:
        """The record of a bound rule in a data set of tokens: its label, its options, its router's fingerprint."""
        return {
            "allocation": self.label(),
            **{name: getattr(self, name) for name in ("strategy", "quality", "budget_per_clip", "lengths")},
            "router_fingerprint": self.router.fingerprint() if self.strategy in ("router", "budget") else None,
        }


_OPTIONS = tuple(found.name for found in fields(Allocation))[1:8]


def parse_lengths(lengths: str | None, uniform: int | None) -> list[int] | int | None:
    """`--lengths` and `--uniform` as numbers, None where neither is given; a single length is for every block.

    Raises:
        ValueError: both, or something else than whole numbers.
    """
    if lengths is None:
        return uniform
    if uniform is not None:
        raise ValueError("give one of --lengths and --uniform, not both")
    try:
        numbers = [int(part) for part in lengths.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--lengths {lengths!r} is no list of whole numbers with commas between, such as 128,32,16,64"
        ) from error
    return numbers if len(numbers) > 1 else numbers[0]


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
    name = getattr(metric, "name", metric)
    if name not in (None, config.distance):
        raise ValueError(f"the router's bounds are of {config.distance}, not of {name}; give bounds for it.")
    return DistanceBounds(config.distance_low, config.distance_high)


def _check_budget(tokens: float, space: AssignmentSpace, clips: int) -> None:
    if tokens < space.min_tokens * clips:
        raise ValueError(
            f"{tokens} tokens are too few: {clips} clip(s) need at least {space.min_tokens * clips} "
            f"({space.min_tokens} each)."
        )


# --- names of the release before, which documentation showed ----------------------------------------------------------


def allocate(
    strategy: str | None, model: EvatokModel, router: EvatokRouter | None = None, **options: Any
) -> Allocation:
    """`Allocation(strategy, **options).bind(model, router)`."""
    warnings.warn("allocate is Allocation(..).bind(model, router) now.", FutureWarning, stacklevel=2)
    return Allocation(strategy, **options).bind(model, router)


def VideoBudget(router: EvatokRouter, tokens: int) -> Allocation:  # noqa: N802
    """`Allocation(budget=tokens).bind(model, router)`."""
    warnings.warn("VideoBudget is Allocation(budget=..).bind(model, router) now.", FutureWarning, stacklevel=2)
    return Allocation(budget=tokens).bind(router, router)  # of the model it needs the assignments alone
