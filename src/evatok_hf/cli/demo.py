"""`evatok demo`: the web app."""

from __future__ import annotations

import importlib.util
import json
from typing import Annotated

import typer

from .support import DeviceOption, JsonOption, ModelOption, hush

_SERVER = "Server"
HostOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Address to listen at; 0.0.0.0 for other machines, too.",
        show_default="GRADIO_SERVER_NAME, else 127.0.0.1",
        rich_help_panel=_SERVER,
    ),
]
PortOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Port to listen at; 0 for any that is free.",
        show_default="GRADIO_SERVER_PORT, else the first free one from 7860",
        rich_help_panel=_SERVER,
    ),
]


def demo(
    model: ModelOption = None,
    device: DeviceOption = "auto",
    host: HostOption = None,
    port: PortOption = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also answer to this name, as in demo.example.org, and to pages under it; may be repeated.",
            show_default="this machine's for itself, and --host",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    share: Annotated[
        bool,
        typer.Option("--share", help="Also open a public address through gradio's service.", rich_help_panel=_SERVER),
    ] = False,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open it in the browser.", rich_help_panel=_SERVER)
    ] = False,
    as_json: JsonOption = False,
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
