"""`evatok demo`: the web app."""

from __future__ import annotations

import importlib.util
import json
from functools import partial

import typer

from .options import JSON, Place, option
from .support import hush

_server = partial(option, panel="Server")


def demo(
    model: str | None = Place.model,
    device: str = Place.device,
    host: str | None = _server(
        None,
        "Address to listen at; 0.0.0.0 for other machines, too.",
        shown="GRADIO_SERVER_NAME, else 127.0.0.1",
        metavar="NAME",
    ),
    port: int | None = _server(
        None,
        "Port to listen at; 0 for any that is free.",
        shown="GRADIO_SERVER_PORT, else the first free one from 7860",
        min=0,
        max=65535,
    ),
    allow_host: list[str] | None = _server(
        None,
        "Also answer to this name, as in demo.example.org, and to pages under it; may be repeated.",
        shown="this machine's for itself, and --host",
        metavar="NAME",
    ),
    share: bool = _server(False, "Also open a public address through gradio's service.", "--share"),
    open_browser: bool = _server(False, "Open it in the browser.", "--open/--no-open"),
    as_json: bool = JSON,
) -> None:
    """Serve a web app: reconstruct, generate, continue.

    It runs until it is stopped (Ctrl-C). What visitors upload is checked
    before it is decoded, is decoded in a process of its own, and is deleted
    within the hour.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('the demo needs gradio; pip install "evatok_hf[demo]".')
    from ..demo import launch

    def ready(url: str, public: str | None) -> None:
        if as_json:
            typer.echo(json.dumps({"url": url, "public_url": public}))
        else:
            typer.echo(f"The demo is at {url}" + (f" and {public}" if public else "") + "; Ctrl-C stops it.")

    hush()
    launch(model, device, host, port, share, open_browser, ready, allow_hosts=allow_host or ())
