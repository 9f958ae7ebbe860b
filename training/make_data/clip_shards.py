"""Runs that turn the clips of a stream into rows, shard after shard, and go on exactly where they were killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from evatok_hf.data.clip_cutting import Unusable
from evatok_hf.data.clip_sources import Example
from evatok_hf.data.shard_folder import ShardFolder
from evatok_hf.data.streaming import ClipStream, merge


class CountedStream(ClipStream):
    """Items say what was skipped on the way to them: loader processes read ahead, and what they met there comes again
    in a run that goes on, so that only the skips before finished clips may count. The last item of a pass also has
    what was skipped after it."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._passed: list[dict[str, Any]] = []
        held: dict[str, Any] | None = None
        for item in super().__iter__():
            if held is not None:
                yield held
            held, self._passed = {**item, "skipped": self._passed}, []
        if held is not None:
            yield {**held, "skipped": held["skipped"] + self._passed}

    def _skip(self, example: Example, error: Unusable, clips: int) -> None:
        super()._skip(example, error, clips)
        self._passed.append(error.describe(example, clips))


def read(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches; a ValueError of a loader process, which brings its whole traceback, as that of this process."""
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).rstrip().rsplit("\nValueError: ", 1)[-1]) from None


class ShardRun:
    """One process's lane of a folder, from its last shard on; the stream is put right after it.

    Args:
        shards: of this process.
        rank: which process this is.
        stream: where the clips come from.

    Attributes:
        done: clips of this process.
    """

    def __init__(self, shards: ShardFolder, rank: int, stream: CountedStream):
        self.shards, self.rank, self.stream = shards, rank, stream
        self.done = shards.clips
        if rank in shards.lanes:
            stream.load_state_dict(shards.lanes[rank].place)

    def share(self, clips: int, processes: int) -> int:
        """How many of all clips this process takes. Raises ValueError if it has more already."""
        mine = clips // processes + (self.rank < clips % processes)
        if self.done > mine:
            raise ValueError(
                f"{self.shards.folder} holds more than {clips} clips already; ask for as many, or for more."
            )
        return mine

    def fill(
        self,
        passes: Iterable[Iterator[dict[str, Any]]],
        compute: Callable[[dict[str, Any], int], list[dict[str, Any]]],
        batch_size: int,
        total: int | None = None,
        expected: int | None = None,
        until: float | None = None,
    ) -> None:
        """Shard after shard, until this process has `total` clips or the passes are at their end.

        Args:
            passes: batches of one clip of `collate`, so that the stream's state after a shard is that after a batch; a
                pass may put the stream to its start, since all clips of the one before were noted.
            compute: (batch, number of its first clip) -> a row a clip.
            batch_size: clips that `compute` is given at most.
            total: clips of this process in all.
            expected: how many clips the progress bar announces where there is no total.
            until: of `time.monotonic`, after which no further clips are taken.
        """
        goal, pace = total if total is not None else expected, 0.0
        with tqdm(total=goal, initial=self.done, unit="clip", desc=f"process {self.rank}", position=self.rank) as bar:
            for items in passes:
                while True:
                    room = min(batch_size, self.shards.room(self.rank))
                    if total is not None:
                        room = min(room, total - self.done)
                    if until is not None:
                        fits = int((until - time.monotonic()) / pace) if pace else 1
                        if fits < 1 and self.done > 0:
                            return self.shards.flush(self.rank, self.stream.state_dict())
                        room = min(room, max(1, fits))
                    if not (singles := list(islice(items, room))):
                        break
                    batch, began = merge(singles), time.monotonic()
                    rows = compute(batch, self.done)
                    pace = (time.monotonic() - began) / len(singles)
                    for single in singles:
                        self.stream.record(single)
                    self.shards.add(self.rank, rows, batch["skipped"], self.stream.state_dict())
                    self.done += len(rows)
                    bar.update(len(rows))
        self.shards.flush(self.rank, self.stream.state_dict())
