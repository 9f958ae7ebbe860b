"""The names that the app answers to, and the sites whose pages may ask it.

A browser sends the name in the address as Host and the site of the page that asks as Origin. A page elsewhere can make
a name of its own point to this machine (DNS rebinding), and then reads whatever answers; it cannot make the browser
send another Host than that name.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Hosts:
    """Names that are answered: this machine's own, those of the Space (SPACE_HOST), and those that are added."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = {"localhost"}
        for name in filter(None, os.environ.get("SPACE_HOST", "").split(",")):
            self.add(name.strip())
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Raises `ValueError` for what is no name of a machine, such as a whole address."""
        host = f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name
        known = _name(host)
        if known is None or host.rpartition("]")[2].count(":"):
            raise ValueError(
                f"{name!r} is no name of a machine: give it without http:// and port, as in demo.example.org."
            )
        self._names.add(known)

    def know(self, name: str | None) -> bool:
        """True for a name on the list, or one of the machine for itself."""
        if name is None:
            return False
        address = _address(name)
        return name in self._names or (address is not None and address.is_loopback)


class HostGuard:
    """ASGI middleware: requests by other names, or for pages of other sites, are answered 403 with the reason."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            refusal = self._refusal(scope)
            if refusal is not None:
                await PlainTextResponse(refusal, 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        sent = {name: [value.decode("latin-1") for key, value in scope["headers"] if key == name] for name in _NAMES}
        hosts = {_name(host) for host in sent[b"host"]} or {None}
        for name in hosts:
            # an address at which the connection arrived is no name that anyone could point elsewhere
            reached = _address(name) is not None and _address(name) == _address((scope.get("server") or ("",))[0])
            if not (self._hosts.know(name) or reached):
                return _refused("the name", name, "a request without a name that can be read")
        for origin in sent[b"origin"]:
            parts = origin.partition("://")
            name = _name(parts[2]) if parts[0] in ("http", "https") else None
            if not (self._hosts.know(name) or (name is not None and name in hosts)):
                return _refused("pages of", name, "pages that do not say where they are from")
        return None


_NAMES = (b"host", b"origin")


def _name(authority: str) -> str | None:
    """The name in `name` or `name:port`, in lower case; None where there is none."""
    try:
        parts = urlsplit(f"//{authority}")
        parts.port  # noqa: B018 - raises for what is no number
    except ValueError:
        return None
    if parts.netloc != authority or "@" in authority or not parts.hostname:
        return None
    return parts.hostname.rstrip(".") or None


def _address(name: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name or "")
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _refused(what: str, name: str | None, nameless: str) -> str:
    if name is None:
        return f"This demo does not answer {nameless}: open it at its own address.\n"
    shown = "".join(sign for sign in name if sign.isprintable())[:100]
    mend = f"open it at its own address, or start it with --allow-host {shown}"
    return f"This demo does not answer {what} {shown}: {mend}.\n"
