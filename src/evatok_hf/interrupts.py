"""Signals that end a command: it tidies up, says one word, and exits with 128 and the number of the signal."""

from __future__ import annotations

import atexit
import os
import signal
from types import FrameType

from .output_evatok import remove_unfinished

_WORDS = {"SIGINT": "Interrupted", "SIGTERM": "Terminated", "SIGHUP": "Hangup"}

_first: int | None = None  # the signal that came


class Stopped(SystemExit):
    """What a signal raises in the main thread; its `code` is the exit code."""


def stop_on_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread, wherever that is.

    So `finally` and context managers tidy up. The same signal again does not wait for them: outputs under way are
    removed, and the process ends at once. A signal that is ignored, as under nohup, stays so. To be called in the main
    thread; again after a library that puts handlers of its own in their place.
    """
    for name in _WORDS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def exit_code() -> int | None:
    """The exit code that a signal asked for, None if none has come."""
    return None if _first is None else 128 + _first


def _stop(number: int, frame: FrameType | None) -> None:
    global _first
    if _first is None:
        _first = number
        atexit.register(_say)
        raise Stopped(128 + number)
    if number == _first:
        remove_unfinished()
        _say()
        os._exit(128 + number)


def _say() -> None:
    try:
        os.write(2, (_WORDS[signal.Signals(_first).name] + "\n").encode())
    except OSError:
        pass  # the terminal is gone
