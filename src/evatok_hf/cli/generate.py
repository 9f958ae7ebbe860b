"""`evatok generate`, `classes` and `export-llama`: what the generator of a checkpoint is for."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.files_evatok import adding_to, is_special, is_stdout
from .sampling import (
    DEFAULT_FPS,
    SAMPLING,
    BatchOption,
    BudgetOption,
    ClassesOption,
    CompileOption,
    GuidanceOption,
    LengthsOption,
    PictureOption,
    ScaleOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    check_outputs,
    load_pipeline,
    made_by,
    sampling_options,
    write_enlarged,
)
from .support import (
    OUTPUT,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    QuietOption,
    hush,
    open_writer,
    option,
    prepare_outputs,
    seconds_since,
    show,
)

if TYPE_CHECKING:
    from ..models.pipeline_evatok import EvatokPipeline, EvatokPipelineOutput
    from ..pictures.samples import Sample, SampleGrid

_ROWS_IN_SHEET = 32

OutOption = option(
    Path | None,
    "The video to write, all samples in a grid; or a folder, for one video each.",
    "--out",
    "-o",
    default=False,
    panel=OUTPUT,
)
TokensOption = option(
    Path | None,
    "Also write the tokens, which `evatok decode` takes.",
    default=False,
    panel=OUTPUT,
    metavar="TOKENS.safetensors",
)
PlayOption = option(float | None, "Play at this rate.", default="the generator's", panel=OUTPUT, min=0.01, max=1000)


def generate(
    class_names: ClassesOption = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Samples of each class.", rich_help_panel=SAMPLING)
    ] = 4,
    seed: SeedOption = 0,
    guidance: GuidanceOption = None,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = None,
    top_p: TopPOption = 1.0,
    lengths: LengthsOption = None,
    budget: BudgetOption = None,
    batch_size: BatchOption = 16,
    compiled: CompileOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: OutOption = None,
    fps: PlayOption = None,
    scale: ScaleOption = None,
    picture: PictureOption = None,
    tokens: TokensOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw videos of a class.

    The same seed gives the same samples, and sample i is the same however many
    are asked for.
    """
    import torch

    check_outputs({"--out": out, "--picture": picture, "--tokens": tokens}, as_json)
    pipe = load_pipeline(model, device, dtype, quiet)
    options = sampling_options(pipe, guidance, temperature, top_k, top_p, lengths, budget, compiled)
    folder = out is not None and (out.is_dir() or not out.suffix) and not is_special(out)
    prepare_outputs("", picture, tokens, None if folder else out)
    rate = fps or pipe.fps or DEFAULT_FPS
    started = time.perf_counter()
    stream = torch.Generator().manual_seed(seed)
    result = pipe(class_names or None, count, generator=stream, batch_size=batch_size, **options)
    samples = _samples(result)
    title = f"{len(samples)} samples, {sum(s.tokens for s in samples) / len(samples):.0f} tokens on average"
    if len({sample.label for sample in samples}) == 1:
        title = f"{samples[0].label}: {title}"
    written, video = [], None if folder else out
    grid = video and _grid(pipe, samples, scale, count, title)
    with open_writer(video, rate, *(grid.size if grid else (0, 0))) as writer:
        if folder:
            written = [str(path) for path in _write_each(pipe, samples, out, rate, scale or 1)]
        if grid:
            writer.write(grid.frames())
        if tokens is not None:  # before the video is put in place, so that a failure leaves neither
            replace(result.tokens, fps=rate).save(tokens)
        if picture is not None:
            _write_sheet(picture, pipe, samples, title, options, seed)
    rows = [
        {"class": label, "seed": s.seed, "lengths": s.lengths, "tokens": s.tokens}
        | ({"output": written[i]} if folder else {})
        for i, (s, label) in enumerate(zip(samples, result.labels, strict=True))
    ]
    report = {
        "samples": rows,
        "tokens": sum(s.tokens for s in samples),
        "tokens_per_clip": sum(s.tokens for s in samples) / len(samples),
        "frames": result.frames.shape[1],
        "fps": rate,
        "seed": seed,
        "guidance": options.get("guidance_scale"),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        **made_by(pipe),
        "output": out and str(out),
        "picture": picture and str(picture),
        "tokens_file": tokens and str(tokens),
        "seconds": seconds_since(started),
    }
    show(report if as_json else _samples_for_people(report), as_json, quiet, aside=is_stdout(out) or is_stdout(tokens))


def classes(model: ModelOption = None, as_json: JsonOption = False) -> None:
    """List the classes that `generate` and `predict` can be asked for."""
    from ..bundled import find_checkpoint
    from ..models.checkpoint_evatok import load_generator_config
    from ..models.configuration_evatok import class_names

    hush()
    name = find_checkpoint(model, "generator")
    config = load_generator_config(name)
    if config is None:
        raise ValueError(f"{name} has no generator; name a checkpoint with generator/.")
    names = class_names(config)
    if as_json:
        show({"classes": names, "count": len(names)}, as_json)
    else:
        typer.echo("\n".join(names) if names else "This generator was trained without classes.")


def export_llama(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    model: ModelOption = None,
    dtype: DtypeOption = "bfloat16",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the generator as a plain Llama, for engines that serve one.

    The folder also says which ids are what (vocabulary.json); docs/serving.md
    tells how it is used.
    """
    import torch

    from ..bundled import find_checkpoint
    from ..export.llama import VOCABULARY, export_llama, vocabulary
    from ..models.checkpoint_evatok import find_dtype, load_generator

    hush()
    name = find_checkpoint(model, "generator")
    generator = load_generator(name, torch.device("cpu"), find_dtype(dtype))
    if generator is None:
        raise ValueError(f"{name} has no generator; name a checkpoint with generator/.")
    export_llama(generator, out)
    words = vocabulary(generator.config)
    report = {
        "output": str(out),
        "parameters": sum(p.numel() for p in generator.parameters()),
        "vocabulary": words["vocab_size"],
        "classes": len(words["class_ids"]),
        "layout": words["layout"],
        "dtype": dtype,
        "ids": str(out / VOCABULARY),
    }
    show(report, as_json, quiet)


# --- inside -----------------------------------------------------------------------------------------------------------


def _samples(result: EvatokPipelineOutput) -> list[Sample]:
    from ..models.pipeline_evatok import to_uint8
    from ..pictures.samples import Sample

    rows = zip(result.frames, result.tokens.lengths.tolist(), result.labels, result.seeds, strict=True)
    return [
        Sample(to_uint8(frames), lengths, "no class" if label is None else str(label), seed)
        for frames, lengths, label, seed in rows
    ]


def _grid(pipe: EvatokPipeline, samples: list[Sample], scale: int | None, columns: int, title: str) -> SampleGrid:
    """All samples in one video: a row a class where there are several, else a square."""
    from ..pictures.samples import SampleGrid

    if len({sample.label for sample in samples}) == 1:
        columns = math.ceil(math.sqrt(len(samples)))
    scale = scale or max(1, round(192 / pipe.tokenizer.config.image_size))
    return SampleGrid(samples, max(pipe.tokenizer.config.block_lengths), columns, scale, title)


def _write_each(pipe: EvatokPipeline, samples: list[Sample], folder: Path, fps: float, scale: int) -> list[Path]:
    """One video a sample, all of them or none."""
    numbers: dict[str, int] = {}
    side = pipe.tokenizer.config.image_size * scale
    paths = []
    with adding_to(folder) as partial:
        for sample in samples:
            number = numbers[sample.label] = numbers.get(sample.label, -1) + 1
            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in sample.label)
            paths.append(folder / f"{name}-{number:03d}.mp4")
            with open_writer(partial / paths[-1].name, fps, side, side) as writer:
                write_enlarged(writer, sample.frames, scale)
    return paths


def _write_sheet(
    path: Path, pipe: EvatokPipeline, samples: list[Sample], title: str, options: dict[str, Any], seed: int
) -> None:
    from ..pictures.clips import save_picture
    from ..pictures.samples import contact_sheet

    told = [f"seed {seed}", f"temperature {options['temperature']:g}"]
    if "guidance_scale" in options:
        told.append(f"guidance {options['guidance_scale']:g}")
    subtitle = f"{', '.join(told)}; checkpoint {pipe.name}"
    if len(samples) > _ROWS_IN_SHEET:
        subtitle += f"; the first {_ROWS_IN_SHEET} shown"
    most = max(pipe.tokenizer.config.block_lengths)
    save_picture(contact_sheet(samples[:_ROWS_IN_SHEET], most, title, subtitle), path)


def _samples_for_people(report: dict[str, Any]) -> dict[str, Any]:
    rows = {
        f"{row['class'] or 'sample'} {number + 1}": f"{row['tokens']} tokens: {' '.join(map(str, row['lengths']))}"
        for number, row in enumerate(report["samples"][:_ROWS_IN_SHEET])
    }
    return rows | {key: value for key, value in report.items() if key != "samples" and "fingerprint" not in key}
