"""How a source is divided for bulk tokenizing: units, whose clips make whole shards, and tasks, which a worker does.

Units depend on the source and the options alone, so the shards of a unit are the same whoever makes them. Tasks are
parts of a unit, as small as there are workers; the rows of a unit are put together again in order, so they leave no
trace in the shards.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..video.source_files import Example, file_states, printable

if TYPE_CHECKING:
    from ..data.clip_sources import Source

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
        listed: whether tasks list their videos.
        digest: differs where the source has other videos, or in another order.
        state: differs where a video or a tar on this machine has changed; see `file_states`.

    Raises:
        ValueError: a source without videos.
    """

    def __init__(self, source: Source, shard_size: int, clips_per_video: int | None):
        self.source = source
        first = next(source.examples(None, 0, 0, 0, 1), None)
        if first is None:
            raise ValueError(f"{source.name} holds no video.")
        digest = hashlib.sha256()
        if isinstance(first.video, str):
            self._examples: list[Example] | None = list(source.examples(None, 0, 0, 0, 1))
            self._size = max(1, shard_size // (clips_per_video or CLIPS_OF_A_WHOLE_VIDEO))
            self.videos: int | None = len(self._examples)
            self.count = -(-self.videos // self._size)
            self.state = file_states(example.video for example in self._examples)
            for example in self._examples:
                digest.update(f"{example.key}\0{example.label}\n".encode())
        else:
            self._examples, self.videos, self.count = None, None, source.dataset.num_shards
            self.state = file_states(source.tars)
            digest.update(f"{self.count}\n".encode())
            for tar in source.tars:
                if "://" not in tar:
                    digest.update(f"{printable(os.path.basename(tar))}\0{os.path.getsize(tar)}\n".encode())
        self.listed = self._examples is not None
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


def absolute(source: str) -> str:
    """A path by its whole name, since workers run in folders of their own; an id of the Hub as it is."""
    local = Path(source).expanduser()
    return str(local.absolute()) if glob.has_magic(source) or local.exists() else source


def read_unit(source: Source, unit: int, units: int) -> Iterator[Example]:
    """The videos of a unit that is a file of the source."""
    return source.examples(None, 0, 0, unit, units)
