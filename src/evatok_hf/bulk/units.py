"""The division of a source for bulk tokenizing: units, each a lane of the output, and tasks, which a worker does.

Units depend on the source and the options alone, so the shards of a unit are the same whoever makes them. Tasks are
parts of a unit, as small as there are workers; what comes of them is put in order again, so they leave no trace in the
shards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.clip_sources import Source, listed
from ..data.shard_folder import ShardFolder
from ..video.source_files import Example, file_states, printable

# Of whole videos, whose clips nobody has counted yet: ten seconds at 25 frames a second.
CLIPS_OF_A_WHOLE_VIDEO = 16
_TASKS_A_WORKER, _VIDEOS_A_TASK = 16, 64


@dataclass(frozen=True)
class Task:
    """A part of a unit.

    Attributes:
        unit: number of its unit.
        number: which of the unit's tasks it is.
        examples: its videos, by path or address; None where only the source's stream has them.
    """

    unit: int
    number: int
    examples: tuple[Example, ...] | None


@dataclass(frozen=True)
class Chunk:
    """Some clips of a task, one after another, and then their rows.

    Attributes:
        unit, task: which task.
        number: which of the task's chunks it is.
        last: whether it is the task's last one.
        clips: as of `collate`, but an array of pixels; empty where there are none.
        rows: of a shard.
        skipped: the task's videos that were skipped, with the last chunk.
    """

    unit: int
    task: int
    number: int
    last: bool
    clips: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


class Assembly:
    """Puts chunks that come in any order into the shards of their units, each once."""

    def __init__(self, shards: ShardFolder):
        self.shards = shards
        self._tasks: dict[int, list[int]] = {}  # of the units under way, those that are not complete
        self._next: dict[int, int] = {}  # chunk of the first of them
        self._early: dict[tuple[int, int, int], Chunk] = {}

    def expect(self, tasks: Sequence[Task]) -> None:
        """Names the tasks that each unit will come from; whatever had come of them is forgotten."""
        self._tasks, self._next, self._early = {}, {}, {}
        for task in tasks:
            self._tasks.setdefault(task.unit, []).append(task.number)
            self._next[task.unit] = 0
        self.shards.begin(list(self._tasks))

    def take(self, chunk: Chunk) -> None:
        """Takes in a chunk with rows and writes what is complete. Raises ValueError where that is not possible."""
        tasks, unit = self._tasks.get(chunk.unit, []), chunk.unit
        # Ray gives each chunk once, also where it did a task again; that nothing comes twice does not hang on it.
        if not tasks or (chunk.task, chunk.number) < (tasks[0], self._next[unit]):
            return
        self._early[unit, chunk.task, chunk.number] = chunk
        while tasks and (came := self._early.pop((unit, tasks[0], self._next[unit]), None)):
            self._next[unit] += 1
            if came.last:
                tasks.pop(0)
                self._next[unit] = 0
            self.shards.add(unit, came.rows, came.skipped, last=not tasks)


class Units:
    """All units of a source.

    Videos that have paths or addresses are listed and counted off; those inside tars and Parquet files come in units of
    one such file, which is read from its beginning to its end.

    Args:
        source: of the videos.
        shard_size: clips of a shard.
        clips_per_video: that will be cut; None for all of them.

    Attributes:
        count: how many units.
        videos: how many videos, None where they would have to be read to be counted.
        digest: differs where the source has other videos, or in another order.
        state: differs where a video or a tar on this machine has changed; see `file_states`.

    Raises:
        ValueError: a source without videos.
    """

    def __init__(self, source: Source, shard_size: int, clips_per_video: int | None):
        self.source = source
        self.videos: int | None = None
        self._examples = listed(source)
        self.state = file_states(source.tars if self._examples is None else [one.video for one in self._examples])
        digest = hashlib.sha256()
        if self._examples is not None:
            self._size = max(1, shard_size // (clips_per_video or CLIPS_OF_A_WHOLE_VIDEO))
            self.videos = len(self._examples)
            self.count = -(-self.videos // self._size)
            for example in self._examples:
                digest.update(f"{example.key}\0{example.label}\n".encode())
        else:
            self.count = source.num_shards
            digest.update(f"{self.count}\n".encode())
            for tar in source.tars:
                if "://" not in tar:
                    digest.update(f"{printable(os.path.basename(tar))}\0{os.path.getsize(tar)}\n".encode())
        self.digest = digest.hexdigest()[:16]

    def tasks(self, done: set[int], workers: int) -> list[Task]:
        """The tasks of all units but those that are done, unit after unit."""
        left = [unit for unit in range(self.count) if unit not in done]
        if self._examples is None:
            return [Task(unit, 0, None) for unit in left]
        videos = min(len(left) * self._size, len(self._examples))
        size = max(1, min(videos // (workers * _TASKS_A_WORKER), _VIDEOS_A_TASK))
        tasks = []
        for unit in left:
            examples = self._examples[unit * self._size : (unit + 1) * self._size]
            for number, start in enumerate(range(0, len(examples), size)):
                tasks.append(Task(unit, number, tuple(examples[start : start + size])))
        return tasks
