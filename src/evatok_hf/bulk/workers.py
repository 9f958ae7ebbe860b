"""The two steps of tokenizing in bulk: a task to clips, and clips to rows of a shard.

Both pass on chunks of clips. `loop` does them one after another in this process; `bulk.ray_data` has many workers
do them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch

from ..allocation.strategies import Allocation
from ..data.clip_cutting import ClipConfig, ClipCutter, Unusable, fetch, reading
from ..data.decoded import DecodedVideo
from ..data.streaming import collate
from ..data.token_dataset import make_rows
from ..hub.network import is_of_the_network, is_transient
from ..models.checkpoint_evatok import again
from ..models.video_processing_evatok import EvatokVideoProcessor
from ..tokenize.ahead import ahead
from ..tokenize.clip_tokens import ClipTokens
from ..tokenize.memory import open_any
from ..tokenize.streams import ClipFeed
from ..video.source_files import Example
from .ray_data import DEATHS
from .units import Chunk, Task

if TYPE_CHECKING:
    from ..data.clip_sources import Source
    from ..tokenize.video_tokenizer import VideoTokenizer


@dataclass(frozen=True)
class Views:
    """Clips cut out of videos as for training; see `ClipConfig`."""

    config: ClipConfig
    training: bool
    seed: int

    def cut(self, example: Example) -> Iterator[dict[str, Any]]:
        """The clips of a video as items of a `ClipStream`, uint8. Raises `Unusable`."""
        with ClipCutter(example, self.config, self.training) as video:
            for number in range(video.count):
                yield video.cut(number, [self.seed, 0, 0])  # of source 0, in epoch 0


@dataclass(frozen=True)
class WholeVideos:
    """All clips of videos, one after another, as `VideoTokenizer.encode` makes them."""

    processor: EvatokVideoProcessor
    num_frames: int
    stride: int

    def cut(self, example: Example) -> Iterator[dict[str, Any]]:
        """The clips of a video as items of a `ClipStream`, but float32 in [-1, 1]. Raises `Unusable`."""
        held = isinstance(example.video, DecodedVideo)
        source, fps = (example.video.frames, example.video.fps) if held else (example.video, None)
        with reading(), open_any(source, fps) as video:
            rate = self.processor.fps or video.fps
            shown = video.sampled(self.processor.fps, self.stride)
            side = min(video.height, video.width)
            crop = [(video.height - side) // 2, (video.width - side) // 2, side, 0]
            for clip in ClipFeed(self.processor, self.num_frames).read(video, stride=self.stride):
                frames = list(islice(shown, clip.num_frames))
                yield {
                    "pixel_values_videos": clip.pixel_values_videos[0],
                    "label": example.label,
                    "source": example.key,
                    "frames": frames + frames[-1:] * (self.num_frames - clip.num_frames),
                    "crop": crop,
                    "fps": float(rate),
                }


@dataclass(frozen=True)
class Decoder:
    """Tasks to clips, in chunks of `batch_size`."""

    source: Source | None  # where the videos of a task come from that does not list them
    units: int  # how many the source has
    views: Views | WholeVideos
    batch_size: int
    left_out: frozenset[tuple[int, str]] = frozenset()  # units and keys of videos over which workers died

    def run(self, task: Task, at: Callable[[str | None], None] = lambda key: None) -> Iterator[Chunk]:
        """The chunks of a task; `at` is told the key of each video that is begun, and None after the last.

        Raises:
            OSError: an error of the network or of the machine, which is no video's fault.
        """
        skipped: list[dict[str, Any]] = []
        items, chunks = self._items(task, skipped, at), count()
        while len(held := list(islice(items, self.batch_size))) == self.batch_size:
            yield Chunk(task.unit, task.number, next(chunks), False, _arrays(held))
        yield Chunk(task.unit, task.number, next(chunks), True, _arrays(held), skipped=skipped)

    def _items(
        self, task: Task, skipped: list[dict[str, Any]], at: Callable[[str | None], None]
    ) -> Iterator[dict[str, Any]]:
        examples = task.examples
        if examples is None:
            examples = self.source.examples(None, 0, 0, task.unit, self.units)
        for example in examples:
            kept = 0
            try:
                if (task.unit, example.key) in self.left_out:
                    reason = f"the worker process died {DEATHS} times while it read this video"
                    raise Unusable("unreadable", reason)
                at(example.key)
                for item in self._cut(example):
                    kept += 1
                    yield {**item, "origin": 0}
            except Unusable as error:
                skipped.append(error.describe(example, kept))
        at(None)

    def _cut(self, example: Example) -> Iterator[dict[str, Any]]:
        if isinstance(example.video, str) and "://" not in example.video and not os.path.exists(example.video):
            raise FileNotFoundError(
                f"{platform.node()} has no {example.video}; all machines must see the videos under the same path"
            )
        with reading():
            video = again(lambda: fetch(example), is_transient)
        try:
            yield from self.views.cut(replace(example, video=video))
        except Unusable:
            raise
        except Exception as error:
            # Wild videos find every hole in a decoder. But a full disk, or a Hub that does not answer, is not theirs.
            of_ffmpeg = type(error).__module__.partition(".")[0] == "av"
            if is_of_the_network(error) or (isinstance(error, OSError) and not of_ffmpeg):
                raise
            raise Unusable("unreadable", f"{type(error).__name__}: {error}") from error


def _arrays(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch whose pixels are an array, which is pickled faster than a tensor; empty without items."""
    batch = collate(items) if items else {}
    return {name: values.numpy() if name == "pixel_values_videos" else values for name, values in batch.items()}


class Encoder:
    """Chunks of `Decoder.run` to chunks with rows in place of clips, as `ClipTokens` makes them; moves the tokenizer to
    the device."""

    def __init__(
        self, tokenizer: VideoTokenizer, allocation: Allocation, known_frames: int | None, device: str, threads: int
    ):
        torch.set_num_threads(threads)
        tokenizer.model.to(device)
        if tokenizer.router is not None:
            tokenizer.router.to(device)
        self._encode = ClipTokens(allocation.bind(tokenizer.model, tokenizer.router), known_frames)

    def __call__(self, chunk: Chunk) -> Chunk:
        if not chunk.clips:
            return chunk
        tokens = self._encode(torch.from_numpy(chunk.clips["pixel_values_videos"]))  # (B, F, 3, S, S)
        return replace(chunk, clips={}, rows=make_rows(chunk.clips, tokens))


def loop(tasks: Sequence[Task], decoder: Decoder, encoder: Callable[[], Encoder]) -> Iterator[Chunk]:
    """The chunks of tasks, made one after another in this process, where another thread reads the videos meanwhile."""
    threads = torch.get_num_threads()
    try:
        encode = encoder()
        with closing(ahead(clips for task in tasks for clips in decoder.run(task))) as chunks:
            yield from map(encode, chunks)
    finally:
        torch.set_num_threads(threads)
