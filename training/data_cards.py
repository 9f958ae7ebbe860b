"""What the cards of data sets share."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import DatasetCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parents[1] / "model_cards"


def render_template(name: str, **facts: object) -> str:
    """A template of `model_cards/` with these facts, none missing; its front matter parses."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    text = environment.get_template(name).render(**facts)
    DatasetCard(text)
    return text


def size_category(rows: int) -> str:
    """The Hub's word for so many rows."""
    steps = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((name for limit, name in steps if rows < limit), "1M<n<10M")


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears only when it is complete."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)
