"""The address at which the app listens."""

from __future__ import annotations

import os
import socket


def free_port(host: str | None, port: int) -> int:
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
