"""A folder that grows shard by shard, whoever makes the rows, and that a killed run goes on with.

Rows come in lanes, which know nothing of each other: the units of `evatok tokenize-dataset`, the processes of a
training script. Those of a lane fill shards `data/NAME-LANE-NUMBER.parquet` one after another. The note of a shard says
what it was made with, which videos were skipped on the way to its rows, and where its lane goes on: at a place in a
stream, or nowhere since it is the last. Nothing in a shard tells of time, of machines or of earlier attempts, so that a
run that goes on writes the same bytes as one that was never stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.files_evatok import (
    check,
    checked,
    flag,
    is_partial,
    list_of,
    named,
    number,
    optional,
    plain,
    prepare,
    read_json,
    record,
    remove_left_over,
    ruled,
    table_of,
    text,
    whole,
    write_text,
)
from ..video.source_files import printable
from .parquet_shards import ShardKind

if TYPE_CHECKING:
    from datasets import Features

SKIPPED = "skipped.jsonl"
_RUN = ".run.json"
_CHANGED = {
    "source_state": "videos that have changed since, in size or in time of change",
    "source_digest": "other videos than there are now (some were added, removed or renamed)",
}


_COUNT = whole(0, 1 << 40)


@checked
@dataclass
class _Skipped:
    """A video that was skipped (see `Unusable`)."""

    source: str = ruled(text(1 << 16))
    cause: str = ruled(text())
    reason: str = ruled(text(1 << 16))
    clips: int = ruled(_COUNT)


@checked
@dataclass
class _Note:
    """The note of a shard."""

    settings: dict = ruled(table_of(plain()))
    clips: int = ruled(_COUNT)
    skipped: list = ruled(list_of(record(_Skipped), 1 << 20))
    last: bool = ruled(flag())
    place: dict | None = ruled(optional(plain()), None)


@checked
@dataclass
class _Run:
    """The contents of `.run.json`."""

    seconds: int | float = ruled(number(0, 1e12))
    machine: str = ruled(text(1 << 16))


@dataclass
class Lane:
    """A lane, as far as it is made: shards, their clips, and videos that were skipped on the way (see `Unusable`)."""

    shards: int = 0
    clips: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    place: dict[str, Any] | None = None  # where it goes on after them, None at its beginning
    last: bool = False  # whether nothing comes after them
    rows: list[dict[str, Any]] = field(default_factory=list)  # not yet written
    passed: list[dict[str, Any]] = field(default_factory=list)  # skipped, and not yet written

    def grow(self, note: _Note) -> None:
        """Counts in a shard that was written."""
        self.shards, self.clips, self.skipped = self.shards + 1, self.clips + note.clips, self.skipped + note.skipped
        self.place, self.last = note.place, note.last


class ShardFolder:
    """The folder of a run.

    Shards of a lane that come after one that is missing are made again, and so is a lane without a place that lacks its
    last shard.

    Args:
        kind: of the shards.
        folder: of the data set.
        settings: all that the shards depend on; written into each.
        features: of the rows; None where `datasets` is not installed, or nothing is written.
        shard_size: clips of a shard.
        lane: the only one that this process knows of; None for all.
        machine: what computes, as the card says it, where this process notes the time that the run takes.

    Attributes:
        lanes: by number.
        machine: as given, or as an earlier run noted it.

    Raises:
        ValueError: shards that were made in another way or with other settings, or a damaged one.
    """

    def __init__(
        self,
        kind: ShardKind,
        folder: Path,
        settings: Mapping[str, Any],
        features: Features | None = None,
        shard_size: int = 1,
        lane: int | None = None,
        machine: str | None = None,
    ):
        self.kind, self.folder, self.settings = kind, folder, dict(settings)
        self._features, self._size = features, shard_size
        kind.check(folder)
        known: dict[int, Lane] = {}
        for path in sorted(kind.list(folder, lane), key=kind.place):
            number, shard = kind.place(path)
            note, of_shard = self._read(path), known.setdefault(number, Lane())
            if shard == of_shard.shards and not of_shard.last:
                of_shard.grow(note)
        self.lanes = {number: lane for number, lane in known.items() if lane.last or lane.place is not None}
        remove_left_over(folder / "data")
        self._before, self._began, self._timed = 0.0, time.monotonic(), machine is not None
        self.machine = machine or ""
        if (folder / _RUN).exists():
            run = read_json(folder / _RUN, _Run)
            self._before, self.machine = run["seconds"], machine or run["machine"]
        elif (folder / kind.summary).exists():
            self._before = read_json(folder / kind.summary).get("seconds", 0.0)

    def _read(self, path: Path) -> _Note:
        note = self.kind.read_note(path)
        if "stream" in note:
            raise ValueError(
                f"{path} is of an earlier version, whose runs this one cannot go on with; name a new folder."
            )
        with named(f"the note of {path}"):
            said = check(_Note, note)
        by_us, counted = self.settings.get("counted"), said.settings.get("counted")
        if counted != by_us and "videos" in (counted, by_us):
            maker = "evatok tokenize-dataset" if counted == "videos" else "training/tokenize_dataset.py"
            raise ValueError(f"{self.folder} holds tokens that {maker} made; choose another folder for these.")
        for name, now in self.settings.items():
            if (was := said.settings.get(name, now)) == now:
                continue
            if name in _CHANGED:
                raise ValueError(
                    f"{self.folder} was begun with {_CHANGED[name]}; put them back, or choose another folder."
                )
            raise ValueError(
                f"{self.folder} was begun with {name} {was}, not {now}; use the options and videos that it was begun "
                "with, or another folder."
            )
        return said

    @property
    def done(self) -> set[int]:
        """Numbers of the lanes whose shards are all there."""
        return {number for number, lane in self.lanes.items() if lane.last}

    @property
    def clips(self) -> int:
        """Rows in all shards."""
        return sum(lane.clips for lane in self.lanes.values())

    @property
    def seconds(self) -> float:
        """The seconds that this run and those before it took."""
        return self._before + time.monotonic() - self._began

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """The videos that were skipped, lane by lane."""
        return [{**video, "unit": number} for number in sorted(self.lanes) for video in self.lanes[number].skipped]

    @property
    def causes(self) -> Counter[str]:
        """Numbers of videos that were skipped, by cause."""
        return Counter(video["cause"] for lane in self.lanes.values() for video in lane.skipped)

    def prepare(self, machine: str) -> None:
        """Makes the folder, before the work, whose time this process then notes. Raises ValueError where it cannot."""
        self.machine, self._timed = machine, True
        prepare(self.folder / _RUN)

    def room(self, number: int) -> int:
        """Number of rows that the next shard of a lane lacks."""
        return self._size - len(self.lanes[number].rows) if number in self.lanes else self._size

    def add(
        self,
        number: int,
        rows: Sequence[dict[str, Any]],
        skipped: Sequence[dict[str, Any]] = (),
        place: dict[str, Any] | None = None,
        last: bool = False,
    ) -> None:
        """Takes in the next rows of a lane, and the videos that were skipped on the way to them, and writes the shards
        that they complete. `place` is where the lane goes on after them, `last` whether nothing comes after them.

        A lane without places has its last shard known by a note, so one that is just full waits for what comes.
        """
        lane = self.lanes.setdefault(number, Lane())
        lane.rows += rows
        lane.passed += skipped
        while len(lane.rows) > self._size or (place is not None and len(lane.rows) == self._size):
            self._write(number, lane, place, False)
        if last:
            self._write(number, lane, None, True)

    def flush(self, number: int, place: dict[str, Any]) -> None:
        """Writes what is left of a lane, which may go on later."""
        lane = self.lanes.setdefault(number, Lane())
        if lane.rows:
            self._write(number, lane, place, False)

    def _write(self, number: int, lane: Lane, place: dict[str, Any] | None, last: bool) -> None:
        rows, lane.rows = lane.rows[: self._size], lane.rows[self._size :]
        skipped, lane.passed = (lane.passed, []) if last or place is not None else ([], lane.passed)
        note = _Note(self.settings, len(rows), skipped, last, place)
        self.kind.write(self.kind.path(self.folder, number, lane.shards), rows, self._features, asdict(note))
        lane.grow(note)
        if self._timed:
            write_text(self.folder / _RUN, json.dumps({"seconds": round(self.seconds, 1), "machine": self.machine}))

    def write_skipped(self) -> str | None:
        """Names the videos that were skipped in `skipped.jsonl`, each once for the same reason -> the file's name."""
        lines = dict.fromkeys(json.dumps(video, ensure_ascii=False) + "\n" for video in self.skipped)
        if not lines:
            (self.folder / SKIPPED).unlink(missing_ok=True)
            return None
        write_text(self.folder / SKIPPED, printable("".join(lines)))
        return SKIPPED

    def close(self) -> None:
        """Removes what only an unfinished folder needs."""
        (self.folder / _RUN).unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes all that was written."""
        for path in self.kind.list(self.folder):
            path.unlink()
        self.close()
        for folder in (self.folder / "data", self.folder):
            if not any(folder.iterdir()):
                folder.rmdir()


def check_output(kind: ShardKind, folder: Path) -> None:
    """Raises ValueError unless a folder is new, empty, or holds shards of a kind, finished or not."""
    kind.check(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a new folder for the {kind.rows}.")
    if not folder.exists() or kind.list(folder) or not (found := os.listdir(folder)):
        return
    if other := sorted(name for name in found if name not in ("data", _RUN) and not is_partial(name)):
        raise ValueError(
            f"{folder} holds {other[0]} and no {kind.rows}; name a new or empty folder for the {kind.rows}."
        )
