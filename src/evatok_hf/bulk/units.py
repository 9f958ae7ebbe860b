"""The division of a source for bulk tokenizing: units, each a lane of the output, and tasks, which a worker does.

Units depend on the source and the options alone, so the shards of a unit are the same whoever makes them. Tasks are
parts of a unit, as small as there are workers; what comes of them is put in order again, so they leave no trace in the
shards.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..data.clip_sources import Source, listed
from ..data.shard_folder import Lane, ShardFolder
from ..video.source_files import Example, file_states, printable

# Of whole videos, whose clips nobody has counted yet: ten seconds at 25 frames a second.
CLIPS_OF_A_WHOLE_VIDEO = 16
_TASKS_A_WORKER, _VIDEOS_A_TASK = 16, 64


@dataclass(frozen=True)
class Task:
    """A part of a unit, one of several that are numbered."""

    unit: int
    number: int
    examples: tuple[Example, ...] | None  # by path or address; None where only the source's stream has them


@dataclass(frozen=True)
class Chunk:
    """Some clips of a task, one after another, and then their rows; with the last ones, what the task skipped."""

    unit: int
    task: int
    number: int
    last: bool
    clips: dict[str, Any] = field(default_factory=dict)  # as of `collate`, but an array of pixels; empty without any
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


class Assembly:
    """Puts chunks that come in any order into the shards of their units, each once."""

    def __init__(self, units: Units, shards: ShardFolder):
        self.shards, self._units = shards, units

    def tasks(self, workers: int) -> list[Task]:
        """The tasks of all units that are not complete, whose chunks come next; what had come of them is forgotten."""
        tasks = self._units.tasks(self.shards.done, workers)
        self._count = Counter(task.unit for task in tasks)
        self._next = dict.fromkeys(self._count, (0, 0))  # of each unit: task, and number of its chunk
        self._early: dict[tuple[int, int, int], Chunk] = {}
        self.shards.lanes |= {unit: Lane() for unit in self._count}
        return tasks

    def take(self, chunk: Chunk) -> None:
        """Takes in a chunk with rows and writes what is complete. Raises ValueError where that is not possible."""
        unit = chunk.unit
        # Ray gives each chunk once, also where it did a task again; that nothing comes twice does not hang on it.
        if (chunk.task, chunk.number) < self._next[unit]:
            return
        self._early[unit, chunk.task, chunk.number] = chunk
        while came := self._early.pop((unit, *self._next[unit]), None):
            self._next[unit] = (came.task + 1, 0) if came.last else (came.task, came.number + 1)
            self.shards.add(unit, came.rows, came.skipped, last=self._next[unit] == (self._count[unit], 0))


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
        examples: the videos, None where they would have to be read to be known.
        digest: differs where the source has other videos, or in another order.
        state: differs where a video or a tar on this machine has changed; see `file_states`.

    Raises:
        ValueError: a source without videos.
    """

    def __init__(self, source: Source, shard_size: int, clips_per_video: int | None):
        self.source, self.examples = source, listed(source)
        if self.examples is not None:
            self._size = max(1, shard_size // (clips_per_video or CLIPS_OF_A_WHOLE_VIDEO))
            self.count = -(-len(self.examples) // self._size)
            said = [f"{example.key}\0{example.label}\n" for example in self.examples]
            self.state = file_states(example.video for example in self.examples)
        else:
            self.count = source.num_shards
            tars = [tar for tar in source.tars if "://" not in tar]
            said = [f"{self.count}\n"]
            said += [f"{printable(os.path.basename(tar))}\0{os.path.getsize(tar)}\n" for tar in tars]
            self.state = file_states(tars)
        self.digest = hashlib.sha256("".join(said).encode()).hexdigest()[:16]

    def tasks(self, done: set[int], workers: int) -> list[Task]:
        """The tasks of all units but those that are done, unit after unit."""
        left = [unit for unit in range(self.count) if unit not in done]
        if self.examples is None:
            return [Task(unit, 0, None) for unit in left]
        videos = min(len(left) * self._size, len(self.examples))
        size = max(1, min(videos // (workers * _TASKS_A_WORKER), _VIDEOS_A_TASK))
        tasks = []
        for unit in left:
            examples = self.examples[unit * self._size : (unit + 1) * self._size]
            for number, start in enumerate(range(0, len(examples), size)):
                tasks.append(Task(unit, number, tuple(examples[start : start + size])))
        return tasks
