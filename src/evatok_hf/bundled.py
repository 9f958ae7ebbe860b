"""Where the checkpoint is that comes with the package."""

from __future__ import annotations

from pathlib import Path


def default_checkpoint() -> str:
    """Folder of the checkpoint `evatok-tiny` that comes with the package: `tokenizer/`, and `router/` and
    `generator/` if it has them."""
    return str(Path(__file__).parent / "checkpoints" / "evatok-tiny")
