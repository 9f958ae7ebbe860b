"""A mask for the folder in which files lie on the server: visitors read another name in its place."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SHOWN = "/evatok-demo"
_TEXT = ("text/html", "text/plain", "text/event-stream", "application/json")


class FolderMask:
    """ASGI middleware: a folder has another name in pages and answers, and its own again in what comes back.

    Whether a file may be read is for the app to decide, as it is where the folder's own name is sent.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app, self._folder = app, str(folder)
        # as in JSON, and as in the address of a file
        self._hidden = {json.dumps(self._folder)[1:-1].encode(), quote(self._folder).encode()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        before, equals, after = scope["path"].partition(f"/file={_SHOWN}/")
        if equals:
            scope = scope | {"path": f"{before}/file={self._folder}/{after}"}
        if dict(scope["headers"]).get(b"content-type", b"").startswith(b"application/json"):
            receive = self._unmasked(receive)
        await self._app(scope, receive, self._masked(send))

    def _unmasked(self, receive: Receive) -> Receive:
        """A body in one piece, with the folder's own name."""
        own, whole = json.dumps(self._folder)[1:-1].encode() + b"/", False

        async def receiving() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            body = b""
            while not whole:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                body += message.get("body", b"")
                whole = not message.get("more_body")
            return {"type": "http.request", "body": body.replace(f"{_SHOWN}/".encode(), own), "more_body": False}

        return receiving

    def _masked(self, send: Send) -> Send:
        """Texts without the folder's own name; every part that is sent holds whole words."""
        start: Message | None = None  # held back until it is known how long the text becomes
        text = False

        async def sending(message: Message) -> None:
            nonlocal start, text
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                text = headers.get("content-type", "").startswith(_TEXT)
                if text and "content-length" in headers:
                    start = message
                    return
            elif text:
                body = message.get("body", b"")
                for name in self._hidden:
                    body = body.replace(name, _SHOWN.encode())
                message = message | {"body": body}
                if start is not None:
                    headers = MutableHeaders(scope=start)
                    del headers["content-length"]
                    if not message.get("more_body"):
                        headers["content-length"] = str(len(body))
                    await send(start)
                    start = None
            await send(message)

        return sending
