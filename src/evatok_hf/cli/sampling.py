"""Shared parts of `evatok generate` and `evatok predict`: options of sampling, loading, outputs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from .options import SCALE, Place, option, output
from .support import hush, wrong_usage

if TYPE_CHECKING:
    import numpy as np

    from ..models.pipeline_evatok import EvatokPipeline

sampling = partial(option, panel="Sampling")
CLASS = partial(sampling, None, shown="no class", metavar="NAME")
SHOWN_SCALE = SCALE(shown="by their size")
PICTURE = output(None, "Also write a picture.", shown=False)


@dataclass
class Drawing:
    """Options of drawing ids."""

    seed: int = sampling(0, "Of everything that is drawn.", min=0)
    guidance: float | None = sampling(
        None, "Classifier-free guidance.", shown="1.25 with a class, else 1", min=0, max=100
    )
    temperature: float = sampling(1.0, "0 takes the most likely token every time.", min=0, max=100)
    top_k: int | None = sampling(None, "Only draw from the k most likely tokens.", shown="all", min=0)
    top_p: float = sampling(1.0, "Only draw from the fewest tokens with this probability together.", min=0, max=1)
    lengths: str | None = sampling(
        None, "Tokens of each block, such as 64,0,16,0; 0 is the model's own.", shown="its own"
    )
    budget: int | None = sampling(None, "At most so many tokens a clip.", shown="none", min=1)
    compiled: bool | None = sampling(
        None,
        "Compile the drawing first: a minute that many clips on a GPU are worth.",
        "--compile/--no-compile",
        shown="as it pays",
    )

    def options(self, pipe: EvatokPipeline) -> dict[str, Any]:
        """Options of the pipeline; lengths or a budget that its generator does not have are wrong usage."""
        from ..allocation.strategies import parse_lengths
        from ..models.modeling_evatok_generator import BlockGrammar

        with wrong_usage():
            lengths = parse_lengths(self.lengths, None)
        if isinstance(lengths, int):
            lengths = [lengths] * pipe.generator.config.num_blocks
        with wrong_usage("--budget" if lengths is None else "--lengths"):
            BlockGrammar(pipe.generator.config, 1, lengths, self.budget)
        if self.top_p == 0:
            raise typer.BadParameter("must be above 0", param_hint="--top-p")
        options = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "budget")}
        options |= {"lengths": lengths, "guidance_scale": self.guidance}
        if self.compiled is not None:
            options["implementation"] = "compiled" if self.compiled else "static"
        return options


def load_pipeline(place: Place, quiet: bool) -> EvatokPipeline:
    hush()
    from diffusers.utils import logging as diffusers_logging

    from ..models.checkpoint_evatok import resolve_device
    from ..models.pipeline_evatok import EvatokPipeline

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    where = resolve_device(place.device)
    pipe = EvatokPipeline.from_pretrained(place.model, dtype=place.dtype).to(where)
    pipe.require_generator()
    pipe.set_progress_bar_config(disable=True if quiet else None, leave=False, file=sys.stderr, desc="tokens", unit="%")
    return pipe


def made_by(pipe: EvatokPipeline) -> dict[str, Any]:
    return {
        "checkpoint": pipe.name,
        "fingerprint": pipe.tokenizer.fingerprint(),
        "generator_fingerprint": pipe.generator.fingerprint(),
    }


def write_enlarged(writer: Any, frames: np.ndarray, scale: int) -> None:
    if writer is not None and len(frames):
        from ..pictures.clips import enlarge

        height, width = frames.shape[1:3]
        writer.write(enlarge(frames, height * scale, width * scale))
