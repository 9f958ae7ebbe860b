"""The end of commands: a signal lets them tidy up and say one word; where nobody reads them, they stop without one."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

_WORDS = {"SIGINT": "Interrupted", "SIGTERM": "Terminated", "SIGHUP": "Hangup"}

_first: int | None = None  # the signal that came


class Stopped(SystemExit):
    """The exception that a signal raises in the main thread; its `code` is the exit code."""


def stop_on_signals() -> None:
    """Makes SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread from now on, wherever that is.

    So `finally` and context managers tidy up. The same signal again does not wait for them: outputs under way are
    removed, and the process ends at once. A signal that is ignored, as under nohup, stays so. To be called in the main
    thread; again after a library that puts handlers of its own in their place.
    """
    for name in _WORDS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def run_script(main: Callable[[], object]) -> None:
    """Runs a script's `main`: a ValueError is logged as one line, with exit code 1; signals end it as a command.

    A number that it returns is the exit code.
    """
    before = {name: signal.getsignal(getattr(signal, name)) for name in _WORDS if hasattr(signal, name)}
    stop_on_signals()
    try:
        code = main()
        let_go_of_stdout()
    except BrokenPipeError:
        end_unread()
    except Exception as error:
        if exit_code() is not None:  # it failed because it was stopped
            sys.exit(exit_code())
        if not isinstance(error, ValueError):
            raise
        logging.getLogger(main.__module__).error("%s", " ".join(str(error).split()))
        sys.exit(1)
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
    if isinstance(code, int) and code:
        sys.exit(code)


def end_unread() -> NoReturn:
    """The exit of a command whose reader has gone: no word, and the code of one that SIGPIPE ended."""
    let_go_of_stdout()
    sys.exit(141)


def let_go_of_stdout() -> None:
    """Writes out stdout, or drops what it does not take, which Python would complain about once more at the end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        # what writes files is imported later than this, and may be only half
        files = sys.modules.get(f"{__package__}.models.files_evatok")
        getattr(files, "remove_unfinished", int)()
        _say()
        os._exit(128 + number)


def _say() -> None:
    try:
        os.write(2, (_WORDS[signal.Signals(_first).name] + "\n").encode())
    except OSError:
        pass  # the terminal is gone
