"""Shared parts of `evatok generate` and `evatok predict`: options of sampling, loading, outputs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .support import OUTPUT, check_distinct, hush, option

if TYPE_CHECKING:
    import numpy as np

    from ..models.pipeline_evatok import EvatokPipeline

# Where neither the user nor the generator says at what rate to play (our choice).
DEFAULT_FPS = 12.0

SAMPLING = "Sampling"


_sampling = partial(option, panel=SAMPLING)

ClassesOption = _sampling(
    list[str] | None, "A class; may be given several times.", "--class", "-c", default="no class", metavar="NAME"
)
ClassOption = _sampling(str | None, "Its class.", "--class", "-c", default="no class", metavar="NAME")
SeedOption = _sampling(int, "Of everything that is drawn.", min=0)
GuidanceOption = _sampling(
    float | None, "Classifier-free guidance.", default="1.25 with a class, else 1", min=0, max=100
)
PredictionGuidanceOption = _sampling(float, "Classifier-free guidance.", min=0, max=100)
TemperatureOption = _sampling(float, "0 takes the most likely token every time.", min=0, max=100)
TopKOption = _sampling(int | None, "Only draw from the k most likely tokens.", default="all", min=0)
TopPOption = _sampling(float, "Only draw from the fewest tokens with this probability together.", min=0, max=1)
LengthsOption = _sampling(
    str | None, "Tokens of each block, such as 64,0,16,0; 0 is the model's own.", default="its own"
)
BudgetOption = _sampling(int | None, "At most so many tokens a clip.", default="none", min=1)
BatchOption = _sampling(int, "Clips drawn at once.", min=1)
CompileOption = _sampling(
    bool | None,
    "Compile the drawing first: a minute that many clips on a GPU are worth.",
    "--compile/--no-compile",
    default="as it pays",
)
ScaleOption = option(
    int | None, "Show frames so many times larger.", default="by their size", panel=OUTPUT, min=1, max=64
)
PictureOption = option(Path | None, "Also write a picture.", default=False, panel=OUTPUT)


def load_pipeline(model: str | None, device: str, dtype: str, quiet: bool) -> EvatokPipeline:
    hush()
    try:
        from diffusers.utils import logging as diffusers_logging
    except ModuleNotFoundError as error:
        raise ValueError(f"this command needs {error.name}; pip install diffusers.") from error
    from ..models.checkpoint_evatok import resolve_device
    from ..models.pipeline_evatok import EvatokPipeline

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    where = resolve_device(device)
    pipe = EvatokPipeline.from_pretrained(model, dtype=dtype).to(where)
    pipe.require_generator()
    pipe.set_progress_bar_config(disable=True if quiet else None, leave=False, file=sys.stderr, desc="tokens", unit="%")
    return pipe


def sampling_options(
    pipe: EvatokPipeline,
    guidance: float | None,
    temperature: float,
    top_k: int | None,
    top_p: float,
    lengths: str | None,
    budget: int | None,
    compiled: bool | None,
) -> dict[str, Any]:
    """Sampling options; lengths or a budget that the generator does not have are wrong usage."""
    from ..allocation.strategies import parse_lengths
    from ..models.modeling_evatok_generator import BlockGrammar

    try:
        numbers = parse_lengths(lengths, None)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=None) from error
    if isinstance(numbers, int):
        numbers = [numbers] * pipe.generator.config.num_blocks
    try:
        BlockGrammar(pipe.generator.config, 1, numbers, budget)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--budget" if lengths is None else "--lengths") from error
    if top_p == 0:
        raise typer.BadParameter("must be above 0", param_hint="--top-p")
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "lengths": numbers, "budget": budget}
    if compiled is not None:
        options["implementation"] = "compiled" if compiled else "static"
    return options if guidance is None else options | {"guidance_scale": guidance}


def check_outputs(outputs: dict[str, Path | None], as_json: bool, required: bool = True) -> None:
    if required and not any(outputs.values()):
        raise typer.BadParameter(f"nothing to write; give {', '.join(outputs)}", param_hint="--out")
    check_distinct(outputs | {"--json": Path("-") if as_json else None})


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
        writer.write(frames if scale == 1 else enlarge(frames, height * scale, width * scale))
