"""The videos and archives under a name: files as they are named, links followed, patterns only where there is no such
file."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.files_evatok import is_partial

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mov", ".m4v", ".gif")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Example:
    """A video that was not opened yet: its path, address or bytes.

    Attributes:
        key: its path within the folder, or its key within the tar or dataset, in characters that every file can hold.
        video: path or address, the bytes of the file, or a video that is decoded already (`data.decoded`).
        label: number of its class, -1 without one.
        problem: why it cannot be used, where that is known already; it is counted and named then.
    """

    key: str
    video: Any
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

    Links are followed, to files and to folders. Only those to a folder that was come to in a shorter way, as in a loop,
    are not; but what a link in `root` itself names is there under that name, too. Files that macOS puts beside others
    (`._name`) are left out; a folder that cannot be read is, too, with a warning.
    """
    return sorted(
        path
        for path in _walk(Path(root))
        if path.name.lower().endswith(tuple(suffixes)) and not path.name.startswith("._")
    )


def list_folders(root: Path) -> list[Path]:
    """The folders directly in a folder, links among them, but for links to what it lies in itself."""
    above = _above(root) | {_identity(root)}
    folders = (child for child in root.iterdir() if child.is_dir() and not is_partial(child.name))
    return sorted(child for child in folders if _identity(child) not in above)


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _above(root: Path) -> set[tuple[int, int]]:
    return {_identity(folder) for folder in Path(os.path.realpath(root)).parents}


def _walk(root: Path) -> Iterator[Path]:
    """The files below a folder: first those that no link leads to but one in the root, then those behind one link more,
    and so on."""
    reached = dict.fromkeys(_above(root), -1)  # by folder, the links on the shortest way to it
    queue = deque([(root, 0, ())])  # in order of links
    while queue:
        folder, links, way = queue.popleft()
        try:
            identity = _identity(folder)
            if identity in way or reached.get(identity, links) < links or (links > 1 and identity in reached):
                logger.info("%s leads to a folder that was read already", printable(folder))
                continue
            with os.scandir(folder) as entries:
                children = list(entries)
        except OSError as error:
            logger.warning("%s is left out: %s", printable(folder), error.strerror)
            continue
        reached[identity] = links
        for child in children:
            path, linked = folder / child.name, child.is_symlink()
            if is_partial(child.name):
                continue  # somebody's output, half written
            if path.is_dir() if linked else child.is_dir():
                if linked and folder != root:
                    queue.append((path, links + 1, (*way, identity)))
                else:
                    queue.appendleft((path, links, (*way, identity)))
            elif path.is_file() if linked else child.is_file():
                yield path


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
        path for path in _walk(start) if matches(path.relative_to(start).as_posix()) and not path.name.startswith(".")
    )


def file_states(paths: Iterable[str]) -> str:
    """16 hex digits that differ where one of these files has another size or time of change; addresses are passed."""
    digest = hashlib.sha256()
    for path in paths:
        if "://" not in path and os.path.exists(path):
            found = os.stat(path)
            digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
