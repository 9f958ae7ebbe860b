"""`evatok tokenize-dataset`: a data set of tokens of very many videos."""

from __future__ import annotations

import importlib
import shlex
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..allocation import DATASET_STRATEGIES
from .allocation import DatasetChoice, choose
from .options import Batches, Place, Report, argument, option, output
from .support import seconds_since

if TYPE_CHECKING:
    from ..bulk.engine import Progress

# Seconds between lines of a log, where there is no terminal to show a bar on.
_EVERY = 60
_view, _worker = (partial(option, panel=panel) for panel in ("Clips", "Workers"))


@dataclass
class Views:
    """The clips of each video."""

    clips_per_video: int = _view(4, "Views of a video.", min=1)
    strides: str = _view("1", "Frame strides to draw from, such as 1,2,4.")
    scale: tuple[float, float] = _view((1.0, 1.0), "Side of the square crop over the short side.", metavar="LOW HIGH")
    random_position: bool = _view(False, "Crop anywhere rather than at the centre.", "--random-position")
    flip_probability: float = _view(0.5, "How often a view is mirrored.", min=0, max=1)
    evenly_spaced: bool = _view(False, "Start evenly spaced over the video rather than anywhere.", "--evenly-spaced")


@dataclass
class Work:
    """Options that are fields of `BulkOptions`, under the same names."""

    known_frames: int | None = option(
        None,
        "Also make the condition of frame prediction: so many frames, the last one held.",
        shown=False,
        panel="Tokens",
        min=1,
    )
    split: str = _view("train", "Split of the source.")
    whole_video: bool = _view(
        False, "All clips of a video one after another, as `evatok encode`, rather than views.", "--whole-video"
    )
    views: str = _view("random", "random, or fixed: the centre, not mirrored, evenly spaced, with the first stride.")
    seed: int = _view(0, "Of the views.", min=0)
    device: str = _worker("auto", "auto (GPUs where Ray has some), cpu, cuda or mps.")
    workers: int | None = _worker(
        None,
        "Processes of Ray that encode.",
        shown="one a GPU, or one for every --threads CPUs; for a few clips none",
        min=1,
    )
    threads: int = _worker(1, "Threads of a worker on CPUs.", min=1)
    batch_size: int = _worker(32, "Clips encoded at once.", "--batch-size", "--batch-clips", min=1)
    address: str | None = _worker(
        None,
        "A Ray cluster; auto finds the one of this machine.",
        shown="RAY_ADDRESS, else Ray is started here",
        metavar="HOST:PORT",
    )
    shard_size: int = output(1024, "Clips of a shard.", min=1)
    resume: bool = output(True, "Go on in an OUTPUT that holds tokens; else refuse it.")
    licence: str = output("other", "Licence of the data set (Hub id).")
    sources_note: str = output("", "Where the videos come from and their licences, for the card.", shown=False)


def tokenize_dataset(
    choice: DatasetChoice,
    work: Work,
    views: Views,
    told: Report,
    source: str = argument(
        "A folder of videos, a glob or folder of WebDataset .tar files, or a data set of the Hub.", "SOURCE"
    ),
    output: Path = argument("The folder of the data set of tokens.", "OUTPUT"),
    model: str | None = Place.model,
) -> None:
    """Turn very many videos into a data set of tokens, on all cores or GPUs.

    A few clips are made in this process, more by Ray: on this machine, or on a
    cluster with --address. What Ray says goes to OUTPUT.ray.log. A run that was
    stopped goes on where it was when the same command is given again. Videos
    that cannot be read are left out and named in OUTPUT/skipped.jsonl.
    """
    if work.views not in ("random", "fixed"):
        raise typer.BadParameter(f"{work.views!r} is neither random nor fixed", param_hint="--views")
    allocation = choose(choice, known=DATASET_STRATEGIES)
    try:
        steps = tuple(map(int, views.strides.split(",")))
    except ValueError as error:
        message = f"{views.strides!r} is no list of whole numbers with commas between, such as 1,2,4"
        raise typer.BadParameter(message, param_hint="--strides") from error
    if work.whole_video and len(steps) > 1:
        raise typer.BadParameter("whole videos have one stride", param_hint="--strides")
    _check_installed()
    from ..bulk.engine import BulkOptions, tokenize_source
    from ..data.clip_cutting import ClipConfig
    from ..hub.data_cards import check_licence

    check_licence(work.licence)
    cut = vars(views) | {"strides": steps, "random_start": not views.evenly_spaced}
    del cut["evenly_spaced"]
    options = BulkOptions(clips=ClipConfig(**cut), **vars(work))
    started = time.perf_counter()
    command = shlex.join(["evatok", *sys.argv[1:]])
    with _Bar(told.as_json or told.quiet) as bar:
        try:
            tokenizer = partial(Batches(model, "cpu", "float32", None).load, decoder=False)
            summary = tokenize_source(source, output, tokenizer, allocation, options, command, bar.show, bar.say)
        except ValueError as error:
            raise ValueError(f"{error}{bar.where()}") from error
        except (SystemExit, KeyboardInterrupt):
            bar.say(f"What is done is kept; repeat the command to go on.{bar.where()}")
            raise
    names = ("clips", "videos", "tokens", "mean_tokens", "skipped", "allocation", "tokenizer", "tokenizer_fingerprint")
    report: dict[str, Any] = {name: summary[name] for name in names}
    if not told.as_json:
        report["skipped"] = ", ".join(f"{count} {cause}" for cause, count in summary["skipped"].items()) or None
    seconds = seconds_since(started)
    report |= {"new_clips": bar.made, "clips_per_second": round(bar.made / seconds, 2), "output": str(output)}
    told.show(report | {"seconds": seconds, "ray_log": bar.log and str(bar.log)})


def _check_installed() -> None:
    for name in ("datasets", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f'bulk tokenizing needs the extra "bulk", and {name} is not there; install it: '
                'pip install "evatok_hf[bulk]"'
            ) from error


class _Bar(AbstractContextManager):
    """Clips so far: a bar on a terminal, else a line now and then, so that the log of a long run says how far it is."""

    def __init__(self, quiet: bool) -> None:
        from tqdm import tqdm

        self._quiet, self._lines = quiet, not sys.stderr.isatty()
        self._bar = tqdm(unit="clip", leave=False, file=sys.stderr, disable=quiet or self._lines)
        self._first: int | None = None
        self._started = self._said = time.monotonic()
        self.made, self.log = 0, None

    def where(self) -> str:
        """A sentence that says where the log of Ray is; "" where it has not been used."""
        return f" What Ray said is in {self.log}" if self.log else ""

    def say(self, word: str) -> None:
        """A line above the bar."""
        self._bar.write(word, file=sys.stderr)

    def show(self, progress: Progress) -> None:
        self.log = progress.log
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

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
