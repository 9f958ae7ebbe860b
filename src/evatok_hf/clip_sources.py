"""Where videos come from: folders, WebDataset tars and datasets of the Hub, as streams of undecoded examples.

`datasets` lists, shards and shuffles them; nothing here opens a video.
"""

from __future__ import annotations

import glob
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, IterableDataset, Value, Video, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetNotFoundError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mov", ".m4v", ".gif")
# Names that mean the same split; any of them may be asked for.
SPLITS = (("train", "training"), ("val", "validation", "valid"), ("test", "testing"))


class ArchiveError(ValueError):
    """A tar that cannot be read on."""


@dataclass(frozen=True)
class Example:
    """A video that was not opened yet: its path, address or bytes.

    Attributes:
        key: its path within the folder, or its key within the tar or dataset.
        video: path or address, or the bytes of the file.
        label: number of its class, -1 without one.
    """

    key: str
    video: str | bytes
    label: int


@dataclass
class Source:
    """A stream of undecoded videos: rows of `dataset`, read by `to_example`.

    Attributes:
        classes: names of the classes of a folder, which labels index.
        tars: the archives on this machine that its shards are, if they are any.
        weight: its share of the videos drawn from a mix.
        known_usable: whether some video of it is known to give a clip.
    """

    name: str
    dataset: IterableDataset
    to_example: Callable[[dict[str, Any]], Example]
    classes: tuple[str, ...] = ()
    weight: float = 1.0
    known_usable: bool = False
    tars: tuple[str, ...] = ()

    def examples(self, seed: list[int] | None, buffer: int, epoch: int, reader: int, readers: int) -> Iterator[Example]:
        """One reader's part of an epoch: whole shards (files, tars) where there are enough of them, else by example.

        Raises:
            ArchiveError: if a tar is damaged.
        """
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
            raise ArchiveError(f"{self.name}: cannot read an archive ({error}); make the tar anew.") from error


@dataclass
class Cursor:
    """One reader's place in one source; `next` gives None at the end of a stream that does not repeat."""

    open_epoch: Callable[[int], Iterator[Example]]
    require_usable: Callable[[], None]
    repeat: bool
    epoch: int
    consumed: int
    usable: bool = field(init=False)
    _iterator: Iterator[Example] | None = None

    def __post_init__(self) -> None:
        self.usable = self.consumed > 0  # what an earlier run consumed was not necessarily broken

    def next(self) -> Example | None:
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


def open_source(source: str | Path, split: str) -> Source:
    """Find out what a source is: a folder of videos or tars, a glob of tars, or a dataset of the Hub.

    Raises:
        ValueError: if it is nothing, or holds no video or not the split.
    """
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


def _folder_source(root: Path, split_root: Path, files: list[Path]) -> Source:
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
    return Source(str(split_root), dataset, _folder_example, tuple(classes))


def _folder_example(row: dict[str, Any]) -> Example:
    return Example(row["key"], row["video"]["path"], row["label"])


def _hub_source(name: str, split: str, tars: list[str] | None = None) -> Source:
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
    # First of all: of files on the Hub, datasets decodes in threads, as a step that a later cast would not undo.
    dataset = dataset.decode(False)
    dataset = dataset.select_columns(videos + labels + [column for column in ("__key__",) if column in features])
    return Source(name, dataset, _RowReader(videos[0], labels[0] if labels else None), tars=tuple(tars or ()))


@dataclass(frozen=True)
class _RowReader:
    """Row of a dataset -> example; a class rather than a closure because workers may pickle it."""

    video: str
    label: str | None

    def __call__(self, row: dict[str, Any]) -> Example:
        value, label = row[self.video], row.get(self.label) if self.label else None
        label = label.get("label") if isinstance(label, dict) else label
        struct = value if isinstance(value, dict) else {"bytes": value, "path": None}
        path, video = struct.get("path"), struct.get("bytes") or struct.get("path") or b""
        key = row.get("__key__") or path or f"video-{zlib.crc32(video):08x}"
        return Example(key, video, label if isinstance(label, int) else -1)
