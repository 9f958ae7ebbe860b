"""Connections that say nothing are closed after a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakKeyDictionary

import gradio as gr

_PATIENCE, _EVERY = 20.0, 2.0  # seconds


@asynccontextmanager
async def closing_silent_connections(app: gr.routes.App) -> AsyncIterator[None]:
    """Lifespan of the server, during which nobody may take longer than `_PATIENCE` to make a request.

    uvicorn waits for ever for the first request, and for the end of one that has begun. How fast its body has to come
    is for `IncomingLimits`, which can answer.
    """
    task = asyncio.create_task(_close(app))
    try:
        yield
    finally:
        task.cancel()


async def _close(app: gr.routes.App) -> None:
    seen: WeakKeyDictionary[Any, tuple[Any, float]] = WeakKeyDictionary()  # connection -> its last request, since when
    while True:
        await asyncio.sleep(_EVERY)
        server = getattr(app.get_blocks(), "server", None)  # is there once the app is launched
        now = time.monotonic()
        for connection in list(server.server_state.connections) if server is not None else ():
            request = connection.cycle
            last, since = seen.setdefault(connection, (request, now))
            if last is not request or (request is not None and not request.response_complete):
                seen[connection] = (request, now)
            elif now - since > _PATIENCE:
                connection.transport.close()
