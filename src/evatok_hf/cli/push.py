"""`evatok push`: a checkpoint or a data set to the Hub."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from .support import JsonOption, QuietOption, hush, seconds_since, show


def push(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Of a checkpoint, of its tokenizer, router or generator, or of a data set; or a bundled name.",
            show_default=False,
        ),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="The repository; made if need be.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Make it private, where it is new.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="The branch; made if need be.", show_default="main", metavar="BRANCH")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default="says what it is")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Put a checkpoint on the Hub, where it loads with or without this package, or a data set.

    Weights as safetensors, configurations, cards and code go there in one
    commit; so do the files of a data set of training/tokenize_dataset.py,
    curate.py or make_vizdoom_dataset.py, with its card. The token is that of
    `hf auth login`, or HF_TOKEN. A push that was interrupted can be repeated;
    what has arrived is not sent again.
    """
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    from ..bundled import find_checkpoint
    from ..hub.commit import REPO_ID
    from ..hub.dataset import dataset_kind, push_dataset
    from ..hub.push import push_checkpoint

    if not REPO_ID.fullmatch(repository):
        raise typer.BadParameter("a repository is written owner/name", param_hint="USER/NAME")
    name = find_checkpoint(None if folder == "bundled" and not Path(folder).exists() else folder)
    send = push_checkpoint if dataset_kind(name) is None else push_dataset

    hush()
    started = time.perf_counter()
    silent = as_json or quiet or not sys.stderr.isatty()
    if silent:
        disable_progress_bars()
    try:
        done = send(name, repository, private, revision=revision, message=message)
    finally:
        if silent:
            enable_progress_bars()
    report = {
        "repository": done.repo_id,
        "url": done.url,
        "commit": done.commit,
        "parts": done.parts if as_json else ", ".join(done.parts),
        "files": done.files if as_json else len(done.files),
        "bytes": done.bytes,
        "left_out": done.left_out if as_json else _few(done.left_out),
        "seconds": seconds_since(started),
    }
    show(report, as_json, quiet)


def _few(names: list[str]) -> str | None:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or None
