"""Options of the commands that say how lengths are chosen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..allocation import DATASET_STRATEGIES
from .options import option
from .support import wrong_usage

if TYPE_CHECKING:
    from ..allocation.strategies import Allocation
    from ..tokenize.video_tokenizer import VideoTokenizer

_tokens = partial(option, None, panel="Tokens")
_strategy = partial(_tokens, shown="what the other options mean, else router, without one uniform", metavar="NAME")


@dataclass
class Choice:
    """Options that say how many tokens blocks get."""

    strategy: str | None = _strategy("uniform, fixed, router, budget, max-proxy-reward or threshold.")
    quality: float | None = _tokens(
        "Weight of quality, 0 to 2, against tokens (router, max-proxy-reward).", shown="1.2", min=0, max=2
    )
    budget: int | None = _tokens("At most so many tokens for the whole video.", shown=False, min=1)
    budget_per_clip: int | None = _tokens("At most so many tokens for each clip.", shown=False, min=1)
    lengths: str | None = _tokens("Tokens of each block of every clip, such as 128,32,16,64.", shown=False)
    uniform: int | None = _tokens("The same tokens for every block.", shown=False)
    threshold: float | None = _tokens("As few tokens as keep the distance within this, by search.", shown=False)
    metric: str | None = _tokens("Perceptual distance of a search.", shown="the router's", metavar="NAME")
    bounds: tuple[float, float] | None = _tokens(
        "Distances of quality 1 and 0 (max-proxy-reward).", shown="the router's", metavar="LOW HIGH"
    )


@dataclass
class DatasetChoice:
    """Those of them that a data set can have."""

    strategy: str | None = _strategy(f"{', '.join(DATASET_STRATEGIES[:-1])} or {DATASET_STRATEGIES[-1]}.")
    quality: float | None = Choice.quality
    budget_per_clip: int | None = Choice.budget_per_clip
    lengths: str | None = Choice.lengths
    uniform: int | None = Choice.uniform


def choose(choice: Choice | DatasetChoice, **known: Sequence[str]) -> Allocation:
    """The `Allocation` of these options. Raises typer.BadParameter where they are wrong."""
    from ..allocation.strategies import Allocation

    with wrong_usage():
        return Allocation.from_options(**vars(choice), **known)


def bind(allocation: Allocation, tokenizer: VideoTokenizer, quiet: bool) -> Allocation:
    """The allocation for that model; a search shows a bar unless it is to be quiet.

    Raises:
        typer.BadParameter: lengths that it does not have.
        ValueError: as `Allocation.bind`.
    """
    allocation.progress = not quiet and sys.stderr.isatty()
    if allocation.lengths is None:
        return allocation.bind(tokenizer.model, tokenizer.router)
    with wrong_usage("--uniform" if isinstance(allocation.lengths, int) else "--lengths"):
        return allocation.bind(tokenizer.model, tokenizer.router)
