"""A frame for all handlers of the page: how they fail, when they stop, and what they leave."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from .audience import Gone, Listener

logger = logging.getLogger(__name__)


class Heard:
    """gr.Progress for somebody who listens; raises `Gone` when nobody does."""

    def __init__(self, progress: gr.Progress, listener: Listener) -> None:
        self._progress, self.check = progress, listener

    def __call__(self, done: float, what: str) -> None:
        self.check()
        self._progress(done, what)


def spoken(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors the visitor is told in one line; of one that nobody foresaw, the log has the rest.

    The handler ends where it tells how far it is, once its visitor has left.
    """

    @functools.wraps(handler)
    def wrapped(*args: Any) -> Any:
        request = LocalContext.request.get(None)
        listener = Listener(LocalContext.event_id.get(None), getattr(request, "session_hash", None))
        try:
            return handler(*(Heard(one, listener) if isinstance(one, gr.Progress) else one for one in args))
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


def _give_back() -> None:
    """Gives back the freed memory that the C library holds: with its share for each thread, it would hold ever more."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it, and needs it
        if trim is not None:
            trim(0)
