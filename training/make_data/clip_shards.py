"""Runs that turn the clips of a stream into rows, shard after shard, and go on exactly where they were killed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from evatok_hf.data.clip_cutting import Unusable
from evatok_hf.data.clip_sources import Example
from evatok_hf.data.parquet_shards import ShardKind
from evatok_hf.data.streaming import ClipStream, collate
from evatok_hf.models.files_evatok import checked, number, plain, remove_left_over, ruled, table_of, whole

if TYPE_CHECKING:
    from datasets import Features


class CountedStream(ClipStream):
    """Items say what was skipped on the way to them: loader processes read ahead, and what they met there comes again
    in a run that goes on, so that only the skips before finished clips may count. The last item of a pass also has
    what was skipped after it."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._causes: list[str] = []
        held: dict[str, Any] | None = None
        for item in super().__iter__():
            if held is not None:
                yield held
            held, self._causes = {**item, "skipped": self._causes}, []
        if held is not None:
            yield {**held, "skipped": held["skipped"] + self._causes}

    def _skip(self, example: Example, error: Unusable) -> None:
        super()._skip(example, error)
        self._causes.append(error.cause)


def collate_counted(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`collate`, and the causes of all skips in a list."""
    return {**collate(items), "skipped": [cause for item in items for cause in item["skipped"]]}


def read(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches; a ValueError of a loader process, which brings its whole traceback, as that of this process."""
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).rstrip().rsplit("\nValueError: ", 1)[-1]) from None


def share(clips: int, rank: int, world_size: int) -> int:
    """How many of all clips a process takes."""
    return clips // world_size + (rank < clips % world_size)


@checked
@dataclass
class _Note:
    """What the note of a shard says."""

    settings: dict = ruled(table_of(plain()))
    stream: dict = ruled(plain())
    clips: int = ruled(whole(0, 1 << 40))
    skipped: dict = ruled(table_of(whole(0, 1 << 40)))
    seconds: int | float = ruled(number(0, 1e12))


class ShardRun:
    """One process's shards, from the last finished one on; the stream is put right after it.

    Args:
        kind: of the shards.
        folder: of the shards of all processes.
        rank: which process this is.
        settings: all that the shards depend on, with the number of "processes".
        stream: where the clips come from.

    Attributes:
        done: clips in this process's shards.

    Raises:
        ValueError: shards of other settings, or one is missing among them.
    """

    def __init__(self, kind: ShardKind, folder: Path, rank: int, settings: dict, stream: CountedStream):
        self.kind, self.folder, self.rank, self.settings, self.stream = kind, folder, rank, settings, stream
        kind.check(folder)
        shards = kind.list(folder, rank)
        remove_left_over(folder / "data")
        self.number, self.done = len(shards), 0
        self._seconds, self._skipped = 0.0, Counter()
        if not shards:
            return
        if shards[-1] != kind.path(folder, rank, len(shards) - 1):
            raise ValueError(
                f"{folder} lacks a shard before {shards[-1].name}; put it back, or move the later ones away."
            )
        for shard in shards:  # all of them must be whole
            note = kind.read_note(shard, _Note)
        for name, value in settings.items():
            if name == "source_state" and note["settings"].get(name, value) != value:
                raise ValueError(
                    f"{folder} was begun with videos that have changed since, in size or in time of change; put them "
                    "back, or use another --output_dir."
                )
            if note["settings"].get(name, value) != value:
                raise ValueError(
                    f"{folder} was begun with {name} {note['settings'][name]}, not {value}; "
                    "use the settings that it was begun with, or another --output_dir."
                )
        stream.load_state_dict(note["stream"])
        self.done, self._seconds, self._skipped = note["clips"], note["seconds"], Counter(note["skipped"])

    def share(self, clips: int) -> int:
        """How many of all clips this process takes. Raises ValueError if it has more already."""
        mine = share(clips, self.rank, self.settings["processes"])
        if self.done > mine:
            raise ValueError(f"{self.folder} holds more than {clips} clips already; ask for as many, or for more.")
        return mine

    def fill(
        self,
        passes: Iterable[Iterator[dict[str, Any]]],
        compute: Callable[[dict[str, Any], int], list[dict[str, Any]]],
        features: Features | None,
        shard_size: int,
        batch_size: int,
        total: int | None = None,
        expected: int | None = None,
        until: float | None = None,
    ) -> None:
        """Shard after shard, until this process has `total` clips or the passes are at their end.

        Args:
            passes: batches of one clip of `collate_counted`, so that the stream's state after a shard is that after a
                batch; a pass may put the stream to its start, since all clips of the one before were noted.
            compute: (batch, number of its first clip) -> a row a clip.
            features: of the rows; None where `datasets` is not installed.
            shard_size: clips of a shard.
            batch_size: clips that `compute` is given at most.
            total: clips of this process in all.
            expected: how many clips the progress bar announces where there is no total.
            until: of `time.monotonic`, after which no further clips are taken.
        """
        started, rows, pace = time.monotonic() - self._seconds, [], 0.0
        goal = total if total is not None else expected
        with tqdm(total=goal, initial=self.done, unit="clip", desc=f"process {self.rank}", position=self.rank) as bar:
            for items in passes:
                while True:
                    room = shard_size - len(rows)
                    if total is not None:
                        room = min(room, total - self.done - len(rows))
                    if until is not None:
                        fits = int((until - time.monotonic()) / pace) if pace else 1
                        if fits < 1 and self.done + len(rows) > 0:
                            break
                        room = min(room, max(1, fits))
                    singles = list(islice(items, min(batch_size, room)))
                    if not singles:
                        break
                    batch = {name: _join([single[name] for single in singles]) for name in singles[0]}
                    began = time.monotonic()
                    rows += compute(batch, self.done + len(rows))
                    pace = (time.monotonic() - began) / len(singles)
                    for single in singles:
                        self.stream.record(single)
                        self._skipped.update(single["skipped"])
                    bar.update(len(singles))
                    if len(rows) == shard_size:
                        self._write(rows, features, started)
                        rows = []
            if rows:
                self._write(rows, features, started)

    def _write(self, rows: list[dict[str, Any]], features: Features | None, started: float) -> None:
        self.done += len(rows)
        note = {
            "settings": self.settings,
            "stream": self.stream.state_dict(),
            "clips": self.done,
            "skipped": dict(self._skipped),
            "seconds": round(time.monotonic() - started, 1),
        }
        self.kind.write(self.kind.path(self.folder, self.rank, self.number), rows, features, note)
        self.number += 1


def _join(values: list) -> torch.Tensor | list:
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else [entry for value in values for entry in value]
