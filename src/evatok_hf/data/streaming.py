"""Training clips from streams of videos: folders, WebDataset tars, datasets of the Hub; sharded and exactly resumable.

`datasets` streams the undecoded examples (paths or bytes), shards and shuffles them; then `video.read` reads the frames
of a clip, and no others. Every random choice is a function of (seed, epoch, source, video, clip number), never of what
was drawn before. So the place in a stream is a handful of integers, and a resumed stream gives the clips of the
uninterrupted one bit for bit: only the cheap undecoded order is replayed (of tars, the bytes are read again).

In a training loop:

    stream = ClipStream([("videos", 0.8), ("tars/*.tar", 0.2)], config=ClipConfig(), rank=rank, world_size=world_size)
    for batch in DataLoader(stream, batch_size=8, num_workers=2, collate_fn=collate):
        ...
        stream.record(batch)            # after the step: workers run ahead, only the loop knows what was consumed
        state = stream.state_dict()     # plain JSON values, one state a process

and, to go on, `stream.load_state_dict(state)` before the DataLoader is iterated.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.files_evatok import check, checked, list_of, optional, record, ruled, table_of, whole
from .clip_cutting import SKIP_CAUSES, ClipConfig, ClipCutter, Unusable, to_float
from .clip_sources import Example, open_source

__all__ = ["ClipConfig", "ClipStream", "collate", "evaluation_clips", "merge", "to_float"]

logger = logging.getLogger(__name__)

# Rows of the table in shared memory in which each worker process counts what it skipped.
_COUNTER_ROWS = 256


# Where the next clip of a reader (a process, or a worker of it) comes from: how many videos it has finished, but for
# skipped ones; the number of the clip within the video under way; then of each source the epoch, and how many examples
# of it were consumed.
Place = list[int]


class _Cursor:
    """A reader's place in a source: before `examples`, after `consumed` others of an epoch."""

    def __init__(self, open_epoch: Callable[[int], Iterator[Example]], epoch: int, consumed: int):
        self._open = open_epoch
        self.begin(epoch, consumed)

    def begin(self, epoch: int, consumed: int = 0) -> None:
        self.epoch, self.consumed, self.examples = epoch, consumed, islice(self._open(epoch), consumed, None)
        self.usable = consumed > 0  # what an earlier run consumed was not necessarily broken


_COUNT = whole(0, 1 << 62)


@checked
@dataclass
class _Shared:
    """The consumption of all readers together: videos, and of each source its epoch and examples of that."""

    draws: int = ruled(_COUNT)
    sources: list = ruled(list_of(list_of(_COUNT, 2, least=2), 1 << 16, least=1))


@checked
@dataclass
class _State:
    """The contents of `ClipStream.state_dict`."""

    seed: int = ruled(whole(-(1 << 63), 1 << 64))
    sources: int = ruled(whole(1, 1 << 16))
    rank: int = ruled(_COUNT)
    world_size: int = ruled(whole(1, 1 << 20))
    epoch: int = ruled(_COUNT)
    workers: int = ruled(whole(1, 1 << 16))
    first_worker: int = ruled(_COUNT)
    readers: dict = ruled(table_of(list_of(_COUNT, 1 << 18, least=4)))
    shared: dict | None = ruled(optional(record(_Shared)), None)
    each: list | None = ruled(optional(list_of(list_of(_COUNT, 1 << 18, least=4), 1 << 20)), None)


class ClipStream(torch.utils.data.IterableDataset):
    """Clips from one source or a mix of several, for a plain DataLoader with any number of workers (or none).

    Each item is a dict: "pixel_values_videos" uint8 (F, 3, S, S); "label" int, -1 without one (it indexes
    `sources[i].classes` of a folder); "origin" int, number of its source in the mix; "source" str, the video's path
    within the folder or key within the tar; "frames", F numbers of frames of the video; "crop", four int (see `Crop`);
    "fps" float, the video's frames a second; "position" int64 (4 + 2 * sources,), where the stream goes on after this
    item, for `record`.

    Every video goes to exactly one process and worker in an epoch. Those that cannot be read or are too short are
    skipped, counted in `skipped` and named in a warning.

    Args:
        source: a folder of videos (searched recursively; with sub-folders train, val, .. if it is divided into splits;
            other sub-folders are classes), a folder or glob of WebDataset .tar files, or a dataset of the Hub; or a
            list of (source, weight), weight being the source's share of the videos drawn.
        split: which split to read.
        config: how clips are cut.
        seed: of all random choices; the same on all processes.
        rank, world_size: which of how many processes this is. The loader must not be sharded again by `accelerate`.
        shuffle_buffer: undecoded examples that tars and Hub datasets are shuffled among, held in memory as bytes by
            each worker; folders are shuffled whole. 0 keeps the order.
        repeat: go on with the next epoch for ever, each shuffled anew; else stop after one (see `set_epoch`).
        training: False gives centred, unflipped, unscaled clips with the first stride, evenly spaced over each video,
            in the sources' order.

    Raises:
        ValueError: if a source is nothing or holds no video, or an argument is out of range; while iterating, if no
            video of a source gives a clip.
    """

    def __init__(
        self,
        source: str | Path | Sequence[tuple[str | Path, float]],
        split: str = "train",
        config: ClipConfig | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 256,
        repeat: bool = True,
        training: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..world_size - 1, not {rank} of {world_size}.")
        if seed < 0 or shuffle_buffer < 0:
            raise ValueError(f"seed and shuffle_buffer must be 0 or more, not {seed} and {shuffle_buffer}.")
        mix = [(source, 1.0)] if isinstance(source, (str, Path)) else list(source)
        if not mix or not all(weight > 0 for _, weight in mix):
            raise ValueError(f"Give at least one source, each with a weight above 0, not {mix!r}.")
        self.config = config or ClipConfig()
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.shuffle_buffer, self.repeat, self.training = shuffle_buffer, repeat, training
        self.sources = [open_source(name, split) for name, _ in mix]
        self._weights = np.array([float(weight) for _, weight in mix])
        self._usable: set[int] = set()  # sources of which some video is known to give a clip
        # In shared memory, so that set_epoch reaches the workers and their counts reach this process.
        self._first_epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros(_COUNTER_ROWS, len(SKIP_CAUSES), dtype=torch.int64).share_memory_()
        self._warned: set[str] = set()
        self._loaded: dict[str, Any] | None = None  # where the next iteration begins
        self._current = self._new_state()  # what state_dict gives
        self._recording = False

    # --- state ---

    def _new_state(self, readers: int = 1) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "sources": len(self.sources),
            "rank": self.rank,
            "world_size": self.world_size,
            "epoch": int(self._first_epoch),
            "workers": readers,
            "first_worker": 0,  # which reader the loader's next batch comes from
            "readers": {},
        }

    @property
    def skipped(self) -> Counter[str]:
        """Numbers of videos skipped so far, by cause ("unreadable", "too short"), in all workers of this process."""
        return +Counter(dict(zip(SKIP_CAUSES, self._skipped.sum(0).tolist(), strict=True)))

    @property
    def epoch(self) -> int:
        """The epoch of the clip recorded last; that of the slowest source in a mix."""
        epochs = (epoch for place in self._current["readers"].values() for epoch in place[2::2])
        return min(epochs, default=self._current["epoch"])

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at the start of an epoch; a state loaded for this very epoch stays in force."""
        self._first_epoch.fill_(epoch)
        if self._loaded is None or self._loaded.get("epoch") != epoch:
            self._loaded, self._current, self._recording = None, self._new_state(), False

    def record(self, batch: Mapping[str, Any]) -> None:
        """Note that a batch (or an item) was consumed, every one in turn; `state_dict` then goes on right after it."""
        reader, readers, *place = torch.as_tensor(batch["position"]).reshape(-1, 4 + 2 * len(self.sources))[-1].tolist()
        self._note(reader, readers, place)
        self._current["first_worker"] = (reader + 1) % readers
        self._loaded, self._recording = None, True

    def _note(self, reader: int, readers: int, place: Place) -> None:
        self._current = self._fit(self._current, readers)
        self._current["readers"][str(reader)] = place

    def state_dict(self) -> dict[str, Any]:
        """The place at which the stream stands, as plain JSON values; each process has its own.

        It is after the batch recorded last, or, where `record` is never called, after the item that this very process
        (main or worker) yielded last.
        """
        return {**self._current, "readers": dict(self._current["readers"])}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Let the next iteration go on where a state was taken: this process's, or the list of all processes' states.

        With the same sources, seed, settings and numbers of processes and workers, the clips are exactly those that
        would have come. So they are with another number of processes, given the list of all states, if there are as
        many workers in all as before and all had their turn equally often. With other numbers the stream goes on in
        the epoch of the slowest reader, and each reader passes over its share of what was consumed there: near the
        same place, but some videos of that epoch come twice or not at all. Give the list of all states then too, since
        one alone has to stand for the others.

        Raises:
            ValueError: if the state belongs to another seed or another number of sources.
        """
        states = [state] if isinstance(state, Mapping) else list(state)
        for one in states:
            check(_State, one)
            if any(len(place) != 2 + 2 * one["sources"] for place in one["readers"].values()):
                raise ValueError("readers must have a place in every source.")
            if one["seed"] != self.seed or one["sources"] != len(self.sources):
                raise ValueError(
                    f"The state is of a stream with seed {one['seed']} and {one['sources']} source(s), this one has "
                    f"seed {self.seed} and {len(self.sources)}; make the stream as it was, or start anew."
                )
        own = [one for one in states if one["world_size"] == self.world_size and one["rank"] == self.rank]
        chosen = dict(own[0]) if own else _share(states)
        self._first_epoch.fill_(chosen["epoch"])
        self._loaded, self._recording = chosen, False
        self._current = {**self._new_state(), **chosen, "readers": dict(chosen["readers"])}

    def _fit(self, state: dict[str, Any], readers: int) -> dict[str, Any]:
        """The state for this number of readers in this process."""
        if "shared" not in state and state["workers"] == readers:
            return {**state, "readers": dict(state["readers"])}
        state, total, first = _share([state]), self.world_size * readers, self.rank * readers
        if len(state["each"]) == total:
            places = state["each"][first : first + readers]
        else:
            place = [state["shared"]["draws"] // total, 0]
            for epoch, consumed in state["shared"]["sources"]:
                place += [epoch, consumed // total]
            places = [place] * readers
        own = {str(reader): place for reader, place in enumerate(places)}
        return {**self._new_state(readers), "epoch": state["epoch"], "readers": own}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        worker, readers = (info.id, info.num_workers) if info else (0, 1)
        state = self._current = self._fit(self._loaded or self._new_state(readers), readers)
        self._loaded, self._recording = None, False
        # A DataLoader always asks its worker 0 first; after a resume that must be the reader whose turn it was.
        reader = (worker + state["first_worker"]) % readers
        start = [0, 0, *[state["epoch"], 0] * len(self.sources)]
        draw, clip, *places = state["readers"].get(str(reader), start)
        mine, total = self.rank * readers + reader, self.world_size * readers
        cursors = [
            _Cursor(partial(self._examples, source, mine, total), epoch, consumed)
            for source, (epoch, consumed) in enumerate(zip(places[::2], places[1::2], strict=True))
        ]
        used = True
        while used:
            for source in self._preference(draw, mine):
                used = yield from self._draw(cursors, int(source), draw, clip, reader, readers)
                if used:
                    clip = 0
                    break
            draw += 1

    def _preference(self, draw: int, reader: int) -> np.ndarray:
        """All sources in the order in which they are tried for a draw: a weighted random permutation.

        So the choice does not depend on when a source was found to be at its end, which a resumed stream does not know.
        """
        if not self.training and not self.repeat:
            return np.arange(len(self.sources))
        rng = np.random.default_rng([self.seed, reader, draw])
        return np.argsort(rng.exponential(size=len(self._weights)) / self._weights)

    def _examples(self, source: int, reader: int, readers: int, epoch: int) -> Iterator[Example]:
        seed = [self.seed, source] if self.training and self.shuffle_buffer else None
        return self.sources[source].examples(seed, self.shuffle_buffer, epoch, reader, readers)

    def _draw(
        self, cursors: list[_Cursor], source: int, draw: int, clip: int, reader: int, readers: int
    ) -> Generator[dict[str, Any], None, bool]:
        """The clips, from number `clip` on, of the next usable video of a source; returns False if it is at its end."""
        cursor = cursors[source]
        while (example := self._next(source, cursor)) is not None:
            try:
                with ClipCutter(example, self.config, self.training) as video:
                    while clip < video.count:
                        item = video.cut(clip, [self.seed, source, cursor.epoch])
                        clip, cursor.usable = clip + 1, True
                        place = [draw, clip, *(number for other in cursors for number in (other.epoch, other.consumed))]
                        if clip < video.count:
                            place[3 + 2 * source] -= 1  # the video itself is not finished
                        else:
                            place[:2] = draw + 1, 0
                        item["origin"] = source
                        item["position"] = torch.tensor([reader, readers, *place])
                        if not self._recording:
                            self._note(reader, readers, place)
                        yield item
            except Unusable as error:
                self._skip(example, error, clip)
            if clip:
                return True
        return False

    def _next(self, source: int, cursor: _Cursor) -> Example | None:
        """The next video of a source; None at the end of one that does not repeat."""
        while (example := next(cursor.examples, None)) is None:
            if not cursor.usable:
                self._require_usable(source)
            if not self.repeat:
                return None
            cursor.begin(cursor.epoch + 1)
        cursor.consumed += 1
        return example

    def _skip(self, example: Example, error: Unusable, clips: int) -> None:
        info = torch.utils.data.get_worker_info()
        self._skipped[(info.id if info else 0) % _COUNTER_ROWS, SKIP_CAUSES.index(error.cause)] += 1
        if (name := f"{example.key}, {error}") not in self._warned:  # a repeating stream meets it in every epoch
            self._warned.add(name)
            logger.warning("Skipped %s, %s: %s", example.key, error.cause, error)

    def _require_usable(self, index: int) -> None:
        """ValueError unless some video of a source, whichever reader it belongs to, gives a clip."""
        if index in self._usable:
            return
        source, causes, first = self.sources[index], Counter(), ""
        for example in source.examples():
            try:
                with ClipCutter(example, self.config, self.training) as video:
                    video.cut(0, [self.seed])
                self._usable.add(index)
                return
            except Unusable as error:
                causes[error.cause] += 1
                first = first or f", the first, {example.key}: {error}"
        found = ", ".join(f"{count} {cause}" for cause, count in causes.items()) or "it holds none"
        raise ValueError(
            f"No video of {source.name} gave a clip ({found}){first}; mend the videos or lower num_frames."
        )


def _share(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A state for other readers: what the old ones consumed together, to be divided by the new, and ("each") where
    each stands if all are known, for as many readers in other processes."""
    if "shared" in states[0]:
        return dict(states[0])
    ordered = sorted(states, key=lambda state: state["rank"])
    first, known = states[0], sum(state["workers"] for state in states)
    complete = [state["rank"] for state in ordered] == list(range(first["world_size"]))
    even = all(
        state["first_worker"] == 0 and len(state["readers"]) == state["workers"] == first["workers"] for state in states
    )
    each = []
    if complete and even:
        each = [state["readers"][str(index)] for state in ordered for index in range(first["workers"])]
    places = [place for state in states for place in state["readers"].values()]
    places += [[0, 0, *[first["epoch"], 0] * first["sources"]]] * (known - len(places))
    old, shared = first["world_size"] * first["workers"], []
    for source in range(first["sources"]):
        pairs = [place[2 + 2 * source : 4 + 2 * source] for place in places]
        epoch = min(pair[0] for pair in pairs)
        consumed = [pair[1] for pair in pairs if pair[0] == epoch]
        # Readers that are an epoch ahead have consumed at least as much of this one as any other.
        shared.append([epoch, (sum(consumed) + max(consumed) * (known - len(consumed))) * old // known])
    draws = sum(place[0] for place in places) * old // known
    return {**first, "first_worker": 0, "readers": {}, "shared": {"draws": draws, "sources": shared}, "each": each}


def evaluation_clips(
    source: str | Path | Sequence[tuple[str | Path, float]],
    config: ClipConfig | None = None,
    clips_per_video: int = 1,
    split: str = "val",
    rank: int = 0,
    world_size: int = 1,
) -> ClipStream:
    """The same clips every time, for validation: an iterable of the items of `ClipStream`, through every video once.

    Centre crop of the full short side, no flip, the first of `config.strides`, and up to `clips_per_video` clips evenly
    spaced over each video without overlap (fewer where it is too short for that many), in sorted order; each process
    gets its own part of the videos. What was skipped is counted in `skipped`.

    Raises:
        ValueError: as `ClipStream`.
    """
    config = replace(config or ClipConfig(), clips_per_video=clips_per_video)
    return ClipStream(
        source, split, config, rank=rank, world_size=world_size, shuffle_buffer=0, repeat=False, training=False
    )


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Items -> batch: pixel_values_videos uint8 (B, F, 3, S, S); label, origin int64 (B,); frames int64 (B, F); crop
    int64 (B, 4); fps float32 (B,); position int64 (B, 4 + 2 * sources), where items have one; source, a list of B
    strings; skipped, a list of all that was skipped, where items say it."""
    batch: dict[str, Any] = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if name in ("source", "skipped"):
            batch[name] = values if name == "source" else [video for passed in values for video in passed]
        elif isinstance(values[0], torch.Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = torch.tensor(values, dtype=torch.float32 if name == "fps" else torch.int64)
    return batch


def merge(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The batch of the clips of several batches of `collate`; the stream must `record` each of these."""
    parts = {name: [batch[name] for batch in batches] for name in batches[0]}
    return {
        name: torch.cat(values) if isinstance(values[0], torch.Tensor) else [one for part in values for one in part]
        for name, values in parts.items()
    }
