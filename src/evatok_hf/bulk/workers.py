"""What makes tokens of videos in bulk: a task to clips, and clips to rows of a shard.

Both steps pass on Arrow tables with a row for each chunk of clips; chunks of a task are numbered, and its last one says
so and names the videos that were skipped. `loop` does them one after another in this process; `bulk.ray_data` has many
workers do them.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from ..allocation.strategies import Allocation
from ..data.clip_cutting import ClipConfig, ClipCutter, Unusable, fetch, reading
from ..data.token_dataset import make_rows, to_table
from ..hub.network import is_of_the_network, is_transient
from ..models.checkpoint_evatok import again
from ..models.video_processing_evatok import EvatokVideoProcessor
from ..tokenize.ahead import ahead
from ..tokenize.clip_tokens import ClipTokens
from ..tokenize.streams import ClipFeed, VideoClip, frames_at_once
from ..video.read import VideoReader, open_video
from ..video.source_files import Example
from .units import Task, read_unit

if TYPE_CHECKING:
    from ..data.clip_sources import Source
    from ..tokenize.video_tokenizer import VideoTokenizer

_WHERE = [("unit", pa.int32()), ("task", pa.int32()), ("chunk", pa.int32()), ("last", pa.bool_())]
_CLIPS = pa.schema([*_WHERE, ("clips", pa.large_binary()), ("pixels", pa.large_binary()), ("skipped", pa.string())])
_ROWS = pa.schema([*_WHERE, ("rows", pa.large_binary()), ("skipped", pa.string())])


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
        with reading(), open_video(example.video) as video:
            rate = self.processor.fps or video.fps
            shown = video.sampled(self.processor.fps, self.stride)
            side = min(video.height, video.width)
            crop = [(video.height - side) // 2, (video.width - side) // 2, side, 0]
            for clip in self._clips(video):
                frames = list(islice(shown, clip.num_frames))
                yield {
                    "pixel_values_videos": clip.pixel_values_videos[0],
                    "label": example.label,
                    "source": example.key,
                    "frames": frames + frames[-1:] * (self.num_frames - clip.num_frames),
                    "crop": crop,
                    "fps": float(rate),
                }

    def _clips(self, video: VideoReader) -> Iterator[VideoClip]:
        feed = ClipFeed(self.processor, self.num_frames)
        step = frames_at_once(self.num_frames, video.height * video.width)
        for chunk in video.iter_chunks(step, self.processor.fps, self.stride):
            yield from feed.push(chunk)
        yield from feed.finish()


@dataclass(frozen=True)
class Decoder:
    """Tasks to clips.

    Args:
        source: where the videos of a task come from that does not list them; None where all do.
        units: how many the source has.
        views: what is cut out of a video.
        batch_size: clips of a chunk.
    """

    source: Source | None
    units: int
    views: Views | WholeVideos
    batch_size: int

    def run(
        self,
        task: Task,
        left_out: Mapping[tuple[int, str], str] = MappingProxyType({}),
        at: Callable[[str | None], None] = lambda key: None,
    ) -> Iterator[pa.Table]:
        """The chunks of a task, each a table of one row.

        Args:
            task: with its videos, unless the source has them.
            left_out: why a video is not to be read, by its unit and key.
            at: told the key of each video that is begun, and None after the last.

        Raises:
            OSError: an error of the network or of the machine, which is no video's fault.
        """
        held: list[dict[str, Any]] = []
        skipped: list[dict[str, Any]] = []
        chunks = count()
        for item in self._items(task, skipped, left_out, at):
            held.append(item)
            if len(held) == self.batch_size:
                yield _chunk(task, next(chunks), held)
                held = []
        yield _chunk(task, next(chunks), held, skipped, last=True)

    def _items(
        self,
        task: Task,
        skipped: list[dict[str, Any]],
        left_out: Mapping[tuple[int, str], str],
        at: Callable[[str | None], None],
    ) -> Iterator[dict[str, Any]]:
        for example in self._examples(task):
            if reason := left_out.get((task.unit, example.key)):
                skipped.append(_skip(example.key, "unreadable", reason, 0))
                continue
            at(example.key)
            kept = 0
            try:
                for item in self._cut(example):
                    kept += 1
                    yield item
            except Unusable as error:
                skipped.append(_skip(example.key, error.cause, str(error), kept))
        at(None)

    def _examples(self, task: Task) -> Iterator[Example]:
        if task.examples is not None:
            return iter(task.examples)
        return read_unit(self.source, task.unit, self.units)

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


def _skip(key: str, cause: str, reason: str, clips: int) -> dict[str, Any]:
    return {"source": key, "cause": cause, "reason": " ".join(reason.split()), "clips": clips}


def _chunk(
    task: Task,
    number: int,
    items: list[dict[str, Any]],
    skipped: list[dict[str, Any]] | None = None,
    last: bool = False,
) -> pa.Table:
    pixels = b""
    if items:
        pixels = torch.stack([item.pop("pixel_values_videos") for item in items]).numpy().tobytes()
    where = [[task.unit], [task.number], [number], [last]]
    values = [*where, [pickle.dumps(items)], [pixels], [json.dumps(skipped or [])]]
    return pa.table([pa.array(*pair) for pair in zip(values, _CLIPS.types, strict=True)], schema=_CLIPS)


class Encoder:
    """Clips to rows of a shard; called with chunks of `Decoder.run`, gives them with rows in place of clips.

    Args:
        tokenizer: is moved to the device.
        allocation: how lengths are chosen.
        known_frames: see `ClipTokens`.
        schema: of a shard.
        whole: of `WholeVideos` rather than of `Views`.
        device: where to compute.
        threads: of PyTorch, where that is a CPU.
    """

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        allocation: Allocation,
        known_frames: int | None,
        schema: pa.Schema,
        whole: bool,
        device: str,
        threads: int,
    ):
        torch.set_num_threads(threads)
        tokenizer.model.to(device)
        if tokenizer.router is not None:
            tokenizer.router.to(device)
        self._encode = ClipTokens(allocation.bind(tokenizer.model, tokenizer.router), known_frames)
        self._schema, self._whole, config = schema, whole, tokenizer.model.config
        self._shape = (config.num_frames, 3, config.image_size, config.image_size)

    def __call__(self, chunks: pa.Table) -> pa.Table:
        rows = []
        for clips, pixels in zip(chunks["clips"], chunks["pixels"], strict=True):
            items = pickle.loads(clips.as_buffer())
            rows.append(_to_bytes(self._rows(items, pixels.as_buffer())))
        columns = [chunks[name].combine_chunks() for name in ("unit", "task", "chunk", "last")]
        columns += [pa.array(rows, pa.large_binary()), chunks["skipped"].combine_chunks()]
        return pa.table(columns, schema=_ROWS)

    def _rows(self, items: list[dict[str, Any]], pixels: pa.Buffer) -> pa.Table:
        if not items:
            return to_table([], self._schema)
        values = np.frombuffer(pixels, np.float32 if self._whole else np.uint8).copy()
        video = torch.from_numpy(values).view(len(items), *self._shape)  # (B, F, 3, S, S)
        batch: dict[str, Any] = {name: [item[name] for item in items] for name in ("source", "label", "crop", "fps")}
        batch |= {"crop": torch.tensor(batch["crop"]), "origin": [0] * len(items)}
        batch["frames"] = torch.tensor([item["frames"] for item in items])
        return to_table(make_rows(batch, self._encode(video)), self._schema)


def loop(tasks: Sequence[Task], decoder: Decoder, encoder: dict[str, Any]) -> Iterator[pa.Table]:
    """The chunks of tasks, made one after another in this process, where another thread reads the videos meanwhile.

    `encoder` are the arguments of `Encoder`.
    """
    threads = torch.get_num_threads()
    try:
        encode = Encoder(**encoder)
        with closing(ahead(clips for task in tasks for clips in decoder.run(task))) as chunks:
            yield from map(encode, chunks)
    finally:
        torch.set_num_threads(threads)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
