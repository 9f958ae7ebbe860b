"""What tests of bulk tokenizing share: runs on a small cluster, and the same by hand, in any order."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
from token_samples import SIZE

from evatok_hf import VideoTokenizer
from evatok_hf.allocation import Allocation
from evatok_hf.bulk.engine import BulkOptions, make_settings, make_work, tokenize_source
from evatok_hf.bulk.units import Assembly, Chunk, Units
from evatok_hf.bulk.workers import loop
from evatok_hf.data.clip_cutting import ClipConfig
from evatok_hf.data.clip_sources import open_source
from evatok_hf.data.shard_folder import ShardFolder
from evatok_hf.data.token_dataset import SHARDS, features

CLIPS = ClipConfig(4, SIZE, strides=(1, 2), scale=(0.5, 1.0), random_position=False, clips_per_video=2)
ROUTER = Allocation()


def run_bulk(
    output: Path,
    source: Path,
    checkpoint: Path,
    report=lambda progress: None,
    words: list[str] | None = None,
    **options,
) -> dict:
    """A run on the cluster of the tests, where there is one; what it has to say comes into `words`."""
    words = [] if words is None else words
    given = {"clips": CLIPS, "shard_size": 4, "known_frames": 2, **options}
    tokenizer = VideoTokenizer.from_pretrained(checkpoint)
    return tokenize_source(
        str(source), output, lambda: tokenizer, ROUTER, BulkOptions(**given), "a test", report, words.append
    )


def chunks_by_hand(
    source: str, checkpoint: Path, workers: int, batch_size: int, options: BulkOptions, output: Path
) -> tuple[list[Chunk], Assembly]:
    """All chunks of a source, and the folder that they have not come to yet."""
    tokenizer = VideoTokenizer.from_pretrained(checkpoint)
    config, videos = tokenizer.model.config, open_source(source, options.split)
    units = Units(videos, options.shard_size, None if options.whole_video else options.clips.clips_per_video)
    columns = features(config.num_blocks, videos.classes, options.known_frames is not None)
    settings = make_settings(source, units, tokenizer, ROUTER, options)
    assembly = Assembly(units, ShardFolder(SHARDS, output, settings, columns, options.shard_size))
    decoder, encoder = make_work(units, tokenizer, ROUTER, replace(options, batch_size=batch_size))
    return list(loop(assembly.tasks(workers), decoder, partial(encoder, "cpu", 1))), assembly


def by_hand(
    output: Path, source: object, checkpoint: Path, workers: int = 1, batch_size: int = 32, shuffle: int = 0, **options
) -> ShardFolder:
    """What a run writes, its chunks in a random order and some of them twice."""
    given = BulkOptions(**{"clips": CLIPS, "shard_size": 4, "known_frames": 2, **options})
    chunks, assembly = chunks_by_hand(str(source), checkpoint, workers, batch_size, given, output)
    order = random.Random(shuffle)
    order.shuffle(chunks)
    for chunk in [*chunks, *order.sample(chunks, len(chunks) // 2)]:
        assembly.take(chunk)
    assert assembly.shards.clips == sum(len(chunk.rows) for chunk in chunks)
    return assembly.shards


def workers_of_ray() -> list[psutil.Process]:
    """The processes of this machine's actors that encode, those below this process."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "MapWorker" in _name(process)]


def kill_a_worker() -> int:
    """Kills one as a machine that is lost would."""
    process = workers_of_ray()[0]
    os.kill(process.pid, signal.SIGKILL)
    return process.pid


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
