"""How lengths are to be chosen, as options say it, before there is a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..allocation.strategies import Allocation
    from .video_tokenizer import VideoTokenizer

# Of a whole data set; the searches would reconstruct every clip hundreds of times.
DATASET_STRATEGIES = ("uniform", "fixed", "router", "budget")


class AllocationChoice:
    """What the options say, checked without a model.

    Args:
        strategy: one of `ALLOCATION_NAMES`, or None to conclude it from the others.
        lengths: tokens of each block, such as "128,32,16,64".
        uniform, quality, budget, budget_per_clip, threshold, metric, bounds: as `VideoTokenizer.allocation`.

    Raises:
        ValueError: an unknown strategy, or options that contradict each other.
    """

    def __init__(
        self,
        strategy: str | None = None,
        lengths: str | None = None,
        uniform: int | None = None,
        quality: float | None = None,
        budget: int | None = None,
        budget_per_clip: int | None = None,
        threshold: float | None = None,
        metric: str | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        from ..allocation.strategies import find_strategy  # with torch, for which a command's help does not wait

        self.lengths_option = "--lengths" if uniform is None else "--uniform"
        self.options: dict[str, Any] = {
            "lengths": parse_lengths(lengths, uniform),
            "quality": quality,
            "budget": budget,
            "budget_per_clip": budget_per_clip,
            "threshold": threshold,
            "metric": metric,
            "bounds": bounds,
        }
        self.strategy = find_strategy(strategy, self.options, self._spell)

    @property
    def searches(self) -> bool:
        """Whether the strategy reconstructs clips, which needs a decoder."""
        from ..allocation.strategies import SEARCHES

        return self.strategy in SEARCHES

    def allocation(self, tokenizer: VideoTokenizer, quiet: bool) -> Allocation:
        """The allocation of that model.

        Raises:
            ValueError: values out of range, lengths that it does not have, or a router or metric that is needed and not
                there.
        """
        progress = not quiet and sys.stderr.isatty()
        return tokenizer.allocation(self.strategy, **self.options, progress=progress)

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
        return self.lengths_option if name == "lengths" else f"--{name.replace('_', '-')}"


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
