"""Training clips from streams of videos: folders, WebDataset tars, datasets of the Hub; sharded and exactly resumable.

`datasets` streams the undecoded examples (paths or bytes), shards and shuffles them; then `video_io` reads the frames
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

import glob
import logging
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
import torch
from datasets import Features, IterableDataset, Value, Video, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetNotFoundError

from .video_io import VideoReader, VideoReadError, open_video

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mov", ".m4v", ".gif")
# Names that mean the same split; any of them may be asked for.
SPLITS = (("train", "training"), ("val", "validation", "valid"), ("test", "testing"))
SKIP_CAUSES = ("unreadable", "too short")
# Rows of the table in shared memory in which each worker process counts what it skipped.
_COUNTER_ROWS = 256

_T = TypeVar("_T")


@dataclass(frozen=True)
class ClipConfig:
    """How clips are cut out of videos.

    Args:
        num_frames: frames of a clip.
        image_size: side of the square clip in pixels.
        strides: steps from one frame of a clip to the next, in frames of the video; one is drawn for each clip, and
            lowered where the video is too short for it.
        scale: (lo, hi): side of the square crop as a fraction of the video's short side, drawn log-uniformly, but at
            least `image_size` where the video has that many pixels. (1, 1) is a plain resize of the short side.
        random_position: crop anywhere rather than at the centre.
        flip_probability: how often a clip is mirrored left to right.
        random_start: start anywhere rather than evenly spaced over the video.
        clips_per_video: clips cut out of a video, one after another, each time it comes up.
        min_frames: skip shorter videos; by default those shorter than `num_frames`.

    Raises:
        ValueError: if a value is out of range.
    """

    num_frames: int = 16
    image_size: int = 64
    strides: tuple[int, ...] = (1,)
    scale: tuple[float, float] = (1.0, 1.0)
    random_position: bool = True
    flip_probability: float = 0.5
    random_start: bool = True
    clips_per_video: int = 1
    min_frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "image_size", "clips_per_video"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides must hold at least one step of 1 or more, not {self.strides!r}.")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be (lo, hi) with 0 < lo <= hi <= 1, not {self.scale!r}.")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must lie in [0, 1], not {self.flip_probability}.")
        if self.min_frames is not None and self.min_frames < self.num_frames:
            raise ValueError(f"min_frames ({self.min_frames}) must be at least num_frames ({self.num_frames}) or None.")


class _Unusable(Exception):
    """A video that gives no clip."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


@dataclass(frozen=True)
class _Example:
    key: str
    video: str | bytes
    label: int


@dataclass
class _Source:
    """A stream of undecoded videos: rows of `dataset`, read by `to_example`."""

    name: str
    dataset: IterableDataset
    to_example: Callable[[dict[str, Any]], _Example]
    classes: tuple[str, ...] = ()
    weight: float = 1.0
    known_usable: bool = False

    def examples(
        self, seed: list[int] | None, buffer: int, epoch: int, reader: int, readers: int
    ) -> Iterator[_Example]:
        """One reader's part of an epoch: whole shards (files, tars) where there are enough of them, else by example."""
        dataset = self.dataset
        if seed is not None:
            dataset = dataset.shuffle(generator=np.random.default_rng([*seed, epoch]), buffer_size=buffer)
        # The parts rotate from epoch to epoch, so that no reader starves where there are fewer videos than readers.
        part = (reader + epoch) % readers
        if dataset.num_shards >= readers:
            dataset = dataset.shard(num_shards=readers, index=part, contiguous=False)
        else:
            dataset = split_dataset_by_node(dataset, rank=part, world_size=readers)
        # Batches of one, because `__iter__` would split once more in a DataLoader worker, and by shards only.
        rows = dataset.iter(batch_size=1)
        while (batch := self._next(rows)) is not None:
            yield self.to_example({name: values[0] for name, values in batch.items()})

    def _next(self, rows: Iterator[dict[str, list[Any]]]) -> dict[str, list[Any]] | None:
        try:
            return next(rows, None)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{self.name}: cannot read an archive ({error}); make the tar anew.") from error


def _open_source(source: str | Path, split: str) -> _Source:
    """Find out what a source is. ValueError if it is nothing, or holds no video."""
    name, path = str(source), Path(source)
    if glob.has_magic(name) or name.endswith(".tar"):
        tars = sorted(glob.glob(name, recursive=True))
        if not tars:
            raise ValueError(f"No file matches {name}; name existing .tar files, a folder or a dataset of the Hub.")
        return _hub_source(name, split, tars)
    if path.is_dir():
        root = _split_folder(path, split)
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file())
        if files:
            return _folder_source(path, root, files)
        tars = sorted(str(file) for file in root.rglob("*.tar"))
        if tars:
            return _hub_source(name, split, tars)
        if any(path.rglob("*.parquet")):
            return _hub_source(name, split)
        raise ValueError(f"No video in {root}; expected files that end in {', '.join(VIDEO_SUFFIXES)} or .tar.")
    if path.exists():
        raise ValueError(f"{name} is a single file; name the folder that holds the videos.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"There is no folder {name}; name a folder of videos or .tar files, or a dataset of the Hub.")
    return _hub_source(name, split)


def _aliases(split: str) -> tuple[str, ...]:
    return (split, *(alias for aliases in SPLITS for alias in aliases if split in aliases))


def _split_folder(root: Path, split: str) -> Path:
    """The sub-folder of a split; the folder itself if it is not divided into splits."""
    for alias in _aliases(split):
        if (root / alias).is_dir():
            return root / alias
    others = [alias for aliases in SPLITS for alias in aliases if (root / alias).is_dir()]
    if others:
        raise ValueError(
            f"{root} has {', '.join(others)} but no folder for {split!r}; add it or ask for another split."
        )
    return root


def _rows(files: list[tuple[str, str, int]]) -> Iterator[dict[str, Any]]:
    for path, key, label in files:
        yield {"video": path, "key": key, "label": label}


def _folder_source(root: Path, split_root: Path, files: list[Path]) -> _Source:
    # The classes are those of all splits together, so that a class that one split lacks shifts no label.
    splits = [root / alias for aliases in SPLITS for alias in aliases] if split_root != root else [root]
    splits = [folder for folder in {*splits, split_root} if folder.is_dir()]
    classes = sorted({child.name for folder in splits for child in folder.iterdir() if child.is_dir()})
    labels = {name: index for index, name in enumerate(classes)}
    relatives = [file.relative_to(split_root) for file in files]
    rows = [
        (str(file), relative.as_posix(), labels[relative.parts[0]] if len(relative.parts) > 1 else -1)
        for file, relative in zip(files, relatives, strict=True)
    ]
    features = Features({"video": Video(decode=False), "key": Value("string"), "label": Value("int64")})
    # A list in gen_kwargs is what datasets shards and shuffles: every file is a shard of its own.
    dataset = IterableDataset.from_generator(_rows, features=features, gen_kwargs={"files": rows})
    return _Source(str(split_root), dataset, _folder_example, tuple(classes))


def _folder_example(row: dict[str, Any]) -> _Example:
    return _Example(row["key"], row["video"]["path"], row["label"])


def _hub_source(name: str, split: str, tars: list[str] | None = None) -> _Source:
    try:
        if tars:
            datasets = load_dataset("webdataset", data_files={split: tars}, streaming=True)
        else:
            datasets = load_dataset(name, streaming=True)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"There is no folder {name} and no such Hub dataset ({error}); mend the name.") from error
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{name}: cannot read an archive ({error}); make the tar anew.") from error
    known = [alias for alias in _aliases(split) if alias in datasets]
    if not known:
        raise ValueError(f"{name} has {', '.join(datasets)} but nothing for {split!r}; ask for another split.")
    dataset = datasets[known[0]]
    features = dataset.features or {}
    videos = [
        column
        for column, feature in features.items()
        if isinstance(feature, Video) or f".{column.rsplit('.', 1)[-1].lower()}" in VIDEO_SUFFIXES
    ]
    if len(videos) != 1:
        raise ValueError(f"{name} must have one video column but has {videos} among {list(features)}; leave one.")
    labels = [column for column in ("label", "cls", "json") if column in features][:1]
    # Whatever is not needed is dropped, so that datasets decodes no pictures or sound beside the video.
    dataset = dataset.select_columns(videos + labels + [column for column in ("__key__",) if column in features])
    if hasattr(features[videos[0]], "decode"):  # Video, but .gif and .mpg are taken for pictures
        dataset = dataset.cast_column(videos[0], type(features[videos[0]])(decode=False))
    return _Source(name, dataset, _RowReader(videos[0], labels[0] if labels else None))


@dataclass(frozen=True)
class _RowReader:
    """Row of a dataset -> example; a class rather than a closure because workers may pickle it."""

    video: str
    label: str | None

    def __call__(self, row: dict[str, Any]) -> _Example:
        value, label = row[self.video], row.get(self.label) if self.label else None
        label = label.get("label") if isinstance(label, dict) else label
        struct = value if isinstance(value, dict) else {"bytes": value, "path": None}
        path, video = struct.get("path"), struct.get("bytes") or struct.get("path") or b""
        key = row.get("__key__") or path or f"video-{zlib.crc32(video):08x}"
        return _Example(key, video, label if isinstance(label, int) else -1)


def _spans(count: int, clips: int, span: int) -> list[int]:
    """Starts of up to `clips` windows of `span` frames, evenly spaced without overlap; one alone lies in the middle."""
    clips = min(clips, count // span)
    if clips == 1:
        return [(count - span) // 2]
    return [index * (count - span) // (clips - 1) for index in range(clips)]


def _crop(frames: np.ndarray, config: ClipConfig, rng: np.random.Generator | None) -> torch.Tensor:
    """uint8 (F, H, W, 3) -> uint8 (F, 3, S, S): crop, flip, antialiased bilinear resize; centred without `rng`."""
    height, width = frames.shape[1:3]
    short, size = min(height, width), config.image_size
    side, top, left, flip = short, (height - short) // 2, (width - short) // 2, False
    if rng is not None:
        # Always the same four draws, so that changing one setting leaves the other choices as they are.
        scale, down, right, mirror = rng.random(4)
        lo, hi = np.log(config.scale)
        side = min(short, max(round(short * float(np.exp(lo + (hi - lo) * scale))), size))
        if not config.random_position:
            down = right = 0.5
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        flip = mirror < config.flip_probability
    crop = frames[:, top : top + side, left : left + side]
    clip = torch.from_numpy(np.array(crop[:, :, ::-1] if flip else crop)).permute(0, 3, 1, 2)  # (F, 3, side, side)
    if side != size:
        clip = torch.nn.functional.interpolate(clip, (size, size), mode="bilinear", antialias=True)
    return clip.contiguous()  # (F, 3, S, S)


class _ClipCutter:
    """An open video and the clips to be cut from it; `_Unusable` if it gives none."""

    def __init__(self, example: _Example, config: ClipConfig, training: bool) -> None:
        self.example, self.config, self.training = example, config, training
        self.video = self._read(self._open)
        length, shortest = self._read(lambda: self.video.num_frames), config.min_frames or config.num_frames
        if length < shortest:
            self.video.close()
            raise _Unusable("too short", f"{length} frames, {shortest} are needed")
        self.longest_stride = (length - 1) // max(1, config.num_frames - 1)
        self.stride = min(config.strides[0], self.longest_stride)
        self.starts = _spans(length, config.clips_per_video, (config.num_frames - 1) * self.stride + 1)
        self.count = config.clips_per_video if training else len(self.starts)

    def _open(self) -> VideoReader:
        video = self.example.video
        if isinstance(video, str) and "://" in video:
            with fsspec.open(video, "rb") as file:
                video = file.read()
        return open_video(video)

    def _read(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (VideoReadError, FileNotFoundError) as error:
            raise _Unusable("unreadable", str(error)) from error

    def cut(self, number: int, seed: list[int]) -> dict[str, Any]:
        """Clip `number` as an item; in training its choices are drawn from `seed`."""
        config, rng, stride = self.config, None, self.stride
        if self.training:
            rng = np.random.default_rng([*seed, zlib.crc32(self.example.key.encode()), number])
            stride = min(int(rng.choice(config.strides)), self.longest_stride)
        slack = self.video.num_frames - (config.num_frames - 1) * stride - 1
        if rng is None:
            start = self.starts[number]
        elif config.random_start:
            start = int(rng.integers(slack + 1))
        else:
            start = slack // 2 if self.count == 1 else number * slack // (self.count - 1)
        indices = [start + stride * step for step in range(config.num_frames)]
        frames = self._read(lambda: self.video.read(indices))  # (F, H, W, 3)
        return {
            "pixel_values_videos": _crop(frames, config, rng),
            "label": self.example.label,
            "source": self.example.key,
            "start": start,
            "stride": stride,
            "fps": float(self.video.fps),
        }


@dataclass
class _Position:
    """Where the next clip of one reader (process and worker) comes from."""

    draw: int  # videos that the reader has finished, skipped ones not counted
    clip: int  # number of the next clip within the video under way
    sources: list[list[int]]  # for each source [epoch, examples consumed in it]

    def to_list(self) -> list[int]:
        return [self.draw, self.clip, *(value for pair in self.sources for value in pair)]

    @classmethod
    def from_list(cls, values: list[int]) -> _Position:
        return cls(values[0], values[1], [list(pair) for pair in zip(values[2::2], values[3::2], strict=True)])


@dataclass
class _Cursor:
    """One reader's place in one source; `next` gives None at the end of a stream that does not repeat."""

    open_epoch: Callable[[int], Iterator[_Example]]
    require_usable: Callable[[], None]
    repeat: bool
    epoch: int
    consumed: int
    usable: bool = field(init=False)
    _iterator: Iterator[_Example] | None = None

    def __post_init__(self) -> None:
        self.usable = self.consumed > 0  # what an earlier run consumed was not necessarily broken

    def next(self) -> _Example | None:
        while True:
            if self._iterator is None:
                self._iterator = islice(self.open_epoch(self.epoch), self.consumed, None)
            example = next(self._iterator, None)
            if example is not None:
                self.consumed += 1
                return example
            if not self.usable:
                self.require_usable()
            if not self.repeat:
                self.usable = True
                return None
            self.epoch, self.consumed, self.usable, self._iterator = self.epoch + 1, 0, False, None


class ClipStream(torch.utils.data.IterableDataset):
    """Clips from one source or a mix of several, for a plain DataLoader with any number of workers (or none).

    Each item is a dict: "pixel_values_videos" uint8 (F, 3, S, S); "label" int, -1 without one (it indexes
    `sources[i].classes` of a folder); "source" str, the video's path within the folder or key within the tar; "start"
    and "stride" int, in frames of the video; "fps" float, the video's frames a second; "position" int64
    (4 + 2 * sources,), where the stream goes on after this item, for `record`.

    Every video goes to exactly one process and worker in an epoch. Videos that cannot be read or are too short are
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
            video of a source gives a clip, or a tar is damaged.
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
        self.sources = [_open_source(name, split) for name, _ in mix]
        for opened, (_, weight) in zip(self.sources, mix, strict=True):
            opened.weight = float(weight)
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
        """How many videos were skipped so far, by cause ("unreadable", "too short"), in all workers of this process."""
        return +Counter(dict(zip(SKIP_CAUSES, self._skipped.sum(0).tolist(), strict=True)))

    @property
    def epoch(self) -> int:
        """The epoch of the clip recorded last; that of the slowest source in a mix."""
        positions = [_Position.from_list(values) for values in self._current["readers"].values()]
        return min((pair[0] for position in positions for pair in position.sources), default=self._current["epoch"])

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at the start of an epoch; a state loaded for this very epoch stays in force."""
        self._first_epoch.fill_(epoch)
        if self._loaded is None or self._loaded.get("epoch") != epoch:
            self._loaded, self._current, self._recording = None, self._new_state(), False

    def record(self, batch: Mapping[str, Any]) -> None:
        """Note that a batch (or an item) was consumed, every one in turn; `state_dict` then goes on right after it."""
        values = torch.as_tensor(batch["position"]).reshape(-1, 4 + 2 * len(self.sources))[-1].tolist()
        self._recording = True
        self._note(values, next_worker=(values[0] + 1) % values[1])

    def _note(self, values: list[int], next_worker: int | None = None) -> None:
        reader, readers = values[:2]
        if "shared" in self._current or self._current["workers"] != readers:
            self._current = self._fit(self._current, readers)
        self._current["readers"][str(reader)] = values[2:]
        if next_worker is not None:
            self._current["first_worker"], self._loaded = next_worker, None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values; each process has its own.

        That is after the batch recorded last, or, where `record` is never called, after the item that this very process
        (main or worker) yielded last.
        """
        return {**self._current, "readers": dict(self._current["readers"])}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Let the next iteration go on where a state was taken: this process's, or the list of all processes' states.

        With the same sources, seed, settings and numbers of processes and workers, the clips are exactly those that
        would have come. With other numbers of them the stream goes on in the epoch of the slowest reader, and each
        reader passes over its share of what was consumed there: near the same place, but some videos of that epoch
        come twice or not at all. Give the list of all states then, since one alone has to stand for the others.

        Raises:
            ValueError: if the state belongs to another seed or another number of sources.
        """
        states = [state] if isinstance(state, Mapping) else list(state)
        for one in states:
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
        state, total = _share([state]), self.world_size * readers
        places = [[epoch, consumed // total] for epoch, consumed in state["shared"]["sources"]]
        start = _Position(state["shared"]["draws"] // total, 0, places).to_list()
        return {
            **self._new_state(readers),
            "epoch": state["epoch"],
            "readers": dict.fromkeys(map(str, range(readers)), start),
        }

    def _begin(self, worker: int, readers: int) -> tuple[int, _Position]:
        """Which reader this process or worker is, and where it starts."""
        state = self._current = self._fit(self._loaded or self._new_state(readers), readers)
        self._loaded, self._recording = None, False
        # A DataLoader always asks its worker 0 first; after a resume that must be the reader whose turn it was.
        reader = (worker + state["first_worker"]) % readers
        return reader, _Position.from_list(
            state["readers"].get(str(reader), [0, 0, *[state["epoch"], 0] * len(self.sources)])
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        readers = info.num_workers if info else 1
        reader, position = self._begin(info.id if info else 0, readers)
        mine, total = self.rank * readers + reader, self.world_size * readers
        cursors = [
            _Cursor(
                open_epoch=partial(self._examples, index, mine, total),
                require_usable=partial(self._require_usable, index),
                repeat=self.repeat,
                epoch=epoch,
                consumed=consumed,
            )
            for index, (epoch, consumed) in enumerate(position.sources)
        ]
        draw, clip, used = position.draw, position.clip, True
        while used:
            for index in self._preference(draw, mine):
                used = yield from self._draw(cursors, int(index), draw, clip, reader, readers)
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
        weights = np.array([source.weight for source in self.sources])
        return np.argsort(np.random.default_rng([self.seed, reader, draw]).exponential(size=len(weights)) / weights)

    def _examples(self, index: int, reader: int, readers: int, epoch: int) -> Iterator[_Example]:
        seed = [self.seed, index] if self.training and self.shuffle_buffer else None
        return self.sources[index].examples(seed, self.shuffle_buffer, epoch, reader, readers)

    def _draw(
        self, cursors: list[_Cursor], index: int, draw: int, clip: int, reader: int, readers: int
    ) -> Generator[dict[str, Any], None, bool]:
        """The clips, from number `clip` on, of the next usable video of a source; returns False if it is at its end."""
        cursor = cursors[index]
        while (example := cursor.next()) is not None:
            used, video = clip > 0, self._try(example, partial(_ClipCutter, example, self.config, self.training))
            while video is not None and clip < video.count:
                item = self._try(example, partial(video.cut, clip, [self.seed, index, cursor.epoch]))
                if item is None:
                    break
                used, cursor.usable, clip = True, True, clip + 1
                position = _Position(draw, clip, [[other.epoch, other.consumed] for other in cursors])
                if clip < video.count:
                    position.sources[index][1] -= 1  # the video itself is not finished
                else:
                    position.draw, position.clip = draw + 1, 0
                item["position"] = torch.tensor([reader, readers, *position.to_list()])
                if not self._recording:
                    self._note(item["position"].tolist())
                yield item
            if video is not None:
                video.video.close()
            clip = 0
            if used:
                return True
        return False

    def _try(self, example: _Example, action: Callable[[], _T]) -> _T | None:
        try:
            return action()
        except _Unusable as error:
            self._skip(example, error)
            return None

    def _skip(self, example: _Example, error: _Unusable) -> None:
        info = torch.utils.data.get_worker_info()
        self._skipped[(info.id if info else 0) % _COUNTER_ROWS, SKIP_CAUSES.index(error.cause)] += 1
        if example.key not in self._warned:  # a repeating stream meets it in every epoch
            self._warned.add(example.key)
            logger.warning("Skipped %s, %s: %s", example.key, error.cause, error)

    def _require_usable(self, index: int) -> None:
        """ValueError unless some video of a source, whichever reader it belongs to, gives a clip."""
        source, causes = self.sources[index], Counter()
        if source.known_usable:
            return
        for example in source.examples(None, 0, 0, 0, 1):
            try:
                _ClipCutter(example, self.config, self.training).cut(0, [self.seed])
                source.known_usable = True
                return
            except _Unusable as error:
                causes[error.cause] += 1
        found = ", ".join(f"{count} {cause}" for cause, count in causes.items()) or "it holds none"
        raise ValueError(f"No video of {source.name} gave a clip ({found}); mend the videos or lower num_frames.")


def _share(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A state for another number of readers: what the old ones consumed together, to be divided by the new."""
    if "shared" in states[0]:
        return dict(states[0])
    sources, old = states[0]["sources"], states[0]["world_size"] * states[0]["workers"]
    positions = [_Position.from_list(values) for state in states for values in state["readers"].values()]
    known = sum(state["workers"] for state in states)
    fresh = _Position(0, 0, [[states[0]["epoch"], 0]] * sources)
    positions += [fresh] * (known - len(positions))
    shared = []
    for index in range(sources):
        epoch = min(position.sources[index][0] for position in positions)
        consumed = [position.sources[index][1] for position in positions if position.sources[index][0] == epoch]
        # Readers that are an epoch ahead have consumed at least as much of this one as any other.
        shared.append([epoch, (sum(consumed) + max(consumed) * (known - len(consumed))) * old // known])
    draws = sum(position.draw for position in positions) * old // known
    return {**states[0], "first_worker": 0, "readers": {}, "shared": {"draws": draws, "sources": shared}}


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
    """Items -> batch: pixel_values_videos uint8 (B, F, 3, S, S); label, start, stride int64 (B,); fps float32 (B,);
    position int64 (B, 4 + 2 * sources); source, a list of B strings."""
    batch: dict[str, Any] = {"source": [item["source"] for item in items]}
    for name in ("pixel_values_videos", "position"):
        batch[name] = torch.stack([item[name] for item in items])
    for name in ("label", "start", "stride"):
        batch[name] = torch.tensor([item[name] for item in items], dtype=torch.int64)
    batch["fps"] = torch.tensor([item["fps"] for item in items], dtype=torch.float32)
    return batch


def to_float(pixel_values_videos: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1], same shape and device."""
    return pixel_values_videos.float() / 127.5 - 1.0
