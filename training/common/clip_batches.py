"""Batches of a stream of clips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from evatok_hf.data.streaming import ClipStream, collate, merge


class ClipBatches:
    """Batches of a stream, of which each loader process gives an equal part.

    So the clips of a step only depend on how many loader processes there are in all training processes together. The
    stream already gives every process its own videos; accelerate has no part in it.

    Args:
        stream: of this process's clips.
        batch_size: clips of this process at once, a multiple of the loader processes.
        num_workers: loader processes; 0 loads in this one.
    """

    def __init__(self, stream: ClipStream, batch_size: int, num_workers: int):
        self.stream, self.readers = stream, max(1, num_workers)
        self._loader = DataLoader(stream, batch_size // self.readers, num_workers=num_workers, collate_fn=collate)
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._parts: list[dict[str, Any]] = []

    def take(self) -> dict[str, Any]:
        """The next batch. The first begins where the stream is then, which may be after a checkpoint."""
        if self._iterator is None:
            self._iterator = iter(self._loader)
        self._parts = [next(self._iterator) for _ in range(self.readers)]
        return merge(self._parts)

    def record(self) -> None:
        """Tells the stream that the last batch was trained on, so that a checkpoint goes on after it."""
        for part in self._parts:
            self.stream.record(part)
