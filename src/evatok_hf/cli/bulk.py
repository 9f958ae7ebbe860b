"""`evatok tokenize-dataset`: a data set of tokens of very many videos."""

from __future__ import annotations

import importlib
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..allocation import DATASET_STRATEGIES
from .allocation import BudgetPerClipOption, LengthsOption, QualityOption, UniformOption, choose
from .support import OUTPUT, JsonOption, ModelOption, QuietOption, load, seconds_since, show

if TYPE_CHECKING:
    from ..bulk.engine import Progress

_VIEWS, _WORK = "Clips", "Workers"
# Seconds between lines of a log, where there is no terminal to show a bar on.
_EVERY = 60


def tokenize_dataset(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of videos, a glob or folder of WebDataset .tar files, or a data set of the Hub.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The folder of the data set of tokens.", show_default=False)
    ],
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(DATASET_STRATEGIES[:-1])} or {DATASET_STRATEGIES[-1]}.",
            show_default="what the other options mean, else router, without one uniform",
            rich_help_panel="Tokens",
        ),
    ] = None,
    quality: QualityOption = None,
    budget_per_clip: BudgetPerClipOption = None,
    lengths: LengthsOption = None,
    uniform: UniformOption = None,
    known_frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also make the condition of frame prediction: so many frames, the last one held.",
            show_default=False,
            rich_help_panel="Tokens",
        ),
    ] = None,
    model: ModelOption = None,
    split: Annotated[str, typer.Option(help="Split of the source.", rich_help_panel=_VIEWS)] = "train",
    whole_video: Annotated[
        bool,
        typer.Option(
            "--whole-video",
            help="All clips of a video one after another, as `evatok encode`, rather than views.",
            rich_help_panel=_VIEWS,
        ),
    ] = False,
    views: Annotated[
        str,
        typer.Option(
            help="random, or fixed: the centre, not mirrored, evenly spaced, with the first stride.",
            rich_help_panel=_VIEWS,
        ),
    ] = "random",
    clips_per_video: Annotated[int, typer.Option(min=1, help="Views of a video.", rich_help_panel=_VIEWS)] = 4,
    strides: Annotated[
        str, typer.Option(help="Frame strides to draw from, such as 1,2,4.", rich_help_panel=_VIEWS)
    ] = "1",
    scale: Annotated[
        tuple[float, float],
        typer.Option(metavar="LOW HIGH", help="Side of the square crop over the short side.", rich_help_panel=_VIEWS),
    ] = (1.0, 1.0),
    random_position: Annotated[
        bool,
        typer.Option("--random-position", help="Crop anywhere rather than at the centre.", rich_help_panel=_VIEWS),
    ] = False,
    flip_probability: Annotated[
        float, typer.Option(min=0, max=1, help="How often a view is mirrored.", rich_help_panel=_VIEWS)
    ] = 0.5,
    evenly_spaced: Annotated[
        bool,
        typer.Option(
            "--evenly-spaced", help="Start evenly spaced over the video rather than anywhere.", rich_help_panel=_VIEWS
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the views.", rich_help_panel=_VIEWS)] = 0,
    device: Annotated[
        str, typer.Option(help="auto (GPUs where Ray has some), cpu, cuda or mps.", rich_help_panel=_WORK)
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes of Ray that encode.",
            show_default="one a GPU, or one for every --threads CPUs; for a few clips none",
            rich_help_panel=_WORK,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a worker on CPUs.", rich_help_panel=_WORK)] = 1,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", "--batch-clips", min=1, help="Clips encoded at once.", rich_help_panel=_WORK),
    ] = 32,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A Ray cluster; auto finds the one of this machine.",
            show_default="RAY_ADDRESS, else Ray is started here",
            rich_help_panel=_WORK,
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Clips of a shard.", rich_help_panel=OUTPUT)] = 1024,
    resume: Annotated[
        bool, typer.Option(help="Go on in an OUTPUT that holds tokens; else refuse it.", rich_help_panel=OUTPUT)
    ] = True,
    licence: Annotated[str, typer.Option(help="Licence of the data set (Hub id).", rich_help_panel=OUTPUT)] = "other",
    sources_note: Annotated[
        str,
        typer.Option(
            help="Where the videos come from and their licences, for the card.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn very many videos into a data set of tokens, on all cores or GPUs.

    A few clips are made in this process, more by Ray: on this machine, or on a
    cluster with --address. What Ray says goes to OUTPUT.ray.log. A run that was
    stopped goes on where it was when the same command is given again. Videos
    that cannot be read are left out and named in OUTPUT/skipped.jsonl.
    """
    if views not in ("random", "fixed"):
        raise typer.BadParameter(f"{views!r} is neither random nor fixed", param_hint="--views")
    told = {"quality": quality, "budget_per_clip": budget_per_clip}
    allocation = choose(strategy, lengths, uniform, known=DATASET_STRATEGIES, **told)
    steps = _numbers(strides)
    if whole_video and len(steps) > 1:
        raise typer.BadParameter("whole videos have one stride", param_hint="--strides")
    _check_installed()
    from ..bulk.engine import BulkOptions, tokenize_source
    from ..data.clip_cutting import ClipConfig
    from ..hub.data_cards import check_licence

    check_licence(licence)

    clips = ClipConfig(
        strides=steps,
        scale=scale,
        random_position=random_position,
        flip_probability=flip_probability,
        random_start=not evenly_spaced,
        clips_per_video=clips_per_video,
    )
    options = BulkOptions(
        split=split,
        views=views,
        whole_video=whole_video,
        clips=clips,
        seed=seed,
        known_frames=known_frames,
        batch_size=batch_size,
        shard_size=shard_size,
        device=device,
        workers=workers,
        threads=threads,
        address=address,
        resume=resume,
        licence=licence,
        sources_note=sources_note,
    )
    started = time.perf_counter()
    command = shlex.join(["evatok", *sys.argv[1:]])
    with _Bar(as_json or quiet) as bar:
        try:
            tokenizer = partial(load, model, "cpu", "float32", decoder=False)
            summary = tokenize_source(source, output, tokenizer, allocation, options, command, bar.show, bar.say)
        except ValueError as error:
            raise ValueError(f"{error} {bar.log}" if bar.log else str(error)) from error
        except (SystemExit, KeyboardInterrupt):
            bar.say(f"What is done is kept; repeat the command to go on. {bar.log}".rstrip())
            raise
    names = ("clips", "videos", "tokens", "mean_tokens", "skipped", "allocation", "tokenizer", "tokenizer_fingerprint")
    report: dict[str, Any] = {name: summary[name] for name in names}
    if not as_json:
        report["skipped"] = ", ".join(f"{count} {cause}" for cause, count in summary["skipped"].items()) or None
    seconds = seconds_since(started)
    made = bar.made
    report |= {"new_clips": made, "clips_per_second": round(made / seconds, 2), "output": str(output)}
    show(report | {"seconds": seconds, "ray_log": bar.progress.log and str(bar.progress.log)}, as_json, quiet)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no list of whole numbers with commas between, such as 1,2,4", param_hint="--strides"
        ) from error


def _check_installed() -> None:
    for name in ("datasets", "jinja2", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f'bulk tokenizing needs the extra "bulk", and {name} is not there; install it: '
                'pip install "evatok_hf[bulk]"'
            ) from error


class _Bar:
    """Clips so far: a bar on a terminal, else a line now and then, so that the log of a long run says how far it is."""

    def __init__(self, quiet: bool) -> None:
        from tqdm import tqdm

        self._quiet, self._lines = quiet, not sys.stderr.isatty()
        self._bar = tqdm(unit="clip", leave=False, file=sys.stderr, disable=quiet or self._lines)
        self._first: int | None = None
        self._started = self._said = time.monotonic()
        self.progress: Progress | None = None
        self.made = 0

    @property
    def log(self) -> str:
        """Where what Ray said is, in words; "" where it has not been used."""
        log = self.progress and self.progress.log
        return f"What Ray said is in {log}" if log else ""

    def say(self, word: str) -> None:
        """A line above the bar."""
        self._bar.write(word, file=sys.stderr)

    def show(self, progress: Progress) -> None:
        self.progress = progress
        if self._first is None:
            self._first = self._bar.initial = self._bar.n = progress.clips
        self.made, self._bar.total = progress.clips - self._first, progress.expected
        self._bar.set_postfix(skipped=progress.skipped, refresh=False)
        self._bar.update(progress.clips - self._bar.n)
        now = time.monotonic()
        if self._lines and not self._quiet and now - self._said > _EVERY:
            self._said = now
            rate = self.made / (now - self._started)
            typer.echo(f"{progress.clips:,} clips, {rate:.1f} a second, {progress.skipped:,} videos skipped", err=True)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
