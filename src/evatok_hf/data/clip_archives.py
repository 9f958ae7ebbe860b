"""Videos and their labels in tar files, as in WebDataset: what shares a name up to its first dot belongs together.

A damaged archive gives what comes before the damage and, where members can be found again, what comes after it.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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
    """The videos of a tar at a path or address, one with a `problem` for each that is lost.

    Args:
        path: of the archive; it may be compressed.
        classes: number of each label that is a word; where there are none, labels are numbers.

    Raises:
        OSError: if it cannot be read for another reason than its contents.
    """
    for example, label in read_labels(path, names_only=False):
        if label is not None and example.problem is None:
            try:
                example = replace(example, label=to_number(label, classes))
            except ValueError as error:
                example = replace(example, video=b"", problem=f"{error} ({_name(path)})")
        yield example


def read_labels(path: str, names_only: bool = True) -> Iterator[Labelled]:
    """The videos of a tar with their labels; `names_only` leaves out their bytes, which is much faster on a disk.

    Raises:
        OSError: as `read_archive`.
    """
    sample = _Sample("")
    for member in _members(path, names_only):
        base = member.base
        if member.lost or base != sample.base:
            yield from sample.close()
            sample = _Sample(base)
        if member.lost:
            yield Example(_name(path), b"", -1, member.lost), None
        else:
            yield from sample.add(member)
    yield from sample.close()


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
    """A file of an archive, or (`lost`) a place in it that could not be read."""

    name: str = ""
    data: bytes = b""
    problem: str | None = None
    lost: str | None = None

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    @property
    def stem(self) -> str:
        return self.name[: len(self.name) - len(self.suffix)]

    @property
    def base(self) -> str:
        """The name up to its first dot: what the members of a sample have in common."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.split(".", 1)[0]


@dataclass
class _Sample:
    """Members with one base, of which videos wait for the labels that come after them."""

    base: str
    videos: list[_Member] = field(default_factory=list)
    labels: dict[str, tuple[int, str | ValueError]] = field(default_factory=dict)
    seen: bool = False

    def add(self, member: _Member) -> Iterator[Labelled]:
        if member.suffix in VIDEO_SUFFIXES:
            self.seen = True
            self.videos.append(member)
            if len(self.videos) > _WAITING:
                yield self._labelled(self.videos.pop(0))
        elif member.suffix in LABEL_SUFFIXES:
            rank = LABEL_SUFFIXES.index(member.suffix)
            label = _parse(member)
            if label is not None and rank < self.labels.get(member.stem, (len(LABEL_SUFFIXES),))[0]:
                self.labels[member.stem] = (rank, label)

    def close(self) -> Iterator[Labelled]:
        for video in self.videos:
            yield self._labelled(video)
        if self.labels and not self.seen:
            problem = "there is a label of this name in the tar but no video; put it back, or remove the label"
            yield Example(printable(self.base), b"", -1, problem), None

    def _labelled(self, member: _Member) -> Labelled:
        _, label = self.labels.get(member.stem) or self.labels.get(self.base) or (0, None)
        problem = member.problem or (str(label) if isinstance(label, ValueError) else None)
        example = Example(printable(member.stem), b"" if problem else member.data, -1, problem)
        return example, None if isinstance(label, ValueError) else label


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
            archive.bad += 1
            if isinstance(error, tarfile.TruncatedHeaderError):
                raise
            raise tarfile.InvalidHeaderError(str(error)) from error


class _Archive(tarfile.TarFile):
    """An archive, and what was met since its last member: blocks that are no header, and the mark of the end."""

    tarinfo, bad, ended = _Header, 0, False


def _members(path: str, names_only: bool) -> Iterator[_Member]:
    """The files of an archive in order, those that `WebDataset` takes for such, and places that are damaged."""
    last = None

    def lost(what: str) -> _Member:
        where = f" after {printable(last)}" if last else ""
        return _Member(lost=f"cannot read an archive ({what}{where}): {_name(path)}; make the tar anew")

    # Not by fsspec what lies here: it takes "::" and "#" in a name for its own.
    with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
        mode = "r|*"
        if names_only and "://" not in path:
            mode = "r|*" if file.read(6).startswith(_COMPRESSED) else "r:"
            file.seek(0)
        try:
            archive = _Archive.open(fileobj=file, mode=mode, ignore_zeros=True)
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
                archive.bad, archive.ended = 0, False
                name = PurePosixPath(info.name).name
                suffix = PurePosixPath(name).suffix.lower()
                if info.isdir() or name.startswith(".") or suffix not in (*VIDEO_SUFFIXES, *LABEL_SUFFIXES):
                    last = info.name
                    continue
                if not info.isreg():
                    yield _Member(info.name, problem=f"is no file in {_name(path)} but a link; put the file there")
                elif names_only and suffix in VIDEO_SUFFIXES:
                    yield _Member(info.name)
                else:
                    try:
                        data = archive.extractfile(info).read()
                    except (tarfile.TarError, EOFError):
                        data = b""
                    if len(data) < info.size:
                        yield lost(f"it is cut short within {printable(info.name)}")
                        return
                    yield _Member(info.name, data)
                last = info.name
