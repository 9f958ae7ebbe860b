"""Work that goes on meanwhile: videos read in another thread, clips on their way to an accelerator."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_END = object()


def ahead(items: Generator[T], count: int = 2) -> Generator[T]:
    """The items of a generator, made in another thread up to `count` ahead; its errors come in their turn."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, items, _END) for _ in range(count))
        try:
            while (item := coming.popleft().result()) is not _END:
                coming.append(thread.submit(next, items, _END))
                yield item
                del item  # while the next one is waited for
        finally:
            thread.shutdown(cancel_futures=True)
            items.close()


def to_device(clips: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Clips on a device; to a GPU from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and clips.device.type == "cpu":
        clips = clips.pin_memory()
    return clips.to(device, non_blocking=True)
