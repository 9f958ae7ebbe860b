"""A frame for all handlers of the page: how they fail, when they stop, and what they leave."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils
from gradio.context import LocalContext
from gradio.utils import get_upload_folder

logger = logging.getLogger(__name__)

_PATIENCE = 15.0  # seconds in which a visitor begins to read what a job tells


class Gone(Exception):
    """Nobody waits for the result any more."""


class Visit:
    """A handler's stand-in for `gr.Progress`: it passes on how far the work is, while somebody listens.

    Attributes:
        folder: where it writes its results, which are kept; all else there is not.
    """

    def __init__(self, progress: gr.Progress, folder: Path) -> None:
        self._progress, self.folder = progress, folder
        self._process, self._unread_since = os.getpid(), None

    def __call__(self, done: float, what: str) -> None:
        """Raises `Gone` as `check`."""
        self.check()
        self._progress(done, what)

    def check(self) -> None:
        """Raises `Gone` once the visitor has left, which gradio notes, or has not begun to read; a job that is nobody's
        goes on, and so does one in a process that was lent to it, which hears of nobody."""
        blocks, event_id = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
        event = blocks and blocks._queue.event_ids_to_events.get(event_id)
        if not event or os.getpid() != self._process:
            return
        now, messages = time.monotonic(), blocks._queue.pending_messages_per_session.get(event.session_hash)
        if not messages or messages.empty():
            self._unread_since = None
        elif self._unread_since is None:
            self._unread_since = now
        if not event.alive or (self._unread_since is not None and now - self._unread_since > _PATIENCE):
            raise Gone("nobody waits for the result any more")


def spoken(handler: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A handler whose errors the visitor is told in one line; of one that nobody foresaw, the log has the rest.

    The handler ends where it tells how far it is, once its visitor has left. Files that it gives go to gradio's store.
    """

    @functools.wraps(handler)
    def wrapped(*args: Any) -> tuple[Any, ...]:
        try:
            with tempfile.TemporaryDirectory(prefix="evatok_result_") as made:
                visit = functools.partial(Visit, folder=Path(made))
                results = handler(*(visit(one) if isinstance(one, gr.Progress) else one for one in args))
                return tuple(_stored(one) if isinstance(one, Path) else one for one in results)
        except Gone as error:
            raise gr.Error(str(error), print_exception=False) from error
        except ValueError as error:
            message = " ".join(str(error).split()).rstrip(".") + "."
            raise gr.Error(message, title="This did not work", duration=None, print_exception=False) from error
        except Exception as error:
            logger.exception("a job failed")
            message = f"Something went wrong inside ({type(error).__name__}). Please try again, or with another video."
            raise gr.Error(message, title="This did not work", duration=None, print_exception=False) from error
        finally:
            _give_back()

    return wrapped


def _stored(path: Path) -> str:
    return processing_utils.save_file_to_cache(path, get_upload_folder())


def _give_back() -> None:
    """Gives back the freed memory that the C library holds: with its share for each thread, it would hold ever more."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it, and needs it
        if trim is not None:
            trim(0)
