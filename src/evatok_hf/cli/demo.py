"""`evatok demo`: the web app."""

from __future__ import annotations

import importlib.util
import json
from functools import partial

import typer

from .support import DeviceOption, JsonOption, ModelOption, hush, option

_server = partial(option, panel="Server")
HostOption = _server(
    str | None,
    "Address to listen at; 0.0.0.0 for other machines, too.",
    default="GRADIO_SERVER_NAME, else 127.0.0.1",
    metavar="NAME",
)
PortOption = _server(
    int | None,
    "Port to listen at; 0 for any that is free.",
    default="GRADIO_SERVER_PORT, else the first free one from 7860",
    min=0,
    max=65535,
)
AllowHostOption = _server(
    list[str] | None,
    "Also answer to this name, as in demo.example.org, and to pages under it; may be repeated.",
    default="this machine's for itself, and --host",
    metavar="NAME",
)
ShareOption = _server(bool, "Also open a public address through gradio's service.", "--share")
OpenOption = _server(bool, "Open it in the browser.", "--open/--no-open")


def demo(
    model: ModelOption = None,
    device: DeviceOption = "auto",
    host: HostOption = None,
    port: PortOption = None,
    allow_host: AllowHostOption = None,
    share: ShareOption = False,
    open_browser: OpenOption = False,
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
