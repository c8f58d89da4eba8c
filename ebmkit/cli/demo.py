"""``ebmkit demo``."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Annotated

from typer import Option

from ebmkit.errors import UserError
from ebmkit.terminal import console


def demo(
    run: Path,
    *,
    guide: Path | None = None,
    host: str = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535)] = 7860,
    weights: str = "last",
    device: str = "auto",
) -> None:
    """Show a model in the browser: classify, denoise, attack, sample.

    Serves a page on this machine only, until Ctrl-C; nothing is sent to other machines. Needs the
    extra demo.

    Example:
        ebmkit demo runs/digits --port 8000

    Args:
        guide: run folder of a classifier that guides the samples [default: the model's own labels]
        host: address to serve; 0.0.0.0 shows the page to the whole network
        port: port of the page
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            "ebmkit demo needs gradio: in a clone of the repository, uv sync --extra demo"
        )
    _check_free(host, port)
    from ebmkit.compute import pick_device
    from ebmkit.demo.page import build, serve
    from ebmkit.guidance import check_guide
    from ebmkit.models import load
    from ebmkit.pretrained import name_of

    place = str(pick_device(device))
    model = load(run, device=place, weights=weights)
    other = None if guide is None else check_guide(load(guide, device=place))
    address, wait = serve(build(model, name_of(run), other), host, port)
    console.say(f"{address} shows {name_of(run)}; Ctrl-C ends it")
    wait()


def _check_free(host: str, port: int) -> None:
    """Raise a `UserError` if this process cannot serve ``port`` of ``host``."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(
            f"cannot serve port {port} of {host!r} ({error.strerror or error}): give another one, "
            "by --port or --host"
        ) from None
