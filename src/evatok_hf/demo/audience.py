"""The visitors who still listen: a job whose visitor has left gives its place up.

A page listens for the results of its session, a program for those of one call; whoever asks begins to listen at once.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_STREAM = re.compile(r"/gradio_api/(?:queue/data|call/(?:v2/)?[^/]+/(?P<call>[^/]+))/?$")
_PATIENCE = 15.0  # seconds in which someone who asked has to begin to listen
_RETURN = 3.0  # the same for someone who left before, and may have come back for this job
_REMEMBERED = 10_000

_open: Counter[str] = Counter()  # streams of results, by session or call
_left: dict[str, float] = {}  # who went away without a result, and when; the oldest are forgotten


class Gone(Exception):
    """Nobody waits for the result any more."""


class Listener:
    """A visitor who waits for a job that begins now, known by the names of the session and of the call.

    Raises:
        Gone: when it is called, and nobody listens any more.
    """

    def __init__(self, *names: str | None) -> None:
        self._names = [name for name in names if name]
        self._started, self._process = time.monotonic(), os.getpid()

    def __call__(self) -> None:
        # a process that was lent to the job hears of nobody, and a job without names is a program's own
        if os.getpid() != self._process or not self._names or any(name in _open for name in self._names):
            return
        left = max(_left.get(name, 0.0) for name in self._names)
        patience = 0.0 if left > self._started else _RETURN if left else _PATIENCE
        if time.monotonic() - self._started > patience:
            raise Gone("nobody waits for the result any more")


class AudienceCount:
    """ASGI middleware that takes note of who listens."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _STREAM.search(scope["path"]) if scope["type"] == "http" and scope["method"] == "GET" else None
        names = [found["call"]] if found and found["call"] else []
        if found and not names:
            names = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])[:1]
        if not names:
            await self._app(scope, receive, send)
            return
        (name,) = names
        complete = cut = False

        async def receiving() -> Message:
            nonlocal cut
            message = await receive()
            cut = cut or (message["type"] == "http.disconnect" and not complete)
            return message

        async def sending(message: Message) -> None:
            nonlocal complete
            complete = complete or (message["type"] == "http.response.body" and not message.get("more_body"))
            await send(message)

        _open[name] += 1
        _left.pop(name, None)
        try:
            await self._app(scope, receiving, sending)
        finally:
            _open[name] -= 1
            if not _open[name]:
                del _open[name]
                if cut or not complete:
                    _left[name] = time.monotonic()
                    if len(_left) > _REMEMBERED:
                        del _left[next(iter(_left))]
