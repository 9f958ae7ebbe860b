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

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def answered_names(names: Iterable[str] = ()) -> set[str]:
    """Names that are answered: this machine's own, those of the Space (SPACE_HOST), and these.

    Raises:
        ValueError: for what is no name of a machine, such as a whole address.
    """
    found = {"localhost"}
    of_space = (name.strip() for name in os.environ.get("SPACE_HOST", "").split(",") if name)
    for name in [*of_space, *names]:
        host = f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name
        known = _name(host)
        if known is None or ":" in host.rpartition("]")[2]:
            raise ValueError(
                f"{name!r} is no name of a machine: give it without http:// and port, as in demo.example.org."
            )
        found.add(known)
    return found


class HostGuard:
    """ASGI middleware: requests by other names, or for pages of other sites, are answered 403 with the reason."""

    def __init__(self, app: ASGIApp, names: set[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await PlainTextResponse(refusal, 403)(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        # an address at which the connection arrived is no name that anyone could point elsewhere
        here = _address((scope.get("server") or ("",))[0])
        hosts = {_name(host) for host in headers.getlist("host")} or {None}
        for name in hosts:
            if not self._knows(name) and (here is None or _address(name) != here):
                return _refused("the name", name, "a request without a name that can be read")
        for origin in headers.getlist("origin"):
            scheme, _, site = origin.partition("://")
            name = _name(site) if scheme in ("http", "https") else None
            if not self._knows(name) and (name is None or name not in hosts):
                return _refused("pages of", name, "pages that do not say where they are from")
        return None

    def _knows(self, name: str | None) -> bool:
        """True for a name on the list, or one of the machine for itself."""
        address = _address(name)
        return name in self._names or (address is not None and address.is_loopback)


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
