"""Tokens of many videos: on the cores or GPUs of one machine or of a cluster, by Ray, or in this process.

    lists of videos -> clips -> rows -> shards

The two steps in the middle are `bulk.workers`, done by Ray's workers (`bulk.ray_data`) or, where there is little to do,
one after another here. Lists and shards are the command's own: a shard holds the rows of one unit of the source, so
that its name and its bytes do not depend on who did what when, and a `Datasink` of Ray Data sees no whole units. Rows
are small, a kilobyte or two a clip, so the command puts units together, and only it has to reach the output.
"""

from __future__ import annotations

import glob
import os
import pickle
import platform
import sys
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
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
from .driver import DeadlyVideos, RayLost, RayProcess
from .units import CLIPS_OF_A_WHOLE_VIDEO, Assembly, Chunk, Units

if TYPE_CHECKING:
    from ..allocation.strategies import Allocation
    from ..tokenize.video_tokenizer import VideoTokenizer
    from .workers import Decoder, Encoder

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
    wanted, finished = _wanted(options), (folder / SUMMARY).exists()
    by_ray = _uses_ray(units, per_video, wanted, say)
    log = folder.absolute().with_name(f"{folder.absolute().name}.ray.log")

    def start_ray() -> RayProcess:
        prepare(log)
        write_text(log, "")
        return RayProcess(wanted, log)

    with start_ray() if by_ray and not finished else nullcontext() as ray:
        tokenizer = load()
        config = tokenizer.model.config
        clips = replace(options.clips, num_frames=config.num_frames, image_size=config.image_size)
        options = replace(options, clips=clips)
        settings = make_settings(source, units, tokenizer, allocation, options)
        decoder, encoder = make_work(units, tokenizer, allocation, options)
        columns = features(config.num_blocks, videos.classes, options.known_frames is not None)
        shards = ShardFolder(SHARDS, folder, settings, columns, options.shard_size)
        counted = per_video is not None and units.examples is not None and options.views == "random"

        def tell() -> None:
            skipped = shards.causes.total()
            expected = (len(units.examples) - skipped) * per_video if counted else None
            report(Progress(shards.clips, skipped, expected, log if by_ray else None))

        tell()
        if len(shards.done) == units.count and finished:
            return read_summary(folder)
        if len(shards.done) < units.count:
            assembly = Assembly(units, shards)
            if by_ray:
                chunks = _by_ray(assembly, decoder, encoder, ray or start_ray(), partial(RayProcess, wanted, log), say)
            else:
                chunks = _here(assembly, decoder, encoder, options)
            with closing(chunks):
                for chunk in chunks:
                    assembly.take(chunk)
                    tell()
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
    bound = allocation.bind(tokenizer.model, tokenizer.router)
    settings = shard_settings([(source, 1.0)], "videos", options, options.clips, bound, units.source.classes)
    if options.whole_video:
        settings |= {"views": "whole", "clips_per_video": None}
    state = {"source_digest": units.digest, "source_state": units.state}
    return {**settings, "whole_video": options.whole_video, **state}


def make_work(
    units: Units, tokenizer: VideoTokenizer, allocation: Allocation, options: BulkOptions
) -> tuple[Decoder, Callable[..., Encoder]]:
    """The maker of clips from tasks, and the maker of an encoder of clips on a device with a number of threads. Raises
    ValueError for options that the model cannot serve."""
    from ..tokenize.clip_tokens import ClipTokens
    from .workers import Decoder, Encoder, Views, WholeVideos  # with transformers, which takes seconds

    ClipTokens(allocation.bind(tokenizer.model, tokenizer.router), options.known_frames)
    if options.whole_video:
        views = WholeVideos(tokenizer.processor, tokenizer.model.config.num_frames, options.clips.strides[0])
    else:
        views = Views(options.clips, options.views == "random", options.seed)
    # Tasks of a folder list their videos; of anything else the source is read where they are done.
    source = units.source if units.examples is None else None
    decoder = Decoder(source, units.count, views, options.batch_size)
    return decoder, partial(Encoder, tokenizer, allocation, options.known_frames)


def _here(
    assembly: Assembly, decoder: Decoder, encoder: Callable[..., Encoder], options: BulkOptions
) -> Generator[Chunk]:
    """The chunks of all units that are not done, made in this process."""
    from ..models.checkpoint_evatok import resolve_device
    from .workers import loop

    device = options.device
    if device == "auto":  # as Ray does, which knows no other kinds
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = str(resolve_device(device))
    what = f"{platform.machine()} CPU" if device == "cpu" else device
    assembly.shards.prepare(f"one process with {options.threads} thread(s) ({what})")
    yield from loop(assembly.tasks(1), decoder, partial(encoder, device, options.threads))


def _by_ray(
    assembly: Assembly,
    decoder: Decoder,
    encoder: Callable[..., Encoder],
    ray: RayProcess,
    another: Callable[[], RayProcess],
    say: Callable[[str], None],
) -> Generator[Chunk]:
    """The same by Ray's workers. Where Ray is lost, or workers die over a video, it goes on with another process.
    Raises ValueError where a worker failed, or Ray was lost again and again.
    """
    pickled, losses, done = pickle.dumps(encoder), 0, 0
    while True:
        try:
            with ray:
                pool = ray.pool()
                assembly.shards.prepare(str(pool))
                yield from ray.chunks(pickled, pickle.dumps(decoder), assembly.tasks(pool.workers))
            return
        except DeadlyVideos as error:
            decoder = replace(decoder, left_out=decoder.left_out | error.videos)
            say(f"Going on without {', '.join(key for _, key in sorted(error.videos))}, over which workers die.")
        except RayLost as error:
            before, done = done, len(assembly.shards.done)
            losses = 1 if done > before else losses + 1
            if losses > _LOSSES:
                raise ValueError(
                    f"Ray was lost {losses} times without anything done between ({error}); what is done is kept, "
                    "repeat the command to go on."
                ) from error
            say(f"Ray was lost ({error}) and is started again; what is done is kept.")
        ray = another()


def _wanted(options: BulkOptions) -> Wanted:
    """The workers of the options. Ray that this process has joined or started already is theirs, too."""
    address, ray = options.address or os.environ.get("RAY_ADDRESS"), sys.modules.get("ray")
    if not address and ray is not None and ray.is_initialized():
        address = ray.get_runtime_context().gcs_address
    return Wanted(options.device, options.workers, options.threads, address)


def _uses_ray(units: Units, per_video: int | None, wanted: Wanted, say: Callable[[str], None]) -> bool:
    """Tells whether Ray is asked for, or there is enough to do for it to be worth its start."""
    installed = find_spec("ray") is not None
    if wanted.workers is not None or wanted.address:
        if not installed:
            raise ValueError(
                'workers and clusters are Ray\'s, which is not installed; pip install "evatok_hf[bulk]", or leave '
                "--workers and --address out."
            )
        return True
    if units.examples is not None and len(units.examples) * (per_video or CLIPS_OF_A_WHOLE_VIDEO) <= FEW_CLIPS:
        return False
    if not installed:
        say('Ray is not installed, so one process does it all; pip install "evatok_hf[bulk]" to use all cores.')
    return installed
