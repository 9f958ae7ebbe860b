"""How the commands of `evatok` are told to choose lengths."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..allocation.strategies import Allocation
    from ..tokenize.video_tokenizer import VideoTokenizer

_PANEL = "Tokens"
StrategyOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="uniform, fixed, router, budget, max-proxy-reward or threshold.",
        show_default="what the other options mean, else router, without one uniform",
        rich_help_panel=_PANEL,
    ),
]
QualityOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=2,
        help="Weight of quality, 0 to 2, against tokens (router, max-proxy-reward).",
        show_default="1.2",
        rich_help_panel=_PANEL,
    ),
]
BudgetOption = Annotated[
    int | None,
    typer.Option(min=1, help="At most so many tokens for the whole video.", show_default=False, rich_help_panel=_PANEL),
]
BudgetPerClipOption = Annotated[
    int | None,
    typer.Option(min=1, help="At most so many tokens for each clip.", show_default=False, rich_help_panel=_PANEL),
]
LengthsOption = Annotated[
    str | None,
    typer.Option(
        help="Tokens of each block of every clip, such as 128,32,16,64.", show_default=False, rich_help_panel=_PANEL
    ),
]
UniformOption = Annotated[
    int | None, typer.Option(help="The same tokens for every block.", show_default=False, rich_help_panel=_PANEL)
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        help="As few tokens as keep the distance within this, by search.", show_default=False, rich_help_panel=_PANEL
    ),
]
MetricOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Perceptual distance of a search.",
        show_default="the router's",
        rich_help_panel=_PANEL,
    ),
]
BoundsOption = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Distances of quality 1 and 0 (max-proxy-reward).",
        show_default="the router's",
        rich_help_panel=_PANEL,
    ),
]


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
