"""Hooks of the documentation site: pages made from what is true elsewhere, and links between all of them.

The command line's reference is made by typer from the commands themselves; the training recipe and the cards of the
bundled checkpoints are shown as they lie in the repository. Links in all files are those that work in the repository;
here they become links of the site.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

ROOT = Path(__file__).resolve().parents[1]
CARDS = "src/evatok_hf/checkpoints"
# What is shown though it lies outside docs/: file of the repository -> file of the site.
SHOWN = {"training/README.md": "training.md"}
for card in sorted((ROOT / CARDS).glob("*/*/README.md")):
    part = card.parent.relative_to(ROOT / CARDS).as_posix()  # such as evatok-tiny/router
    SHOWN[f"{CARDS}/{part}/README.md"] = f"cards/{part}.md"
    SHOWN[f"{CARDS}/{part}/loss_curve.png"] = f"cards/{part}_loss_curve.png"
_PLACES = {place: source for source, place in SHOWN.items()}
# Code first, so that nothing in it is taken for a link.
_LINK = re.compile(r"(?P<code>^```.*?^```|`[^`\n]*`)|(?P<before>\]\()(?P<target>[^)\s]+)(?P<after>\))", re.S | re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "cli.md", content=_commands()))
    for source, place in SHOWN.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    place = page.file.src_uri
    return site_links(markdown, _PLACES.get(place, f"docs/{place}"), place)


def site_links(text: str, source: str, place: str) -> str:
    """Links of a file of the repository as the page `place` of the site needs them; others stay, which is an error."""

    def translate(match: re.Match) -> str:
        target = match["target"]
        if match["code"] or re.match(r"[a-z]+:|#", target):
            return match[0]
        path, anchor = re.match(r"([^#]*)(.*)", target).groups()
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        found = SHOWN.get(wanted) or (wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
        if found is None:
            return match[0]
        relative = os.path.relpath(found, posixpath.dirname(place) or ".").replace(os.sep, "/")
        return f"{match['before']}{relative}{anchor}{match['after']}"

    return _LINK.sub(translate, text)


def _commands() -> str:
    """The command line's reference."""
    from evatok_hf.cli.commands import app

    group = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group), name="evatok", title="Command line")
    # Typer's list of commands names them without a link.
    return re.sub(r"^\* `([a-z][a-z-]*)`:", r"* [`\1`](#evatok-\1):", text, flags=re.M)
