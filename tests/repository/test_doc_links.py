"""Links in markdown files point to something, and nothing names a place on somebody's machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_pages import ROOT, anchors, pages, targets

CARDS = "src/evatok_hf/checkpoints/evatok-tiny"
# Templates are read where their card is written to.
WRITTEN_TO = {f"model_cards/{part}.md": f"{CARDS}/{part}/README.md" for part in ("tokenizer", "router", "generator")}


@pytest.mark.parametrize("page", pages())
def test_links_and_pictures(page):
    folder = (ROOT / WRITTEN_TO.get(page, page)).parent
    for target in targets(page):
        if re.match(r"https?:|mailto:", target) or "%7B%7B" in target or "{{" in target:  # a template's own words
            continue
        path, _, anchor = target.partition("#")
        found = (folder / path).resolve() if path else ROOT / page
        assert found.exists() and found.is_relative_to(ROOT), f"{page}: nothing is at {target}"
        if anchor:
            known = anchors(str(found.relative_to(ROOT)))
            assert anchor in known, f"{page}: {target} is none of the headings {sorted(known)}"


@pytest.mark.parametrize("page", pages())
def test_no_paths_of_a_machine(page):
    text = (ROOT / page).read_text()
    assert not re.findall(r"(?<![\w.~/:-])(?:/(?:home|root|work|tmp|mnt|media|Users)/|[A-Z]:\\)\S*", text)


def test_pictures_have_words():
    for page in pages():
        assert "![](" not in (ROOT / page).read_text(), f"{page}: say what the picture shows"


def test_pages_are_found():
    assert {"README.md", "docs/index.md", "training/README.md", f"{CARDS}/router/README.md"} <= set(pages())
    assert not any(Path(page).parts[0] in ("out", ".venv") for page in pages())
