"""Options of the commands: how one is declared, and the groups of them that several commands have.

A command takes groups as arguments, and `opened` makes options of their fields, so that each option is declared once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from .support import hush, show

if TYPE_CHECKING:
    from ..tokenize.video_tokenizer import VideoTokenizer

TOKENIZER, OUTPUT = "Tokenizer", "Output"


def option(default: Any, help: str, *names: str, shown: str | bool = True, panel: str | None = None, **how: Any) -> Any:
    """An option, as the default of a field; `shown` is what help says of the default, `panel` where it stands there."""
    return typer.Option(default, *names, help=help, show_default=shown, rich_help_panel=panel, **how)


def argument(help: str, metavar: str, default: Any = ..., shown: str | bool = False) -> Any:
    """A positional argument as the default of a parameter."""
    return typer.Argument(default, metavar=metavar, help=help, show_default=shown)


def opened(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it: every field of its groups is an option of its own."""
    own = inspect.signature(command, eval_str=True).parameters
    kinds = {name: parameter.annotation for name, parameter in own.items() if is_dataclass(parameter.annotation)}
    groups = {name: inspect.signature(kind, eval_str=True).parameters for name, kind in kinds.items()}
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name in own
        for parameter in groups.get(name, {name: own[name]}).values()
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = {name: kind(**{field: values.pop(field) for field in groups[name]}) for name, kind in kinds.items()}
        command(**values, **made)

    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


VIDEO = argument("A video file.", "VIDEO")
_tokenizer, output = partial(option, panel=TOKENIZER), partial(option, panel=OUTPUT)
JSON = output(False, "Print one JSON object on stdout, nothing else.", "--json")
SCALE = partial(output, None, "Show frames so many times larger.", min=1, max=64)
PLAY = partial(option, None, "Play at this rate.", min=0.01, max=1000)
BLEND = output(
    "fade",
    "How clips meet: fade or cut, where they overlap, or carry, which also lets what stands still pass over.",
    metavar="NAME",
)


@dataclass
class Place:
    """The checkpoint and where it runs."""

    model: str | None = _tokenizer(None, "Folder, Hub id or bundled name.", shown="the bundled one")
    device: str = _tokenizer("auto", "auto, cpu, cuda, cuda:1 .. or mps.")
    dtype: str = _tokenizer("float32", "float32 or bfloat16.")


@dataclass
class Batches(Place):
    """A checkpoint that works on several clips together."""

    batch_clips: int | None = _tokenizer(
        None, "Clips worked on together.", shown="1 on a CPU, exactly; 16 on a GPU", min=1
    )

    def load(self, decoder: bool = True) -> VideoTokenizer:
        from ..tokenize.video_tokenizer import VideoTokenizer

        hush()
        return VideoTokenizer.from_pretrained(
            self.model, self.device, self.dtype, decoder=decoder, batch_clips=self.batch_clips
        )


@dataclass
class Clips:
    """The clips of a video that a command looks at; `vars` of it are arguments of `VideoTokenizer`."""

    fps: float | None = option(None, "Resample to this rate first.", shown="the video's own", min=0.01, max=1000)
    max_clips: int | None = option(None, "Stop after so many clips.", shown="the whole video", min=1)


@dataclass
class EncodedClips(Clips):
    """The clips of a video that are encoded."""

    overlap: int = option(0, "Frames that each clip has in common with the one before; costs tokens.", min=0)
    refinement_steps: int = option(
        0,
        "Search so many steps for better ids at the same number of tokens; 10 are good and some 50 times as slow.",
        "--refine",
        metavar="STEPS",
        min=0,
    )


@dataclass
class Report:
    """The way in which a command says what it did."""

    as_json: bool = JSON
    quiet: bool = output(False, "No progress bar and no table.", "--quiet", "-q")

    def show(self, report: dict[str, Any], aside: bool = False) -> None:
        """See `support.show`."""
        show(report, self.as_json, self.quiet, aside)
