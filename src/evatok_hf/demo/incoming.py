"""Limits on the size of a request and on its time, checked while it arrives."""

from __future__ import annotations

import asyncio
import re
import time

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import Limits
from .store import Store

_WORDS = 10**6  # bytes of a request that is no upload
_AROUND = 10**5  # bytes of an upload besides its file
_BOUNDARY = re.compile(rb'boundary=(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)
_SILENCE, _DURATION = 20.0, 900.0  # seconds without a byte, and in all


class IncomingLimits:
    """ASGI middleware: a request that brings too much, or stops on the way, is refused and leaves nothing behind."""

    def __init__(self, app: ASGIApp, limits: Limits, store: Store) -> None:
        self._app, self._limits, self._store = app, limits, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"")
        if kind.strip().lower().startswith(b"multipart/"):
            body: _Body = _Upload(receive, kind, self._limits)
        else:
            body = _Body(receive)
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > body.most:
            # what still comes of it is read and dropped, else the browser would not see the answer
            await PlainTextResponse(body.too_large, 413)(scope, receive, send)
            return
        if isinstance(body, _Upload):
            await run_in_threadpool(self._store.make_room, int(length) if length.isdigit() else body.most)
        await self._app(scope, body, send)


class _Body:
    """`receive` of a request with few bytes."""

    most = _WORDS
    too_large = f"The request has more than the {_WORDS:,} bytes that are taken."

    def __init__(self, receive: Receive) -> None:
        self._receive, self._size, self._whole = receive, 0, False
        self._until = time.monotonic() + _DURATION

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            patience = min(_SILENCE, max(0.0, self._until - time.monotonic()))
            message = await asyncio.wait_for(self._receive(), patience)
        except TimeoutError:
            raise self._refusal(408, "The request came too slowly: try again.") from None
        if message["type"] == "http.request":
            body = message.get("body", b"")
            self._size += len(body)
            if self._size > self.most:
                raise self._refusal(413, self.too_large)
            self._look(body)
            if not message.get("more_body"):
                self._whole = True
                self._end()
        else:
            self._whole = True
            self._cut()
        return message

    def _refusal(self, code: int, message: str) -> Exception:
        return HTTPException(code, message)

    def _look(self, body: bytes) -> None:
        """At bytes as they come."""

    def _end(self) -> None:
        """Once all have come."""

    def _cut(self) -> None:
        """Once no more will come."""


class _Upload(_Body):
    """`receive` of an upload.

    gradio's parser writes files as they come, and removes them where the upload itself is at fault, but not where its
    end is missing. So all that can go wrong is told to it as such a fault.
    """

    def __init__(self, receive: Receive, kind: bytes, limits: Limits) -> None:
        super().__init__(receive)
        self.most = limits.megabytes * 10**6 * limits.files + _AROUND
        # gradio answers 413 where it finds "maximum allowed size"
        self.too_large = f"The upload is larger than the maximum allowed size of {limits.megabytes} MB: cut the video."
        self._files, self._seen, self._tail = limits.files, 0, b""
        found = _BOUNDARY.search(kind)
        self._mark = b"--" + (found[1] or found[2]) if found else None  # without one, the parser refuses it

    def _refusal(self, code: int, message: str) -> Exception:
        return MultiPartException(message)

    def _look(self, body: bytes) -> None:
        if self._mark is None:
            return
        before = self._tail.count(self._mark)
        data = self._tail + body
        self._seen += data.count(self._mark) - before
        self._tail = data[-len(self._mark) - 8 :]
        if self._seen > self._files + 1:  # one before each file, one after the last
            files = "one file is" if self._files == 1 else f"{self._files} files are"
            raise self._refusal(400, f"Only {files} taken at a time: upload the videos one after the other.")

    def _end(self) -> None:
        if self._mark is not None and self._mark + b"--" not in self._tail:
            self._cut()

    def _cut(self) -> None:
        raise self._refusal(400, "The upload stopped on the way: upload the video again.")
