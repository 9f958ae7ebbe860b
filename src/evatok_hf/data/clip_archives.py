"""Videos and their labels in tar files, as in WebDataset: what shares a name up to its first dot belongs together.

A damaged archive gives what comes before the damage and, where members can be found again, what comes after it.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import PurePosixPath

import fsspec

from ..video.source_files import VIDEO_SUFFIXES, Example, printable

# Where a label is looked for, the first that has one.
LABEL_SUFFIXES = (".label", ".cls", ".json")
# Videos of one sample that wait for a label which comes after them.
_WAITING = 8
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")

# A video of an archive, and its label as text, None without one; a number is text here, too.
Labelled = tuple[Example, str | None]


def read_archive(path: str, classes: Mapping[str, int]) -> Iterator[Example]:
    """The videos of a tar, which may be compressed, at a path or address, one with a `problem` for each that is lost.

    `classes` are the numbers of labels that are words; where there are none, labels are numbers. Raises OSError where
    the archive cannot be read for another reason than its contents.
    """
    for example, label in read_labels(path, names_only=False):
        if label is not None and example.problem is None:
            try:
                example = replace(example, label=to_number(label, classes))
            except ValueError as error:
                example = replace(example, video=b"", problem=f"{error} ({_name(path)})")
        yield example


def read_labels(path: str, names_only: bool = True) -> Iterator[Labelled]:
    """The same with labels as text; `names_only` leaves out the bytes of videos, which is much faster on a disk."""
    for base, members in groupby(_members(path, names_only), lambda member: getattr(member, "base", None)):
        if base is None:
            yield from ((lost, None) for lost in members)
        else:
            yield from _sample(base, members)


def is_number(label: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", label) is not None or label == "-1"


def to_label(value: object) -> str | None:
    """A label, or a JSON object that has one under "label", as text; None for what is no word or number of a class."""
    if isinstance(value, Mapping):
        value = value.get("label")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        return printable(value).strip() or None
    return str(value) if isinstance(value, int) and is_number(str(value)) else None


def to_number(label: str, classes: Mapping[str, int]) -> int:
    """The number of a class from its label as text. Raises ValueError where it is another word than `classes` has."""
    if classes:
        if label not in classes:
            raise ValueError(f"its label {label!r:.50} is none of the classes that the source had when it was opened")
        return classes[label]
    if not is_number(label):
        raise ValueError(f"its label {label!r:.50} is a word, those that came before are numbers or missing")
    return int(label)


def _name(path: str) -> str:
    return printable(PurePosixPath(path).name)


@dataclass
class _Member:
    """A file of an archive."""

    name: str
    data: bytes = b""
    problem: str | None = None

    def __post_init__(self) -> None:
        folder, slash, name = self.name.rpartition("/")
        self.suffix = PurePosixPath(name).suffix.lower()
        self.stem = self.name[: len(self.name) - len(self.suffix)]
        # The name up to its first dot: what the members of a sample have in common.
        self.base = folder + slash + name.split(".", 1)[0]


def _sample(base: str, members: Iterable[_Member]) -> Iterator[Labelled]:
    """The videos of members with one base, which wait for the labels that come after them."""
    waiting, seen = deque(), False
    labels: dict[tuple[str, str], str | ValueError] = {}

    def labelled(video: _Member) -> Labelled:
        places = [(stem, suffix) for stem in (video.stem, base) for suffix in LABEL_SUFFIXES]
        label = next((labels[place] for place in places if place in labels), None)
        problem = video.problem
        if isinstance(label, ValueError):
            problem, label = problem or str(label), None
        return Example(printable(video.stem), b"" if problem else video.data, -1, problem), label

    for member in members:
        if member.suffix in VIDEO_SUFFIXES:
            seen = True
            waiting.append(member)
            if len(waiting) > _WAITING:
                yield labelled(waiting.popleft())
        elif (label := _parse(member)) is not None:
            labels.setdefault((member.stem, member.suffix), label)
    yield from map(labelled, waiting)
    if labels and not seen:
        problem = "there is a label of this name in the tar but no video; put it back, or remove the label"
        yield Example(printable(base), b"", -1, problem), None


def _parse(member: _Member) -> str | ValueError | None:
    """The label in a member; the error where there is none that can be read."""
    try:
        if member.problem:
            raise ValueError(member.problem)
        if member.suffix == ".json":
            return to_label(json.loads(member.data))
        return to_label(member.data.decode("utf-8-sig", "backslashreplace"))
    except (ValueError, RecursionError) as error:
        what = "no JSON" if isinstance(error, json.JSONDecodeError | RecursionError | UnicodeError) else str(error)
        return ValueError(f"{printable(member.name)}: {what}; mend it, or leave it out")


class _Header(tarfile.TarInfo):
    """A member of an archive, which tells that of what `tarfile` passes over in silence."""

    @classmethod
    def fromtarfile(cls, archive: _Archive) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            archive.ended = True
            raise
        except tarfile.EmptyHeaderError:
            raise
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            archive.bad = True
            if isinstance(error, tarfile.TruncatedHeaderError):
                raise
            raise tarfile.InvalidHeaderError(str(error)) from error


class _Archive(tarfile.TarFile):
    """An archive, and what was met since its last member: blocks that are no header, and the mark of the end."""

    tarinfo, bad, ended = _Header, False, False


def _members(path: str, names_only: bool) -> Iterator[_Member | Example]:
    """The videos and labels of an archive in order, and for each place that is damaged an example that says so."""
    last = None

    def lost(what: str) -> Example:
        where = f" after {printable(last)}" if last else ""
        problem = f"cannot read an archive ({what}{where}): {_name(path)}; make the tar anew"
        return Example(_name(path), b"", -1, problem)

    # Not by fsspec what lies here: it takes "::" and "#" in a name for its own.
    with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
        skips = names_only and "://" not in path and not file.peek(6).startswith(_COMPRESSED)
        try:
            archive = _Archive.open(fileobj=file, mode="r:" if skips else "r|*", ignore_zeros=True)
        except (tarfile.TarError, EOFError) as error:
            yield lost("it is empty" if "empty" in str(error) else str(error))
            return
        with archive:
            while True:
                try:
                    info = archive.next()
                except (tarfile.TarError, EOFError):
                    yield lost("it breaks off")
                    return
                archive.members = []  # else all of them stay in memory
                if archive.bad:
                    yield lost("some of it is damaged")
                elif info is None and not archive.ended:
                    yield lost("it has no end")
                if info is None:
                    return
                archive.bad, archive.ended = False, False
                member = _Member(info.name)
                hidden = PurePosixPath(info.name).name.startswith(".")
                if not info.isdir() and not hidden and member.suffix in (*VIDEO_SUFFIXES, *LABEL_SUFFIXES):
                    if not info.isreg():
                        member.problem = f"is no file in {_name(path)} but a link; put the file there"
                    elif not names_only or member.suffix in LABEL_SUFFIXES:
                        try:
                            member.data = archive.extractfile(info).read()
                        except (tarfile.TarError, EOFError):
                            pass
                        if len(member.data) < info.size:
                            yield lost(f"it is cut short within {printable(info.name)}")
                            return
                    yield member
                last = info.name
