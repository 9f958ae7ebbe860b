"""Runs that turn the clips of a stream into rows, shard after shard, and go on exactly where they were killed."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from evatok_hf.data.clip_cutting import Unusable
from evatok_hf.data.clip_sources import Example, source_state
from evatok_hf.data.parquet_shards import ShardKind
from evatok_hf.data.shard_folder import ShardFolder
from evatok_hf.data.streaming import ClipStream, collate, merge
from evatok_hf.hub.data_cards import check_licence
from training.common.arguments import describe_machine, parse_arguments, patient_accelerator
from training.common.fields import option
from training.common.hub_push import HubDatasetArguments, HubPush
from training.common.options import VideoOptions
from training.common.run import time_left


@dataclass(kw_only=True)
class ShardOptions(VideoOptions, HubDatasetArguments):
    """Options of scripts that make a data set of clips."""

    output_dir: str = option("Folder of the data set; one for each split.")
    split: str = option("Split of the sources.", "train")
    minutes: float | None = option("Finish with the clips that there are after so many minutes.", None)
    shard_size: int = option("Clips of a shard; what a kill can lose.", 64)
    seed: int = option("Seed of the clips.", 0)
    resume: bool = option("Go on in --output_dir after the last shard.", False)
    licence: str = option("Licence of the data set, for its card (Hub id).", "other")
    sources_note: str = option("Where the videos come from and their licences (card).", "")
    cpu: bool = option("Compute on the CPU even where there is a GPU.", False)

    def __post_init__(self):
        super().__post_init__()
        check_licence(self.licence)
        self.at_least(1, "shard_size")
        self.above_zero("minutes")


_Options = TypeVar("_Options", bound=ShardOptions)


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


class ShardRun(Generic[_Options]):
    """A run from its command line to the finished data set.

    A script makes it first of all, then calls `open`, `begin`, `fill` and `finish`. Each process has a lane of the
    folder, and goes on in it after its last shard.

    Args:
        kind: dataclass of the script's options.
        script: its name, without the folder.
        description: of the script, for --help.
        shards: what it makes.
        argv: the command line without the script.

    Attributes:
        args: the options.
        accelerator: of the processes.
        rank: which of them this is.
        stream: where the clips come from.
        done: clips of this process.

    Raises:
        SystemExit: options that are wrong.
        ValueError: a launch that does not work together, a folder that holds another run, a Hub that refuses.
    """

    def __init__(
        self, kind: type[_Options], script: str, description: str, shards: ShardKind, argv: Sequence[str] | None
    ):
        self.args, _ = parse_arguments(kind, description, argv)
        self.command = shlex.join([f"training/{script}.py", *(sys.argv[1:] if argv is None else argv)])
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
        self.logger = logging.getLogger(script)
        self.logger.setLevel(logging.INFO)
        self.accelerator = patient_accelerator(self.args.cpu)
        self.rank, self.machine = self.accelerator.process_index, describe_machine(self.accelerator)
        self.kind, self.folder = shards, Path(self.args.output_dir)
        if not self.args.resume and shards.begun(self.folder):
            raise ValueError(f"{self.folder} holds {shards.rows}; use --resume true or another --output_dir.")
        self.hub = HubPush(self.args, self.folder, self.accelerator.is_main_process)

    def open(self, sizes: Any, **options: Any) -> CountedStream:
        """Opens the sources -> where the clips come from. Raises ValueError as `ClipStream`.

        Args:
            sizes: a configuration with the `num_frames` and the `image_size` of clips.
            options: further ones of the stream.
        """
        args = self.args
        clip = args.clip_config(sizes)
        self.stream = args.open_stream(CountedStream, args.split, clip, self.accelerator, **options)
        self._loader = DataLoader(self.stream, batch_size=1, num_workers=args.num_workers, collate_fn=collate)
        return self.stream

    def begin(self, settings: Mapping[str, Any], features: Callable[[], Any]) -> None:
        """Opens the folder, and puts the stream after its last shard. Raises ValueError as `ShardFolder`.

        Args:
            settings: all that the shards depend on beside what this knows; resuming with others is refused.
            features: of the rows, where `datasets` is installed.
        """
        self.settings = {
            **settings,
            **{name: getattr(self.args, name) for name in ("shuffle_buffer", "num_workers")},
            "processes": self.accelerator.num_processes,
            "source_state": source_state(self.stream.sources),
        }
        columns, size = features() if find_spec("datasets") else None, self.args.shard_size
        noted = self.machine if self.accelerator.is_main_process else None
        self.shards = ShardFolder(self.kind, self.folder, self.settings, columns, size, self.rank, noted)
        self.done = self.shards.clips
        if self.rank in self.shards.lanes:
            self.stream.load_state_dict(self.shards.lanes[self.rank].place)

    def read(self) -> Iterator[dict[str, Any]]:
        """Batches of one clip, from where the stream is. A ValueError of a loader process, which brings its whole
        traceback, is as one of this process."""
        try:
            yield from self._loader
        except ValueError as error:
            raise ValueError(str(error).rstrip().rsplit("\nValueError: ", 1)[-1]) from None

    def share(self, clips: int) -> int:
        """The number of clips that this process takes. Raises ValueError if it has more already."""
        processes = self.accelerator.num_processes
        mine = clips // processes + (self.rank < clips % processes)
        if self.done > mine:
            raise ValueError(f"{self.folder} holds more than {clips} clips already; ask for as many, or for more.")
        return mine

    def fill(
        self,
        passes: Iterable[Iterator[dict[str, Any]]],
        compute: Callable[[dict[str, Any], int], list[dict[str, Any]]],
        batch_size: int,
        total: int | None = None,
        expected: int | None = None,
    ) -> None:
        """Shard after shard, until this process has `total` clips, --minutes or the passes are at their end.

        Args:
            passes: batches of one clip, so that the stream's state after a shard is that after a batch; a pass may put
                the stream to its start, since all clips of the one before were noted.
            compute: (batch, number of its first clip) -> a row a clip.
            batch_size: clips that `compute` is given at most.
            total: clips of this process in all.
            expected: how many clips the progress bar announces where there is no total.
        """
        minutes = self.args.minutes
        until = None if minutes is None else time.monotonic() + time_left(minutes)
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

    def finish(self, write: Callable[[ShardFolder, dict[str, Any]], Any]) -> Path:
        """Has the main process write what a finished data set has beside its shards, and pushes it -> its folder.

        Args:
            write: given the shards of all processes, and the facts of this run.
        """
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            facts = {"command": self.command, "machine": self.machine}
            facts |= {"licence": self.args.licence, "sources_note": self.args.sources_note}
            write(ShardFolder(self.kind, self.folder, self.settings), facts)
            self.logger.info("wrote %s", self.folder / self.kind.summary)
        self.accelerator.end_training()
        self.hub.finish(self.folder)
        return self.folder
