"""`evatok generate`, `classes` and `export-llama`: what the generator of a checkpoint is for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ..models.files_evatok import adding_to, is_special, is_stdout
from .options import JSON, OUTPUT, PLAY, TOKENIZER, Place, Report, argument, option, output
from .sampling import CLASS, PICTURE, SHOWN_SCALE, Drawing, load_pipeline, made_by, sampling, write_enlarged
from .support import check_distinct, hush, open_writer, prepare_outputs, seconds_since, show

if TYPE_CHECKING:
    from ..models.pipeline_evatok import EvatokPipeline
    from ..pictures.samples import Sample

T = TypeVar("T")
_ROWS_IN_SHEET = 32


def generate(
    *,
    class_names: list[str] | None = CLASS("A class; may be given several times.", "--class", "-c"),
    count: int = sampling(4, "Samples of each class.", "--count", "-n", min=1),
    batch_size: int = sampling(16, "Clips drawn at once.", min=1),
    drawing: Drawing,
    place: Place,
    scale: int | None = SHOWN_SCALE,
    picture: Path | None = PICTURE,
    out: Path | None = output(
        None, "The video to write, all samples in a grid; or a folder, for one video each.", "--out", "-o", shown=False
    ),
    fps: float | None = PLAY(shown="the generator's", panel=OUTPUT),
    tokens: Path | None = output(
        None, "Also write the tokens, which `evatok decode` takes.", shown=False, metavar="TOKENS.safetensors"
    ),
    told: Report,
) -> None:
    """Draw videos of a class.

    The same seed gives the same samples, and sample i is the same however many
    are asked for.
    """
    import torch

    from ..pictures.samples import SampleGrid, samples_of

    outputs = {"--out": out, "--picture": picture, "--tokens": tokens}
    if not any(outputs.values()):
        raise typer.BadParameter(f"nothing to write; give {', '.join(outputs)}", param_hint="--out")
    check_distinct(outputs, told.as_json)
    pipe = load_pipeline(place, told.quiet)
    options = drawing.options(pipe)
    folder = out is not None and (out.is_dir() or not out.suffix) and not is_special(out)
    prepare_outputs("", tokens, None if folder else out, picture=picture)
    rate = fps or pipe.fps or 12.0  # our choice where neither says it
    started = time.perf_counter()
    stream = torch.Generator().manual_seed(drawing.seed)
    result = pipe(class_names or None, count, generator=stream, batch_size=batch_size, **options)
    samples = samples_of(result)
    total = sum(sample.tokens for sample in samples)
    several = len({sample.label for sample in samples}) > 1
    title = f"{len(samples)} samples, {total / len(samples):.0f} tokens on average"
    if not several:
        title = f"{samples[0].label}: {title}"
    files, video = [], None if folder else out
    columns = count if several else None  # a row a class, else a square
    grid = video and SampleGrid(samples, max(pipe.tokenizer.config.block_lengths), columns, scale, title)
    with open_writer(video, rate, *(grid.size if grid else (0, 0))) as writer:
        if folder:
            files = [str(path) for path in _write_each(pipe, samples, out, rate, scale or 1)]
        if grid:
            writer.write(grid.frames())
        if tokens is not None:  # before the video is put in place, so that a failure leaves neither
            replace(result.tokens, fps=rate).save(tokens)
        if picture is not None:
            _write_sheet(picture, pipe, samples, title, options, drawing.seed)
    rows = [
        {"class": label, "seed": s.seed, "lengths": s.lengths, "tokens": s.tokens}
        | ({"output": files[i]} if folder else {})
        for i, (s, label) in enumerate(zip(samples, result.labels, strict=True))
    ]
    report = {
        "samples": rows,
        "tokens": total,
        "tokens_per_clip": total / len(samples),
        "frames": result.frames.shape[1],
        "fps": rate,
        **{name: getattr(drawing, name) for name in ("seed", "guidance", "temperature", "top_k", "top_p")},
        **made_by(pipe),
        "output": out and str(out),
        "picture": picture and str(picture),
        "tokens_file": tokens and str(tokens),
        "seconds": seconds_since(started),
    }
    told.show(report if told.as_json else _samples_for_people(report), is_stdout(out) or is_stdout(tokens))


def classes(model: str | None = Place.model, as_json: bool = JSON) -> None:
    """List the classes that `generate` and `predict` can be asked for."""
    from ..models.checkpoint_evatok import load_generator_config
    from ..models.configuration_evatok import class_names

    names = class_names(_of_generator(load_generator_config, model))
    if as_json:
        show({"classes": names, "count": len(names)}, as_json)
    else:
        typer.echo("\n".join(names) if names else "This generator was trained without classes.")


def export_llama(
    told: Report,
    out: Path = argument("The folder to write.", "OUT"),
    model: str | None = Place.model,
    dtype: str = option("bfloat16", "float32 or bfloat16.", panel=TOKENIZER),
) -> None:
    """Write the generator as a plain Llama, for engines that serve one.

    The folder also says which ids are what (vocabulary.json); docs/serving.md
    tells how it is used.
    """
    import torch

    from ..export.llama import VOCABULARY, export_llama, vocabulary
    from ..models.checkpoint_evatok import find_dtype, load_generator

    generator = _of_generator(load_generator, model, torch.device("cpu"), find_dtype(dtype))
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
    told.show(report)


def _of_generator(load: Callable[..., T | None], model: str | None, *how: Any) -> T:
    """The generator of the checkpoint, or a part of it, as `load` gives it. Raises ValueError where it has none."""
    from ..bundled import find_checkpoint

    hush()
    name = find_checkpoint(model, "generator")
    if (found := load(name, *how)) is None:
        raise ValueError(f"{name} has no generator; name a checkpoint with generator/.")
    return found


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
    if options["guidance_scale"] is not None:
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
