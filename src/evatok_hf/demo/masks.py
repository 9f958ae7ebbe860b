"""A mask for the folder in which files lie on the server: visitors read another name in its place."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SHOWN = "/evatok-demo"
_TEXT = ("text/html", "text/plain", "text/event-stream", "application/json")


class FolderMask:
    """ASGI middleware: a folder has another name in pages and answers, and its own again in what comes back.

    Whether a file may be read is for the app to decide, as it is where the folder's own name is sent.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app, self._folder = app, str(folder)
        self._in_json = json.dumps(self._folder)[1:-1].encode()
        self._in_addresses = quote(self._folder).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].replace(f"/file={_SHOWN}/", f"/file={self._folder}/", 1)
        if Headers(scope=scope).get("content-type", "").startswith("application/json"):
            receive = self._unmasked(receive)
        await self._app(scope | {"path": path}, receive, self._masked(send))

    def _unmasked(self, receive: Receive) -> Receive:
        """A body in one piece, with the folder's own name."""
        body, whole = b"", False

        async def receiving() -> Message:
            nonlocal body, whole
            while not whole:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                body += message.get("body", b"")
                whole = not message.get("more_body")
                if whole:
                    own = body.replace(f"{_SHOWN}/".encode(), self._in_json + b"/")
                    return {"type": "http.request", "body": own, "more_body": False}
            return await receive()

        return receiving

    def _masked(self, send: Send) -> Send:
        """Texts without the folder's own name; every part that is sent holds whole words."""
        text = False

        async def sending(message: Message) -> None:
            nonlocal text
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                text = headers.get("content-type", "").startswith(_TEXT)
                if text:
                    del headers["content-length"]  # another name is not as long
            elif text:
                body = message.get("body", b"")
                for name in (self._in_json, self._in_addresses):
                    body = body.replace(name, _SHOWN.encode())
                message = message | {"body": body}
            await send(message)

        return sending
