"""The web app: `evatok demo` on a machine of your own, and the Space in `spaces/evatok`.

`app.py` lays out the page from `controls.py`, `jobs.py` holds the models and runs them, `uploads.py` reads what
visitors upload through a process of its own (`reader_process.py`) within `limits.py`, `results.py` makes what is
shown. What is between the visitors and the page is ASGI middleware: `hosts.py`, `incoming.py`, `masks.py`.

gradio is imported only by `launch` and `build`.
"""

from __future__ import annotations

import os
import socket
from typing import Any


def launch(
    model: str | None = None,
    device: str = "auto",
    host: str | None = None,
    port: int | None = None,
    *more: Any,
    **options: Any,
) -> None:
    """Serves the app until it is stopped; see `app.launch`. A port that is taken is refused before the long imports."""
    if port is not None:
        port = _free_port(host, port)

    from .app import launch

    launch(model, device, host, port, *more, **options)


def _free_port(host: str | None, port: int) -> int:
    """The port itself if it is free, or any that is for 0.

    Raises:
        ValueError: one that cannot be listened at.
    """
    host = host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    try:
        with socket.create_server((host, port)) as probe:
            return probe.getsockname()[1]
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise ValueError(f"cannot listen at {host}:{port} ({cause}); choose another --host or --port.") from error
