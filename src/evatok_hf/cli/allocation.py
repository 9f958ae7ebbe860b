"""How the commands of `evatok` are told to choose lengths."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..allocation.strategies import Allocation
    from ..tokenize.video_tokenizer import VideoTokenizer

_PANEL = "Tokens"
# Of a whole data set; the searches would reconstruct every clip hundreds of times.
DATASET_STRATEGIES = ("uniform", "fixed", "router", "budget")
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


class AllocationChoice:
    """What the options say, checked without a model.

    Raises:
        typer.BadParameter: an unknown strategy, or options that contradict each other.
    """

    def __init__(
        self,
        strategy: str | None,
        lengths: str | None,
        uniform: int | None,
        quality: float | None,
        budget: int | None,
        budget_per_clip: int | None,
        threshold: float | None,
        metric: str | None,
        bounds: tuple[float, float] | None,
    ) -> None:
        from ..allocation.strategies import find_strategy

        self._lengths_option = "--lengths" if uniform is None else "--uniform"
        self.options: dict[str, Any] = {
            "lengths": parse_lengths(lengths, uniform),
            "quality": quality,
            "budget": budget,
            "budget_per_clip": budget_per_clip,
            "threshold": threshold,
            "metric": metric,
            "bounds": bounds,
        }
        try:
            self.strategy = find_strategy(strategy, self.options, self._spell)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=None) from error

    @property
    def searches(self) -> bool:
        """Whether the strategy reconstructs clips, which needs a decoder."""
        from ..allocation.strategies import SEARCHES

        return self.strategy in SEARCHES

    def allocation(self, tokenizer: VideoTokenizer, quiet: bool) -> Allocation:
        """The allocation of that model; lengths that it does not have are wrong usage.

        Raises:
            ValueError: values out of range, or a router or metric that is needed and not there.
        """
        progress = not quiet and sys.stderr.isatty()
        try:
            return tokenizer.allocation(self.strategy, **self.options, progress=progress)
        except ValueError as error:
            if self.options["lengths"] is None:
                raise
            raise typer.BadParameter(str(error), param_hint=self._lengths_option) from error

    def report(self, tokenizer: VideoTokenizer) -> dict[str, Any]:
        """The strategy and what it was told, None for what it does not take."""
        from ..allocation.strategies import default_strategy
        from ..models.modeling_evatok_router import DEFAULT_QUALITY

        router, quality, metric = tokenizer.router, self.options["quality"], self.options["metric"]
        strategy = self.strategy or default_strategy(router)
        if strategy == "router" and quality is None:
            quality = router.config.quality
        if strategy in ("router", "max-proxy-reward") and quality is None:
            quality = DEFAULT_QUALITY
        if strategy in ("threshold", "max-proxy-reward") and metric is None:
            metric = router.config.distance
        told = {name: self.options[name] for name in ("budget", "budget_per_clip", "threshold")}
        return {"strategy": strategy, "quality": quality, **told, "metric": metric}

    def label(self, tokenizer: VideoTokenizer) -> str:
        """The same in a few words."""
        report = self.report(tokenizer)
        words = {
            "quality": "quality {}",
            "budget": "{} tokens in all",
            "budget_per_clip": "{} tokens a clip",
            "threshold": "distance {}",
            "metric": "{}",
        }
        told = [text.format(report[name]) for name, text in words.items() if report[name] is not None]
        return f"{report['strategy']} ({', '.join(told)})" if told else report["strategy"]

    def describe(self, tokenizer: VideoTokenizer) -> dict[str, Any]:
        """For a data set of tokens: in words and as it was told, and the router's fingerprint where it has one to do
        with it."""
        report, lengths, words = self.report(tokenizer), self.options["lengths"], self.label(tokenizer)
        if report["strategy"] == "uniform" and lengths is None:
            candidates = tokenizer.model.config.block_lengths
            lengths = candidates[len(candidates) // 2]
        if lengths is not None:
            told = lengths if isinstance(lengths, int) else ", ".join(map(str, lengths))
            words = f"{report['strategy']} ({told} tokens)"
        uses_router = report["strategy"] in ("router", "budget")
        return {
            "allocation": words,
            **{name: report[name] for name in ("strategy", "quality", "budget_per_clip")},
            "lengths": lengths,
            "router_fingerprint": tokenizer.router.fingerprint() if uses_router else None,
        }

    def _spell(self, name: str) -> str:
        return self._lengths_option if name == "lengths" else f"--{name.replace('_', '-')}"


def parse_lengths(lengths: str | None, uniform: int | None) -> list[int] | int | None:
    """`--lengths` and `--uniform` as numbers, None where neither is given; a single length is for every block."""
    if lengths is None:
        return uniform
    if uniform is not None:
        raise typer.BadParameter("give one of the two, not both", param_hint="--lengths and --uniform")
    try:
        numbers = [int(part) for part in lengths.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"{lengths!r} is no list of whole numbers with commas between, such as 128,32,16,64", param_hint="--lengths"
        ) from error
    return numbers if len(numbers) > 1 else numbers[0]
