"""Shared parts of all commands of `evatok`: failures as one line, outputs, reports."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
import typer.core

from ..interrupts import end_unread, exit_code, let_go_of_stdout
from ..models.files_evatok import follow, is_special, is_stdout, prepare
from ..video.source_files import printable

if TYPE_CHECKING:
    from rich.table import Table

    from ..models.tokens_evatok import VideoTokens

# Newer versions of typer bring their own click, so its classes are reached through typer's public ones.
_ClickException = typer.BadParameter.__base__.__base__


# --- failures ---------------------------------------------------------------------------------------------------------


class Group(typer.core.TyperGroup):
    """Turns every failure into one line and an exit code, for the console script and for tests alike."""

    debug = False

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> NoReturn:
        if isinstance(sys.stdout, io.TextIOWrapper):  # for what a terminal has no letters for, as on stderr
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, standalone_mode=False, **kwargs) or 0
            if sys.stdout is not None:
                sys.stdout.flush()
            sys.exit(code)
        except SystemExit as done:
            if isinstance(done.__context__, BrokenPipeError):  # typer's answer to it
                end_unread()
            raise
        except BrokenPipeError:
            end_unread()
        except _ClickException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "evatok"
            _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", error.exit_code)
        except typer.Abort:
            _fail("aborted")
        except ValueError as error:
            _fail(str(error))
        except OSError as error:
            name = "" if error.filename is None else f"{error.filename}: "
            _fail(f"{name}{error.strerror or error}; check its name, its permissions and the disk")
        except Exception as error:
            _fail(f"unexpected {type(error).__name__}: {error}; `evatok --debug ..` shows where it comes from")


def _fail(message: str, code: int = 1) -> NoReturn:
    if exit_code() is not None:  # it failed because it was stopped
        sys.exit(exit_code())
    if Group.debug:
        traceback.print_exc()
    let_go_of_stdout()
    typer.echo(f"Error: {printable(' '.join(message.split()))}", err=True)
    sys.exit(code)


@contextmanager
def wrong_usage(option: str | None = None) -> Iterator[None]:
    """Makes a ValueError of wrong usage, of an option if it is named."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def set_debug(context: typer.Context, debug: bool) -> None:
    """Errors with tracebacks and a talkative log, or one line an error and silence, for this run."""
    Group.debug = debug
    logger = logging.getLogger("evatok_hf")
    before = logger.level
    context.call_on_close(lambda: logger.setLevel(before))
    logger.setLevel(logging.INFO if debug else logging.ERROR)
    if debug:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
        return
    # Where torchao is installed, it and those who import it tell of kernels for other machines, on import.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(name).setLevel(logging.ERROR)


# --- inputs and outputs -----------------------------------------------------------------------------------------------


def hush() -> None:
    """Keeps the libraries from talking, unless --debug asks for it."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    if not Group.debug:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        hub_logging.set_verbosity_error()


def check_distinct(outputs: dict[str, Path | None], as_json: bool = False) -> None:
    """Refuses outputs that are the same file, and two on standard output, where the JSON object goes."""
    seen: dict[Path | int, str] = {}
    for option, path in (outputs | ({"--json": Path("-")} if as_json else {})).items():
        if path is not None:
            before = seen.setdefault(follow(path), option)
            if before != option:
                what = "both go to standard output" if is_stdout(path) else "name the same file"
                raise typer.BadParameter(what, param_hint=f"{before} and {option}")


def prepare_outputs(source: str | Path, *outputs: Path | None, picture: Path | None = None) -> None:
    """Makes the folders of outputs, and finds out now whether all of them can be written."""
    if picture is not None:
        from ..pictures.clips import check_picture_path

        check_picture_path(picture)
    for path in filter(None, (picture, *outputs)):
        if not is_special(path) and path.exists() and Path(source).exists() and path.samefile(source):
            raise ValueError(f"{path} is the input itself; choose another name for the output.")
        prepare(path)


def open_writer(path: Path | None, fps: float, height: int, width: int) -> Any:
    """An open `VideoWriter`, which finds out now whether such a video can be written; nothing for no path."""
    from ..video.read import VideoWriter

    return nullcontext() if path is None else VideoWriter(path, fps, height, width)


# --- reports ----------------------------------------------------------------------------------------------------------


def seconds_since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def by_clip(tokens: VideoTokens) -> list[dict[str, Any]]:
    return [{"lengths": row, "tokens": sum(row)} for row in tokens.lengths.tolist()]


def summarize(tokens: VideoTokens) -> dict[str, Any]:
    return {
        "tokens": tokens.ids.numel(),
        "frames": tokens.num_frames,
        "overlap": tokens.overlap,
        "fps": tokens.fps,
        "height": tokens.height,
        "width": tokens.width,
        "clips": by_clip(tokens),
        "checkpoint": tokens.checkpoint,
        "fingerprint": tokens.fingerprint,
    }


def show(report: dict[str, Any], as_json: bool, quiet: bool = False, aside: bool = False) -> None:
    """One JSON object (null for an infinite PSNR, which JSON cannot say), or a table for people.

    `aside`: on stderr, where stdout has an output of the command.
    """
    if as_json:
        typer.echo(json.dumps(_finite(report), allow_nan=False))
    elif not quiet:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
        for key, value in report.items():
            if value is not None and key not in ("config", "kind"):
                table.add_row(*_readable(key, value))
        print_table(table, aside)


def print_table(table: Table, aside: bool = False) -> None:
    """Prints a table as wide as it is: a path folded into its column could be neither copied nor searched for."""
    from rich.console import Console

    console = Console(width=10_000, markup=False, highlight=False)
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        typer.echo(printable(line.rstrip()), err=aside)


def decibels(psnr: float) -> str:
    return "infinite" if math.isinf(psnr) else f"{psnr:.2f} dB"


def _readable(key: str, value: Any) -> tuple[str, str]:
    if key == "clips":
        return key, f"{value if isinstance(value, int) else len(value):,}"
    if key == "router":
        about = "every quality" if value["quality"] is None else f"quality {value['quality']}"
        return key, f"{value['parameters']:,} parameters, for {about}, {value['fingerprint']}"
    if key == "generator":
        about = f"{value['classes']} classes" if value["classes"] else "no classes"
        return key, f"{value['parameters']:,} parameters, {about}, {value['fingerprint']}"
    key = key.replace("_", " ")
    if key == "perceptual":
        return value["name"], f"{value['distance']:.4f}"
    if key == "codec":
        theirs, ours = (f"{decibels(value[key + 'psnr'])}, {value[key + 'bits']:,.0f} bits" for key in ("", "tokens_"))
        return value["name"], f"{theirs} a clip of the picture (tokens {ours})"
    if key == "psnr":
        return "PSNR", decibels(value)
    if isinstance(value, float):
        return key, f"{value:.5g}" if key == "fps" else f"{value:.2f}"
    return key, f"{value:,}" if isinstance(value, int) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, str | os.PathLike):
        return printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
