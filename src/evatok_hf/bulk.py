"""Tokens of many videos, by Ray Data: on the cores or GPUs of one machine, or on a cluster.

    lists of videos -> clips (tasks on CPUs) -> rows (a pool of actors that keep the model) -> shards (the driver)

Where the two steps in the middle ask for the same resources, as without a GPU, Ray Data makes one of them, and the
actors decode, too. A worker that is lost is replaced and its task done again; that is Ray's.

Why the driver writes, and no `Datasink` or last `map_batches` step. A shard holds the rows of one unit of the source,
so that its name and its bytes do not depend on who did what when, and a run can go on after its last whole shard. A
`Datasink` is given blocks as they happen to be cut and joined, of several units or of a part of one, and commits when
all of them are there. A step that writes sees no whole unit either, unless all clips of a unit go through one worker.
Rows are small, a kilobyte or two a clip, so the driver can put units together from whatever comes first, and only the
driver has to reach the output. It also sees to it that no row is taken twice.
"""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bulk_cluster import Pool, connected
from .bulk_shards import SKIPPED, UnitShards, holds_tokens
from .bulk_units import Task, Units, absolute
from .bulk_workers import Decoder, Encoder, Ledger, Views, WholeVideos, decode
from .clip_cutting import ClipConfig
from .clip_sources import open_source
from .clip_tokens import ClipTokens
from .data_cards import hub_ids, versions
from .source_files import printable
from .token_dataset import SUMMARY, features
from .tokens_card import finish

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features
    from ray.actor import ActorHandle
    from ray.data import Dataset

    from .cli_allocation import AllocationChoice
    from .video_tokenizer import VideoTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BulkOptions:
    """What clips are cut, how they are encoded and by whom.

    Args:
        split: of the source.
        views: "random" or "fixed", as of training/tokenize_dataset.py.
        whole_video: all clips of a video one after another in place of views.
        clips: how views are cut; num_frames and image_size are the model's. Of whole videos only the stride counts.
        seed: of the views.
        known_frames: also make the condition of frame prediction.
        batch_size: clips encoded at once.
        shard_size: clips of a shard.
        device: auto, cpu, cuda or mps.
        workers: actors that encode; by default one a GPU, or one for every `threads` CPUs.
        threads: of an actor on CPUs.
        address: of a Ray cluster; None starts Ray on this machine, unless RAY_ADDRESS names one.
        resume: go on in a folder that has tokens.
        licence, sources_note: of the data set card.
    """

    split: str = "train"
    views: str = "random"
    whole_video: bool = False
    clips: ClipConfig = ClipConfig(clips_per_video=4, random_position=False)
    seed: int = 0
    known_frames: int | None = None
    batch_size: int = 32
    shard_size: int = 1024
    device: str = "auto"
    workers: int | None = None
    threads: int = 1
    address: str | None = None
    resume: bool = True
    licence: str = "other"
    sources_note: str = ""

    def __post_init__(self) -> None:
        if self.views not in ("random", "fixed"):
            raise ValueError(f"views must be random or fixed, got {self.views!r}.")
        if self.whole_video and len(self.clips.strides) > 1:
            raise ValueError(f"whole videos have one stride, not {', '.join(map(str, self.clips.strides))}.")


@dataclass(frozen=True)
class Progress:
    """How far a run is: clips and videos that were skipped, of this and of earlier runs; about how many clips are
    `expected` in all, where that can be known before."""

    clips: int
    skipped: int
    expected: int | None


def tokenize_source(
    source: str,
    output: str | Path,
    tokenizer: VideoTokenizer,
    choice: AllocationChoice,
    options: BulkOptions,
    command: str,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """A data set of tokens of a folder of videos, of WebDataset tars or of a data set of the Hub.

    Args:
        source: as of `ClipStream`; the workers must be able to read it under this name.
        output: folder of the data set, on the driver's machine.
        tokenizer: on the CPU.
        choice: how lengths are chosen, of each clip by itself.
        options: the rest.
        command: for the card.
        report: called as shards grow.

    Returns:
        The contents of `tokens.json`.

    Raises:
        ValueError: a source without videos or that gives no clip, an output that is something else or was made with
            other options, options that the model or the cluster cannot serve; a worker that failed for another reason
            than being lost or than its videos. What is done is kept then.
    """
    folder = Path(output)
    videos = open_source(absolute(source), options.split)
    if not options.resume and holds_tokens(folder):
        raise ValueError(f"{folder} holds tokens; leave out --no-resume to go on, or choose another folder.")
    config = tokenizer.model.config
    clips = replace(options.clips, num_frames=config.num_frames, image_size=config.image_size)
    per_video = None if options.whole_video else clips.clips_per_video
    ClipTokens(tokenizer.model, tokenizer.allocation(choice.strategy, **choice.options), options.known_frames)
    units = Units(videos, options.shard_size, per_video)
    settings = make_settings(source, videos.classes, units, tokenizer, choice, replace(options, clips=clips))
    columns = features(config.num_blocks, videos.classes, options.known_frames is not None)
    shards = UnitShards(folder, settings, columns, options.shard_size)
    started = time.monotonic()
    counted = per_video is not None and units.videos is not None and options.views == "random"

    def tell() -> None:
        skipped = sum(map(len, shards.skipped.values()))
        report(Progress(shards.clips, skipped, (units.videos - skipped) * per_video if counted else None))

    tell()
    if len(shards.done) < units.count:
        with connected(options) as pool:
            shards.prepare(str(pool))
            job = _Job(units, tokenizer, choice, columns, replace(options, clips=clips), pool)
            for chunks in job.run(shards):
                shards.add(chunks, time.monotonic() - started)
                tell()
    elif (folder / SUMMARY).exists():
        return json.loads((folder / SUMMARY).read_text())
    if left := units.count - len(shards.done):
        raise ValueError(f"{left} of {units.count} units did not come back; repeat the command to go on.")
    skipped = shards.all_skipped()
    causes = Counter(video["cause"] for video in skipped)
    if not shards.clips:
        shards.discard()
        found = ", ".join(f"{count} {cause}" for cause, count in causes.items())
        raise ValueError(f"No video of {source} gave a clip ({found}), the first: {skipped[0]['reason']}")
    shards.write_skipped()
    facts = {
        "command": command,
        "machine": shards.machine,
        "versions": versions(),
        "datasets": hub_ids(source),
        "licence": options.licence,
        "sources_note": options.sources_note,
        "tokenizer": tokenizer.name,
        **{name: getattr(config, name) for name in ("codebook_size", "num_blocks", "num_frames", "image_size")},
        "block_lengths": list(config.block_lengths),
        "epochs": 1,
        "clips": shards.clips,
        "skipped_names": SKIPPED if skipped else None,
    }
    summary = finish(folder, settings, facts, causes, shards.seconds + time.monotonic() - started)
    shards.close()
    return summary


def make_settings(
    source: str,
    classes: tuple[str, ...],
    units: Units,
    tokenizer: VideoTokenizer,
    choice: AllocationChoice,
    options: BulkOptions,
) -> dict[str, Any]:
    """All that the shards depend on, as JSON keeps it, under the names of training/tokenize_dataset.py."""
    clips = options.clips
    return {
        "sources": [printable(source)],
        "weights": [1.0],
        "counted": "videos",
        "split": options.split,
        "whole_video": options.whole_video,
        "views": "whole" if options.whole_video else options.views,
        "clips_per_video": None if options.whole_video else clips.clips_per_video,
        "strides": list(clips.strides),
        "scale": list(clips.scale),
        "random_position": clips.random_position,
        "flip_probability": clips.flip_probability,
        "random_start": clips.random_start,
        "seed": options.seed,
        "known_frames": options.known_frames,
        "shard_size": options.shard_size,
        "source_digest": units.digest,
        "tokenizer_fingerprint": tokenizer.model.fingerprint(),
        **choice.describe(tokenizer),
        "classes": list(classes),
    }


class _Job:
    """The pipeline of Ray Data, built again without a video over which workers die."""

    def __init__(
        self,
        units: Units,
        tokenizer: VideoTokenizer,
        choice: AllocationChoice,
        columns: Features,
        options: BulkOptions,
        pool: Pool,
    ):
        import ray

        self._units, self._options, self._pool = units, options, pool
        # By reference, so that the weights are sent once to a machine and need be nowhere but here.
        self._model = ray.put(tokenizer)
        self._encoder = {
            "tokenizer": [self._model],
            "strategy": choice.strategy,
            "options": choice.options,
            "known_frames": options.known_frames,
            "columns": columns,
            "whole": options.whole_video,
            "device": pool.device,
            "threads": pool.threads,
        }
        config = tokenizer.model.config
        self._views: Views | WholeVideos = Views(options.clips, options.views == "random", options.seed)
        if options.whole_video:
            self._views = WholeVideos(tokenizer.processor, config.num_frames, options.clips.strides[0])

    def run(self, shards: UnitShards) -> Iterator[pa.Table]:
        """The chunks of all units that are not done. Raises ValueError where a worker fails."""
        import ray

        deadly: frozenset[tuple[int, str]] = frozenset()
        while True:
            tasks = self._units.tasks(shards.done, self._pool.workers)
            shards.expect(tasks)
            ledger = ray.remote(Ledger).options(num_cpus=0).remote()
            try:
                yield from self._dataset(tasks, ledger, deadly).iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=2
                )
                return
            except Exception as error:  # of Ray or of a worker; what goes wrong with the chunks is raised elsewhere
                found = _deadly_videos(ledger)
                if found <= deadly:
                    raise ValueError(_explain(error)) from error
                logger.warning("going on without %s, over which workers die", sorted(found - deadly))
                deadly |= found
            finally:
                ray.kill(ledger)

    def _dataset(self, tasks: list[Task], ledger: ActorHandle, deadly: frozenset[tuple[int, str]]) -> Dataset:
        import ray

        listed = all(task.examples is not None for task in tasks)
        source = None if listed else self._units.source
        decoder = Decoder(source, self._units.count, self._views, self._options.batch_size, ledger, deadly)
        rows = ray.data.from_items([{"task": pickle.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
        clips = rows.map_batches(
            decode,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"decoder": decoder},
            num_cpus=self._pool.decode_cpus,
        )
        return clips.map_batches(
            Encoder,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs=self._encoder,
            compute=ray.data.ActorPoolStrategy(size=self._pool.workers),
            **self._pool.resources,
        )


def _deadly_videos(ledger: ActorHandle) -> frozenset[tuple[int, str]]:
    import ray

    try:
        return frozenset(ray.get(ledger.deadly.remote(), timeout=60))
    except ray.exceptions.RayError:  # it is gone with its cluster
        return frozenset()


def _explain(error: BaseException) -> str:
    """What went wrong in a worker, in a line."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    reason = str(error).strip().splitlines()
    return (
        f"a worker failed ({type(error).__name__}: {reason[-1] if reason else 'no reason given'}); what is done is "
        "kept, repeat the command to go on."
    )
