"""The documentation site: it builds without a warning, reads without a network, and has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import public_names
import pytest
import typer

import evatok_hf
from evatok_hf.cli.commands import app

ROOT = Path(__file__).parents[2]
SOURCE = Path(evatok_hf.__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loads(HTMLParser):
    """What a browser fetches for a page, the ids in it, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag == "link" and attrs.get("rel") not in ("prev", "next", "canonical"):
            self.fetched.append(attrs["href"])
        if tag != "a":
            self.fetched += [attrs[name] for name in ("src", "poster", "data") if attrs.get(name)]

    def handle_data(self, data):
        self.text.append(data)


def test_nothing_is_fetched_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for url in Loads(page).fetched:
            if page.name == "404.html":  # which does not know how deep it is
                assert url.startswith("/")
                continue
            assert not re.match(r"\w+:|//", url), f"{page.name} loads {url}"
            assert (page.parent / url.partition("?")[0]).is_file(), f"{page.name}: {url} is missing"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet.name


def test_every_public_name_is_described(site):
    described = set().union(*(Loads(page).ids for page in (site / "api").glob("*.html")))
    missing = [name for name in evatok_hf.__all__ if f"evatok_hf.{name}" not in described | {"evatok_hf.__version__"}]
    assert not missing, f"describe them in docs/api: {missing}"


def test_the_public_interface_is_what_the_page_says():
    assert public_names.PAGE.read_text() == public_names.page(), (
        "the public interface has changed; if it should, run tools/public_names.py"
    )


def test_every_command_and_option_is_described(site):
    page = "".join(Loads(site / "cli.html").text)
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert f"evatok {name}" in page
        for param in command.params:
            if not param.hidden:
                assert max(param.opts, key=len) in page or param.metavar in page, f"{name} {param.name}"


def test_pages_from_elsewhere_are_whole(site):
    recipe = Loads(site / "training.html")
    assert "at-the-papers-size" in recipe.ids and "adversarial_run.png" in recipe.fetched
    for name, folder in evatok_hf.bundled_checkpoints().items():
        card = Loads(site / "cards" / name / "tokenizer.html")
        source = Path(folder, "tokenizer", "README.md").read_text()
        assert re.search(r"fingerprint `(\w+)`", source)[1] in "".join(card.text)
        assert "tokenizer_loss_curve.png" in card.fetched
