"""Tokens of many videos: on the cores or GPUs of one machine or of a cluster, by Ray, or in this process.

    lists of videos -> clips -> rows -> shards

The two steps in the middle are `bulk.workers`, done by Ray's workers (`bulk.ray_data`) or, where there is little to do,
one after another here. Lists and shards are the command's own.

Why the command writes, and no `Datasink` of Ray Data or last `map_batches` step. A shard holds the rows of one unit of
the source, so that its name and its bytes do not depend on who did what when, and a run can go on after its last whole
shard. A `Datasink` is given blocks as they happen to be cut and joined, of several units or of a part of one, and
commits when all of them are there. A step that writes sees no whole unit either, unless all clips of a unit go through
one worker. Rows are small, a kilobyte or two a clip, so the command can put units together from whatever comes first,
and only it has to reach the output. It also sees to it that no row is taken twice.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import pickle
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.clip_cutting import ClipConfig
from ..data.clip_sources import open_source
from ..data.shard_folder import ShardFolder, check_output
from ..data.token_dataset import SHARDS, SUMMARY, features, read_summary, shard_settings
from ..hub.tokens_card import finish
from ..models.files_evatok import prepare, write_text
from .cluster import Wanted
from .driver import RayLost, RayProcess
from .ray_data import Job
from .units import CLIPS_OF_A_WHOLE_VIDEO, Assembly, Chunk, Task, Units

if TYPE_CHECKING:
    from ..allocation.strategies import Allocation
    from ..tokenize.video_tokenizer import VideoTokenizer

# Up to so many are made in this process before Ray would have started.
FEW_CLIPS = 128
# So often Ray is started again with nothing done between.
_LOSSES = 3


@dataclass(frozen=True)
class BulkOptions:
    """Options of a run: the clips that are cut, how they are encoded and by whom.

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
        workers: of Ray, that encode; by default one a GPU, or one for every `threads` CPUs. Without a number, and
            without a cluster, a few clips are made in this process.
        threads: of a worker on CPUs.
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
    """The state of a run: clips and videos that were skipped, of this and of earlier runs; about how many clips are
    `expected` in all, where that can be known before; the file with what Ray says, where it is used."""

    clips: int
    skipped: int
    expected: int | None
    log: Path | None


def tokenize_source(
    source: str,
    output: str | Path,
    load: Callable[[], VideoTokenizer],
    allocation: Allocation,
    options: BulkOptions,
    command: str,
    report: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda word: None,
) -> dict[str, Any]:
    """A data set of tokens of a folder of videos, of WebDataset tars or of a data set of the Hub.

    Args:
        source: as of `ClipStream`; the workers must be able to read it under this name.
        output: folder of the data set, on the driver's machine.
        load: gives the tokenizer, on the CPU; called when Ray is on its way.
        allocation: how lengths are chosen, of each clip by itself.
        options: the rest.
        command: for the card.
        report: called as shards grow.
        say: called with what the user should know meanwhile.

    Returns:
        The contents of `tokens.json`. All that Ray says goes to OUTPUT.ray.log, beside the folder.

    Raises:
        ValueError: a source without videos or that gives no clip, an output that is something else or was made with
            other options, options that the model or the cluster cannot serve; a worker that failed for another reason
            than being lost or than its videos. What is done is kept then.
    """
    folder = Path(output)
    # A path by its whole name, since workers run in folders of their own; an id of the Hub as it is.
    local = Path(source).expanduser()
    here = glob.has_magic(source) or local.exists()
    videos = open_source(str(local.absolute()) if here else source, options.split)
    if not options.resume and SHARDS.begun(folder):
        raise ValueError(f"{folder} holds tokens; leave out --no-resume to go on, or choose another folder.")
    check_output(SHARDS, folder)
    per_video = None if options.whole_video else options.clips.clips_per_video
    units = Units(videos, options.shard_size, per_video)
    by_ray, finished = _uses_ray(units, per_video, options, say), (folder / SUMMARY).exists()
    log = folder.absolute().with_name(f"{folder.absolute().name}.ray.log")
    with ExitStack() as stack:

        def start_ray() -> RayProcess:
            prepare(log)
            write_text(log, "")
            return stack.enter_context(RayProcess(_wanted(options), log))

        ray = start_ray() if by_ray and not finished else None
        tokenizer = load()
        config = tokenizer.model.config
        clips = replace(options.clips, num_frames=config.num_frames, image_size=config.image_size)
        options = replace(options, clips=clips)
        work = _Work(units, tokenizer, allocation, options, say)
        columns = features(config.num_blocks, videos.classes, options.known_frames is not None)
        settings = make_settings(source, units, tokenizer, allocation, options)
        shards = ShardFolder(SHARDS, folder, settings, columns, options.shard_size)
        counted = per_video is not None and units.videos is not None and options.views == "random"

        def tell() -> None:
            skipped = shards.causes.total()
            expected = (units.videos - skipped) * per_video if counted else None
            report(Progress(shards.clips, skipped, expected, log if by_ray else None))

        tell()
        if len(shards.done) < units.count:
            assembly = Assembly(shards)
            for chunk in work.by_ray(assembly, ray or start_ray(), log) if by_ray else work.here(assembly):
                assembly.take(chunk)
                tell()
        elif finished:
            return read_summary(folder)
    if left := units.count - len(shards.done):
        raise ValueError(f"{left} of {units.count} units did not come back; repeat the command to go on.")
    if not shards.clips:
        found = ", ".join(f"{count} {cause}" for cause, count in shards.causes.items())
        first = shards.skipped[0]["reason"]
        shards.discard()
        raise ValueError(f"No video of {source} gave a clip ({found}), the first: {first}")
    facts = {"licence": options.licence, "sources_note": options.sources_note, "epochs": 1, "clips": shards.clips}
    return finish(shards, tokenizer, {"command": command, "machine": shards.machine, **facts})


def make_settings(
    source: str, units: Units, tokenizer: VideoTokenizer, allocation: Allocation, options: BulkOptions
) -> dict[str, Any]:
    """All that the shards depend on."""
    settings = shard_settings(
        [(source, 1.0)],
        "videos",
        options,
        options.clips,
        allocation.bind(tokenizer.model, tokenizer.router),
        units.source.classes,
    )
    whole = {"views": "whole", "clips_per_video": None} if options.whole_video else {}
    state = {"source_digest": units.digest, "source_state": units.state}
    return {**settings, "whole_video": options.whole_video, **whole, **state}


class _Work:
    """The tasks of a run, and who does them."""

    def __init__(
        self,
        units: Units,
        tokenizer: VideoTokenizer,
        allocation: Allocation,
        options: BulkOptions,
        say: Callable[[str], None],
    ):
        from ..tokenize.clip_tokens import ClipTokens
        from .workers import Decoder, Views, WholeVideos  # with transformers, which takes seconds

        ClipTokens(allocation.bind(tokenizer.model, tokenizer.router), options.known_frames)
        self._units, self._tokenizer, self._options, self._say = units, tokenizer, options, say
        config, clips = tokenizer.model.config, options.clips
        views: Views | WholeVideos = Views(clips, options.views == "random", options.seed)
        if options.whole_video:
            views = WholeVideos(tokenizer.processor, config.num_frames, clips.strides[0])
        # Tasks of a folder list their videos; of anything else the source is read where they are done.
        source = units.source if units.videos is None else None
        self._decoder = Decoder(source, units.count, views, options.batch_size)
        self._encoder = {"allocation": allocation, "known_frames": options.known_frames}

    def here(self, assembly: Assembly) -> Iterator[Chunk]:
        """The chunks of all units that are not done, made in this process."""
        from ..models.checkpoint_evatok import resolve_device
        from .workers import loop

        device = self._options.device
        if device == "auto":  # as Ray does, which knows no other kinds
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = str(resolve_device(device))
        what = f"{platform.machine()} CPU" if device == "cpu" else device
        assembly.shards.prepare(f"one process with {self._options.threads} thread(s) ({what})")
        given = {**self._encoder, "tokenizer": self._tokenizer, "device": device, "threads": self._options.threads}
        yield from loop(self._tasks(assembly, 1), self._decoder, given)

    def by_ray(self, assembly: Assembly, ray: RayProcess, log: Path) -> Iterator[Chunk]:
        """The same by Ray's workers. Ray is started again where it is lost. Raises ValueError where a worker fails, or
        Ray is lost again and again."""
        job = Job(pickle.dumps(self._tokenizer), pickle.dumps(self._encoder), pickle.dumps(self._decoder))
        losses, done = 0, len(assembly.shards.done)
        while True:
            try:
                with ray:
                    pool = ray.pool()
                    assembly.shards.prepare(str(pool))
                    tasks = partial(self._tasks, assembly, pool.workers)
                    yield from ray.chunks(job, tasks, self._leave_out)
                return
            except RayLost as error:
                losses = 1 if len(assembly.shards.done) > done else losses + 1
                done = len(assembly.shards.done)
                if losses > _LOSSES:
                    raise ValueError(
                        f"Ray was lost {losses} times without anything done between ({error}); what is done is kept, "
                        "repeat the command to go on."
                    ) from error
                self._say(f"Ray was lost ({error}) and is started again; what is done is kept.")
                ray = RayProcess(_wanted(self._options), log)

    def _tasks(self, assembly: Assembly, workers: int) -> list[Task]:
        tasks = self._units.tasks(assembly.shards.done, workers)
        assembly.expect(tasks)
        return tasks

    def _leave_out(self, deadly: list[tuple[int, str]]) -> None:
        self._say(f"Going on without {', '.join(key for _, key in deadly)}, over which workers die.")


def _wanted(options: BulkOptions) -> Wanted:
    """The workers of the options. Ray that this process has joined or started already is theirs, too."""
    address, ray = options.address or os.environ.get("RAY_ADDRESS"), sys.modules.get("ray")
    if not address and ray is not None and ray.is_initialized():
        address = ray.get_runtime_context().gcs_address
    return Wanted(options.device, options.workers, options.threads, address)


def _uses_ray(units: Units, per_video: int | None, options: BulkOptions, say: Callable[[str], None]) -> bool:
    """Tells whether Ray is asked for, or there is enough to do for it to be worth its start."""
    try:
        installed = importlib.util.find_spec("ray") is not None
    except ValueError:  # whoever imports it has been told that there is none
        installed = False
    if options.workers is not None or _wanted(options).address:
        if not installed:
            raise ValueError(
                'workers and clusters are Ray\'s, which is not installed; pip install "evatok_hf[bulk]", or leave '
                "--workers and --address out."
            )
        return True
    if units.videos is not None and units.videos * (per_video or CLIPS_OF_A_WHOLE_VIDEO) <= FEW_CLIPS:
        return False
    if not installed:
        say('Ray is not installed, so one process does it all; pip install "evatok_hf[bulk]" to use all cores.')
    return installed
