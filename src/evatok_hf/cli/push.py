"""`evatok push`: a checkpoint or a data set to the Hub."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .options import Report, argument, option
from .support import hush, seconds_since, wrong_usage


def push(
    told: Report,
    folder: str = argument(
        "Of a checkpoint, of its tokenizer, router or generator, or of a data set; or a bundled name.", "FOLDER"
    ),
    repository: str = argument("The repository; made if need be.", "USER/NAME"),
    private: bool = option(False, "Make it private, where it is new.", "--private"),
    revision: str | None = option(None, "The branch; made if need be.", shown="main", metavar="BRANCH"),
    message: str | None = option(None, "Of the commit.", shown="says what it is"),
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
    from ..hub.commit import check_repo_id
    from ..hub.dataset import dataset_kind, push_dataset
    from ..hub.push import push_checkpoint

    with wrong_usage("USER/NAME"):
        check_repo_id(repository)
    name = find_checkpoint(None if folder == "bundled" and not Path(folder).exists() else folder)
    send = push_checkpoint if dataset_kind(name) is None else push_dataset

    hush()
    started = time.perf_counter()
    silent = told.as_json or told.quiet or not sys.stderr.isatty()
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
        "parts": done.parts if told.as_json else ", ".join(done.parts),
        "files": done.files if told.as_json else len(done.files),
        "bytes": done.bytes,
        "left_out": done.left_out if told.as_json else _few(done.left_out),
        "seconds": seconds_since(started),
    }
    told.show(report)


def _few(names: list[str]) -> str | None:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or None
