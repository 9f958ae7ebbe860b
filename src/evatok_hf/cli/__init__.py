"""The command `evatok`: a file a command. Nothing imports it but what starts it."""

from .commands import app, main

__all__ = ["app", "main"]
