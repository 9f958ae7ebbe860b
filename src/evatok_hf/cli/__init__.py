"""The command `evatok`: a file a command. Nothing imports it but what starts it."""

import atexit
import gc

from ..interrupts import stop_on_signals


def main() -> None:
    """Entry point of the console script. Signals are heard from here on, while the commands are still imported."""
    stop_on_signals()
    atexit.register(gc.freeze)  # a second less at the end, which would go to a search for garbage among the libraries
    from .commands import app

    app(prog_name="evatok")
