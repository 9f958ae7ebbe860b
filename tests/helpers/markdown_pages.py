"""The markdown files of the repository, read by a parser: code, links and headings."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]


@cache
def pages() -> tuple[str, ...]:
    """All of them, relative to the repository, those that are not yet committed too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return tuple(sorted({name for name in listed if name and (ROOT / name).is_file()}))


@dataclass(frozen=True)
class Block:
    """Fenced code: its language, its text, and the line where it begins."""

    language: str
    text: str
    line: int


@cache
def tokens(page: str) -> tuple[Token, ...]:
    text = (ROOT / page).read_text()
    front = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
    if front:  # lines keep their numbers
        text = "\n" * front[0].count("\n") + text[front.end() :]
    return tuple(MarkdownIt("commonmark").enable("table").parse(text))


def blocks(page: str, language: str) -> list[Block]:
    found = [token for token in tokens(page) if token.type == "fence"]
    return [Block(language, t.content, t.map[0] + 2) for t in found if t.info.split() == [language]]


def inline(page: str) -> Iterator[Token]:
    """What stands inside paragraphs, headings and cells."""
    for token in tokens(page):
        yield from token.children or ()


def code_words(page: str) -> list[str]:
    """Code within text."""
    return [" ".join(token.content.split()) for token in inline(page) if token.type == "code_inline"]


def targets(page: str) -> list[str]:
    """Where links and images point to, those of HTML too."""
    found = [str(t.attrs[name]) for t in inline(page) for name in ("href", "src") if name in t.attrs]
    html = [t.content for t in (*tokens(page), *inline(page)) if t.type in ("html_block", "html_inline")]
    return found + [name for text in html for name in re.findall(r"""(?:href|src)=["']([^"']+)""", text)]


def anchors(page: str) -> set[str]:
    """The names of headings, as GitHub makes them and the site does."""
    found: list[str] = []
    headings = [index for index, token in enumerate(tokens(page)) if token.type == "heading_open"]
    for index in headings:
        words = "".join(child.content for child in tokens(page)[index + 1].children or ())
        name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        repeats = found.count(name)
        found.append(f"{name}-{repeats}" if repeats else name)
    return set(found)
