"""The output of bulk tokenizing: rows that come in any order become the shards of their units, each whole or not there.

The rows of a unit, in the order of its videos, fill shards `data/tokens-UNIT-NUMBER.parquet` one after another. The
last one says so and holds the videos that were skipped, so a unit is done when its shards up to that one are there. A
unit without a clip has one shard without rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..data.token_dataset import SHARDS, SUMMARY
from ..models.files_evatok import (
    checked,
    flag,
    is_partial,
    list_of,
    number,
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

if TYPE_CHECKING:
    from datasets import Features

    from .units import Task

SKIPPED = "skipped.jsonl"
_RUN = ".run.json"


_COUNT = whole(0, 1 << 40)


@checked
@dataclass
class _Skipped:
    source: str = ruled(text(1 << 16))
    cause: str = ruled(text())
    reason: str = ruled(text(1 << 16))
    clips: int = ruled(_COUNT)


@checked
@dataclass
class _Note:
    """What the note of a shard says."""

    settings: dict = ruled(table_of(plain()))
    unit: int = ruled(_COUNT)
    number: int = ruled(_COUNT)
    last: bool = ruled(flag())
    clips: int = ruled(_COUNT)
    skipped: list = ruled(list_of(record(_Skipped), 1 << 20))


@checked
@dataclass
class _Run:
    """What `.run.json` says."""

    seconds: int | float = ruled(number(0, 1e12))
    machine: str = ruled(text(1 << 16))


@dataclass
class _Unit:
    """A unit under way: what was not yet written of it, and the chunk that is to come next."""

    tasks: list[int] = field(default_factory=list)
    chunk: int = 0
    early: dict[tuple[int, int], tuple[bool, pa.Table, list]] = field(default_factory=dict)
    parts: list[pa.Table] = field(default_factory=list)
    rows: int = 0
    shards: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)


class UnitShards:
    """The folder of the shards; it knows which units are done.

    Args:
        folder: of the data set.
        settings: all that the shards depend on; written into each.
        columns: of a shard.
        shard_size: clips of a shard.

    Attributes:
        done: numbers of the units whose shards are all there.
        clips: rows in them.
        skipped: videos that they left out, unit by unit.
        seconds: that earlier runs took.
        machine: what the workers run on.

    Raises:
        ValueError: a folder with other things in it, or with tokens that were made in another way or with other
            settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], columns: Features, shard_size: int):
        self.folder, self.settings, self._columns, self._size = folder, dict(settings), columns, shard_size
        self.done: set[int] = set()
        self.clips, self.seconds, self.machine = 0, 0.0, ""
        self.skipped: dict[int, list[dict[str, Any]]] = {}
        self._units: dict[int, _Unit] = {}
        check_output(folder)
        found: dict[int, dict[int, dict[str, Any]]] = {}
        paths = SHARDS.list(folder)
        if paths and isinstance(before := SHARDS.read_note(paths[0]).get("settings"), dict):
            self._check(before)  # tokens of the training script, whose notes are others, are said to be that
        for path in paths:
            note = SHARDS.read_note(path, _Note)
            self._check(note["settings"])
            found.setdefault(note["unit"], {})[note["number"]] = note
        for unit, notes in found.items():
            end = next((number for number, note in notes.items() if note["last"]), None)
            if end is not None and all(number in notes for number in range(end)):
                self._finish(unit, notes[end], sum(notes[number]["clips"] for number in range(end + 1)))
        remove_left_over(folder / "data")
        if (folder / _RUN).exists():
            run = read_json(folder / _RUN, _Run)
            self.seconds, self.machine = run["seconds"], run["machine"]

    def _check(self, before: Mapping[str, Any]) -> None:
        if before.get("counted") != self.settings["counted"]:
            raise ValueError(
                f"{self.folder} holds tokens that training/tokenize_dataset.py made; choose another folder for these."
            )
        for name in {**self.settings, **before}:
            was, now = before.get(name), self.settings.get(name)
            if name == "source_state" and was not in (None, now):  # shards of before have none
                raise ValueError(
                    f"{self.folder} was begun with videos of {self.settings['sources'][0]} that have changed since, in "
                    "size or in time of change; put them back, or choose another folder."
                )
            if name == "source_state":
                continue
            if name == "source_digest" and was != now:
                raise ValueError(
                    f"{self.folder} was begun with other videos than {self.settings['sources'][0]} has now (some were "
                    "added, removed or renamed); put them back, or choose another folder."
                )
            if was != now:
                raise ValueError(
                    f"{self.folder} was begun with {name} {was}, not {now}; use the options and videos that it was "
                    "begun with, or another folder."
                )

    def prepare(self, machine: str) -> None:
        """Makes the folder, before the work. Raises ValueError where it cannot be written to."""
        self.machine = machine
        prepare(self.folder / _RUN)

    def expect(self, tasks: list[Task]) -> None:
        """Which tasks each unit will come from; whatever had come of them is forgotten."""
        self._units = {}
        for task in tasks:
            self._units.setdefault(task.unit, _Unit()).tasks.append(task.number)

    def add(self, chunks: pa.Table, seconds: float) -> int:
        """Takes in chunks of `Encoder` and writes what is complete -> how many clips they are.

        Args:
            seconds: since this run began.

        Raises:
            ValueError: if it cannot be written.
        """
        clips = 0
        places = chunks.select(["unit", "task", "chunk", "last", "skipped"]).to_pylist()
        for chunk, rows in zip(places, chunks["rows"], strict=True):
            state, place = self._units.get(chunk["unit"]), (chunk["task"], chunk["chunk"])
            # Ray gives each chunk once, also where it did a task again; that nothing comes twice does not hang on it.
            if state is None or place in state.early or place < (state.tasks[0], state.chunk):
                continue
            table = pa.ipc.open_stream(rows.as_buffer()).read_all()
            state.early[place] = (chunk["last"], table, json.loads(chunk["skipped"]))
            clips += table.num_rows
            self._advance(chunk["unit"], state, seconds)
        return clips

    def _advance(self, unit: int, state: _Unit, seconds: float) -> None:
        while state.tasks and (state.tasks[0], state.chunk) in state.early:
            last, table, skipped = state.early.pop((state.tasks[0], state.chunk))
            state.parts.append(table)
            state.rows += table.num_rows
            state.skipped += skipped
            state.chunk += 1
            if last:
                state.tasks.pop(0)
                state.chunk = 0
        while state.rows > self._size:  # one that is just full may be the last
            self._write(unit, state, self._size, False, seconds)
        if not state.tasks:
            note = self._write(unit, state, state.rows, True, seconds)
            del self._units[unit]
            self._finish(unit, note, (note["number"] * self._size) + note["clips"])

    def _write(self, unit: int, state: _Unit, rows: int, last: bool, seconds: float) -> dict[str, Any]:
        # In one piece, so that the file does not tell how the rows came.
        table = pa.concat_tables([self._columns.arrow_schema.empty_table(), *state.parts]).combine_chunks()
        note = {
            "settings": self.settings,
            "unit": unit,
            "number": state.shards,
            "last": last,
            "clips": rows,
            "skipped": state.skipped if last else [],
        }
        SHARDS.write_table(SHARDS.path(self.folder, unit, state.shards), table.slice(0, rows).combine_chunks(), note)
        state.parts, state.rows, state.shards = [table.slice(rows)], state.rows - rows, state.shards + 1
        run = {"seconds": round(self.seconds + seconds, 1), "machine": self.machine}
        write_text(self.folder / _RUN, json.dumps(run))
        return note

    def _finish(self, unit: int, note: Mapping[str, Any], clips: int) -> None:
        self.done.add(unit)
        self.clips += clips
        if note["skipped"]:
            self.skipped[unit] = note["skipped"]

    def all_skipped(self) -> list[dict[str, Any]]:
        """The videos that were skipped, in the order of the source."""
        return [{**video, "unit": unit} for unit in sorted(self.skipped) for video in self.skipped[unit]]

    def write_skipped(self) -> None:
        """Names them in `skipped.jsonl`, if there are any."""
        lines = [json.dumps(video, ensure_ascii=False) + "\n" for video in self.all_skipped()]
        if lines:
            write_text(self.folder / SKIPPED, printable("".join(lines)))
        else:
            (self.folder / SKIPPED).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes what only an unfinished folder needs."""
        (self.folder / _RUN).unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes all that was written."""
        for path in SHARDS.list(self.folder):
            path.unlink()
        self.close()
        for folder in (self.folder / "data", self.folder):
            if not any(folder.iterdir()):
                folder.rmdir()


def check_output(folder: Path) -> None:
    """Raises ValueError unless a folder is new, empty, or holds tokens, finished or not."""
    SHARDS.check(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a new folder for the tokens.")
    if not folder.exists() or SHARDS.list(folder) or not (found := os.listdir(folder)):
        return
    if other := sorted(name for name in found if name not in ("data", _RUN) and not is_partial(name)):
        raise ValueError(f"{folder} holds {other[0]} and no tokens; name a new or empty folder for the tokens.")


def holds_tokens(folder: Path) -> bool:
    return bool(SHARDS.list(folder)) or (folder / SUMMARY).exists()
