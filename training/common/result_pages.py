"""Results as Markdown, and where they go: between two marks of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evatok_hf.models.files_evatok import write_text

Marks = tuple[str, str]  # the lines before and after the results


def markdown(headers: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose columns are aligned, for pages and for terminals: the first to the left, the others to the right.
    None is a dash."""
    table = [["-" if cell is None else str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        f"| {' | '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])} |" for row in table
    )


def check_page(path: Path, marks: Marks) -> str:
    """The text of a page. Raises ValueError for one that is not there or has no marks."""
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    if marks[0] not in page or marks[1] not in page.split(marks[0], 1)[1]:
        raise ValueError(f"{path} must be a page with the lines {' and '.join(marks)}, between which the results go.")
    return page


def update_page(path: Path, marks: Marks, text: str) -> None:
    """Puts the text between the marks of a page. Raises ValueError as `check_page`."""
    before, rest = check_page(path, marks).split(marks[0], 1)
    write_text(path, f"{before}{marks[0]}\n\n{text}\n{marks[1]}{rest.split(marks[1], 1)[1]}")
