"""The command `evatok`: a file a command. Nothing imports it but what starts it."""

from ..interrupts import stop_on_signals


def main() -> None:
    """Entry point of the console script. Signals are heard from here on, while the commands are still imported."""
    stop_on_signals()
    from .commands import app

    app(prog_name="evatok")
