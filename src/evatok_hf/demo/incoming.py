"""Limits on the size of a request and on its time, checked while it arrives."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradio.route_utils import GradioMultiPartParser
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import Limits
from .store import Store

_WORDS = 10**6  # bytes of a request that is no upload
_AROUND = 10**5  # bytes of an upload besides its file
_SILENCE, _DURATION = 20.0, 900.0  # seconds without a byte, and in all


class IncomingLimits:
    """ASGI middleware: a request that brings too much, or stops on the way, is refused."""

    def __init__(self, app: ASGIApp, limits: Limits, store: Store) -> None:
        self._app, self._limits, self._store = app, limits, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        upload = headers.get("content-type", "").strip().lower().startswith("multipart/")
        most, too_large = _WORDS, f"The request has more than the {_WORDS:,} bytes that are taken."
        if upload:
            most = self._limits.megabytes * 10**6 + _AROUND
            # gradio answers 413 where it finds "maximum allowed size"
            too_large = (
                f"The upload is larger than the maximum allowed size of {self._limits.megabytes} MB: cut the video."
            )
        length = headers.get("content-length", "")
        expected = int(length) if length.isdecimal() else most
        if expected > most:
            # what still comes of it is read and dropped, else the browser would not see the answer
            await PlainTextResponse(too_large, 413)(scope, receive, send)
            return
        if upload:
            await run_in_threadpool(self._store.make_room, expected)

        def refusal(code: int, message: str) -> Exception:
            return MultiPartException(message) if upload else HTTPException(code, message)

        size, whole, until = 0, False, time.monotonic() + _DURATION

        async def receiving() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), min(_SILENCE, max(0.0, until - time.monotonic())))
            except TimeoutError:
                raise refusal(408, "The request came too slowly: try again.") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body")
            if size > most:
                raise refusal(413, too_large)
            return message

        await self._app(scope, receiving, send)


class UploadParser(GradioMultiPartParser):
    """gradio's parser of uploads, which takes one file, and leaves nothing of what it refuses or what is cut."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._whole = False

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if self._current_files > 1:
            raise MultiPartException("Only one file is taken at a time: upload the videos one after the other.")

    def on_end(self) -> None:
        self._whole = True

    async def parse(self) -> FormData:
        try:
            with suppress(ClientDisconnect):
                form = await super().parse()
            if not self._whole:
                raise MultiPartException("The upload stopped on the way: upload the video again.")
            return form
        except BaseException:
            for file in self._files_to_close_on_error:
                file.close()
                Path(file.name).unlink(missing_ok=True)
            raise
