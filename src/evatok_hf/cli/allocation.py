"""How the commands of `evatok` are told to choose lengths."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from .support import option

if TYPE_CHECKING:
    from ..allocation.strategies import Allocation
    from ..tokenize.video_tokenizer import VideoTokenizer

_tokens = partial(option, panel="Tokens")

StrategyOption = _tokens(
    str | None,
    "uniform, fixed, router, budget, max-proxy-reward or threshold.",
    default="what the other options mean, else router, without one uniform",
    metavar="NAME",
)
QualityOption = _tokens(
    float | None, "Weight of quality, 0 to 2, against tokens (router, max-proxy-reward).", default="1.2", min=0, max=2
)
BudgetOption = _tokens(int | None, "At most so many tokens for the whole video.", default=False, min=1)
BudgetPerClipOption = _tokens(int | None, "At most so many tokens for each clip.", default=False, min=1)
LengthsOption = _tokens(str | None, "Tokens of each block of every clip, such as 128,32,16,64.", default=False)
UniformOption = _tokens(int | None, "The same tokens for every block.", default=False)
ThresholdOption = _tokens(float | None, "As few tokens as keep the distance within this, by search.", default=False)
MetricOption = _tokens(str | None, "Perceptual distance of a search.", default="the router's", metavar="NAME")
BoundsOption = _tokens(
    tuple[float, float] | None,
    "Distances of quality 1 and 0 (max-proxy-reward).",
    default="the router's",
    metavar="LOW HIGH",
)


def choose(strategy: str | None, lengths: str | None, uniform: int | None, **told: Any) -> Allocation:
    """The `Allocation` of these options. Raises typer.BadParameter where they are wrong."""
    from ..allocation.strategies import Allocation

    try:
        return Allocation.from_options(strategy, lengths, uniform, **told)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=None) from error


def bind(allocation: Allocation, tokenizer: VideoTokenizer, quiet: bool) -> Allocation:
    """The allocation for that model; a search shows a bar unless it is to be quiet.

    Raises:
        typer.BadParameter: lengths that it does not have.
        ValueError: as `Allocation.bind`.
    """
    allocation.progress = not quiet and sys.stderr.isatty()
    try:
        return allocation.bind(tokenizer.model, tokenizer.router)
    except ValueError as error:
        if allocation.lengths is None:
            raise
        hint = "--uniform" if isinstance(allocation.lengths, int) else "--lengths"
        raise typer.BadParameter(str(error), param_hint=hint) from error
