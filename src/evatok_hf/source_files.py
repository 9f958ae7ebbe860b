"""Which videos and archives lie under a name: files as they are named, links followed, patterns only where there is no
such file."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mov", ".m4v", ".gif")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Example:
    """A video that was not opened yet: its path, address or bytes.

    Attributes:
        key: its path within the folder, or its key within the tar or dataset, in characters that every file can hold.
        video: path or address, or the bytes of the file.
        label: number of its class, -1 without one.
        problem: why it cannot be used, where that is known already; it is counted and named then.
    """

    key: str
    video: str | bytes
    label: int
    problem: str | None = None


def printable(name: str | os.PathLike[str]) -> str:
    """A name in which bytes that are no UTF-8 stand as \\xe9, so that it can be logged and stored."""
    name = os.fspath(name)
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a character, as JSON can have it
        return name.encode("utf-8", "backslashreplace").decode()


def list_files(root: str | os.PathLike[str], suffixes: Sequence[str]) -> list[Path]:
    """All files below a folder whose names end so, in upper or lower case, sorted.

    Links are followed, to files and to folders, but for those that lead back to a folder they lie in. Files that macOS
    puts beside others (`._name`) are left out; a folder that cannot be read is, too, with a warning.
    """
    return sorted(
        path
        for path in _walk(Path(root), ())
        if path.name.lower().endswith(tuple(suffixes)) and not path.name.startswith("._")
    )


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """The files below a folder, given the identities of those that it was reached through."""
    try:
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            logger.info("%s leads back to a folder that it lies in and is not followed", printable(folder))
            return
        children = sorted(folder.iterdir())
    except OSError as error:
        logger.warning("%s is left out: %s", printable(folder), error.strerror)
        return
    for child in children:
        if child.is_dir():
            yield from _walk(child, (*above, identity))
        elif child.is_file():
            yield child


def match_files(pattern: str) -> list[Path]:
    """The files that a pattern with `*`, `?`, `[..]` or `**` matches, sorted; a file or folder that has such characters
    in its own name is taken by its name."""
    root, parts = Path(pattern).anchor, list(Path(pattern).parts)
    if root:
        parts.pop(0)
    while parts and os.path.lexists(os.path.join(root, parts[0])):
        root = os.path.join(root, parts.pop(0))
    if not parts:
        return [Path(pattern)]
    rest = os.path.join(*parts)
    if "**" not in rest:
        found = map(Path, glob.glob(os.path.join(glob.escape(root), rest)))
        return sorted(path for path in found if path.is_file())
    from fsspec.utils import glob_translate

    # Not by `glob`, which goes round in a loop of links.
    matches = re.compile(glob_translate(Path(rest).as_posix())).match
    start = Path(root or os.curdir)
    return sorted(
        path
        for path in _walk(start, ())
        if matches(path.relative_to(start).as_posix()) and not path.name.startswith(".")
    )
