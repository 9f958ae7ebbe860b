"""Ways to choose how many tokens each temporal block of each clip gets, behind one call: clips in, lengths out.

| name | chooses | needs |
|---|---|---|
| `uniform` | the same length for every block | |
| `fixed` | one assignment for every clip | |
| `router` | the largest predicted reward at a preference w_q (the paper) | a router |
| `budget` | the largest predicted quality within a number of tokens | a router for every preference |
| `max-proxy-reward` | the largest measured reward at a preference w_q (the paper's upper bound) | tokenizer, metric |
| `threshold` | the fewest tokens whose measured distance is within a bound (ElasticTok's way) | tokenizer, metric |

The last two reconstruct every clip under every assignment; the others never run a decoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .assignment import AssignmentSpace, LengthsLike
from .modeling_evatok import EvatokModel
from .modeling_evatok_router import EvatokRouter
from .perceptual import PerceptualDistance
from .reward import DEFAULT_QUALITY, DistanceBounds, best_assignments, check_quality, proxy_reward
from .search import search_assignments

ALLOCATION_NAMES = ("uniform", "fixed", "router", "budget", "max-proxy-reward", "threshold")
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
    router._check_quality(quality)
    return lambda clips: router.assign(clips, quality)


def budgeted(router: EvatokRouter, tokens: int) -> Allocation:
    """At most `tokens` tokens for all clips of a call together, by the router's predicted qualities."""
    if router.config.quality is not None:
        raise ValueError(
            f"this router was trained for quality {router.config.quality} alone and predicts no qualities; a budget "
            "needs a router that was trained for every quality."
        )

    @torch.no_grad()
    def allocate(clips: torch.Tensor) -> torch.Tensor:
        rows = [router(clip[None]).qualities for clip in clips]
        table = torch.cat(rows) if rows else torch.empty(0, len(router.assignment_space))
        return router.assignment_space.to_lengths(split_budget(table, router.assignment_space, tokens))

    return allocate


def searched(
    model: EvatokModel,
    metric: PerceptualDistance,
    bounds: DistanceBounds,
    quality: float = DEFAULT_QUALITY,
    nodes_per_batch: int = 8,
) -> Allocation:
    """The largest measured proxy reward of all assignments."""
    check_quality(quality)
    space = model.assignment_space

    def allocate(clips: torch.Tensor) -> torch.Tensor:
        distances = search_assignments(model, clips, metric, nodes_per_batch).table()[..., 0]
        return space.to_lengths(best_assignments(proxy_reward(distances, space, bounds, quality), space))

    return allocate


def thresholded(model: EvatokModel, metric: PerceptualDistance, bound: float, nodes_per_batch: int = 8) -> Allocation:
    """The fewest tokens whose measured distance is at most `bound`."""
    if not bound > 0:
        raise ValueError(f"the bound on the distance must be positive, got {bound}.")
    space = model.assignment_space

    def allocate(clips: torch.Tensor) -> torch.Tensor:
        distances = search_assignments(model, clips, metric, nodes_per_batch).table()[..., 0]
        return space.to_lengths(shortest_within(distances, space, bound))

    return allocate


def check_same_space(model: EvatokModel, router: EvatokRouter) -> None:
    """Raises ValueError unless the router scores the clips and the assignments of the tokenizer."""
    for field in ("block_lengths", "num_blocks", "num_frames", "image_size"):
        mine, other = getattr(model.config, field), getattr(router.config, field)
        if mine != other:
            raise ValueError(
                f"tokenizer and router disagree: {field} is {mine} in the tokenizer and {other} in the router; use the "
                "router that was trained for this tokenizer."
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
