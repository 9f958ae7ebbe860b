"""Sources of videos, as streams of undecoded examples: folders, WebDataset tars, datasets of the Hub, decoded videos.

`datasets` lists, shards and shuffles all but the last, which are read where it is missing, too; nothing here opens a
video.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..video.source_files import (
    ARCHIVE_SUFFIXES,
    VIDEO_SUFFIXES,
    Example,
    file_states,
    list_files,
    list_folders,
    match_files,
    printable,
)
from .clip_archives import is_number, read_archive, read_labels, to_label, to_number
from .decoded import DecodedSource, is_decoded

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

logger = logging.getLogger(__name__)

# Names that mean the same split; any of them may be asked for.
SPLITS = (("train", "training"), ("val", "validation", "valid"), ("test", "testing"))
# Videos of a tar on the Hub that tell what its labels are; of one on a disk, all do.
_FAR_LABELS = 5
_NUMBERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


@dataclass
class Source:
    """A stream of undecoded videos: rows of `dataset`, read by `to_example`.

    Attributes:
        classes: names of the classes, which labels index: sub-folders, or labels that are words; empty where labels are
            numbers.
        tars: the archives that its shards are, if they are any.
    """

    name: str
    dataset: IterableDataset
    to_example: Callable[[dict[str, Any]], Example] = itemgetter("example")
    classes: tuple[str, ...] = ()
    tars: tuple[str, ...] = ()

    @property
    def num_shards(self) -> int:
        """Number of files of videos, or videos, that it is read as."""
        return self.dataset.num_shards

    def examples(
        self, seed: list[int] | None = None, buffer: int = 0, epoch: int = 0, reader: int = 0, readers: int = 1
    ) -> Iterator[Example]:
        """One reader's part of an epoch: whole shards (files, tars) where there are enough of them, else by example."""
        from datasets.distributed import split_dataset_by_node

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
        for batch in dataset.iter(batch_size=1):
            yield self.to_example({name: values[0] for name, values in batch.items()})


def open_source(source: str | Path, split: str) -> Source | DecodedSource:
    """Find out what a source is: a folder of videos or tars, one of decoded videos (which has no splits), a tar or a
    pattern of tars, or a dataset of the Hub. Raises ValueError if it is nothing, or holds no video or not the split."""
    path = Path(source)
    if path.is_dir():
        if is_decoded(path):
            return DecodedSource(path)
        root, splits = _split_folders(path, split)
        if files := list_files(root, VIDEO_SUFFIXES):
            videos, classes = _labelled(root, splits, files)
            rows = [(video.key, video.video, video.label) for video in videos]  # which `datasets` hashes faster
            return Source(printable(root), _stream(rows, _to_video), classes=tuple(classes))
        if tars := list_files(root, ARCHIVE_SUFFIXES):
            others = [tar for folder in splits if folder != root for tar in list_files(folder, ARCHIVE_SUFFIXES)]
            return _archive_source(printable(path), list(map(str, tars)), list(map(str, others)))
        if list_files(path, (".parquet",)):
            return _hub_source(str(path), split)
        suffixes = ", ".join(VIDEO_SUFFIXES)
        raise ValueError(f"No video in {printable(root)}; expected files that end in {suffixes} or .tar.")
    name = printable(path)
    is_pattern = glob.has_magic(str(source)) or name.lower().endswith(ARCHIVE_SUFFIXES)
    files = [file for file in (match_files(str(source)) if is_pattern else [path]) if file.is_file()]
    for file in files:
        if not file.name.lower().endswith(ARCHIVE_SUFFIXES):
            raise ValueError(f"{printable(file)} is a single file; name the folder that holds the videos.")
    if files:
        return _archive_source(name, list(map(str, files)), [])
    if path.exists() and not is_pattern:
        raise ValueError(f"{name} is neither a folder nor a file; name the folder that holds the videos.")
    if is_pattern:
        raise ValueError(f"No file matches {name}; name existing .tar files, a folder or a dataset of the Hub.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"There is no folder {name}; name a folder of videos or .tar files, or a dataset of the Hub.")
    return _hub_source(name, split)


def list_videos(folder: str | Path, split: str) -> tuple[list[Example], list[str]]:
    """The videos of a folder, and the names of the classes that their labels index. Raises ValueError as
    `open_source`."""
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {printable(folder)}; name a folder of videos.")
    root, splits = _split_folders(Path(folder), split)
    if not (files := list_files(root, VIDEO_SUFFIXES)):
        raise ValueError(f"No video in {printable(root)}; expected files that end in {', '.join(VIDEO_SUFFIXES)}.")
    return _labelled(root, splits, files)


def listed(source: Source | DecodedSource) -> list[Example] | None:
    """The videos of a source that knows them by path or address; None where it has to be read to know them. Raises
    ValueError where there are none."""
    examples = source.examples()
    if (first := next(examples, None)) is None:
        raise ValueError(f"{source.name} holds no video.")
    return [first, *examples] if isinstance(first.video, str) else None


def source_state(sources: Sequence[Source | DecodedSource]) -> str:
    """`file_states` of all videos and tars of these sources that are files by themselves."""
    paths: list[str] = []
    for source in sources:
        videos = listed(source)
        paths += source.tars if videos is None else [example.video for example in videos]
    return file_states(paths)


def _aliases(split: str) -> tuple[str, ...]:
    return (split, *(alias for aliases in SPLITS for alias in aliases if split in aliases))


def _split_folders(root: Path, split: str) -> tuple[Path, list[Path]]:
    """The sub-folder of a split, and those of all splits; the folder itself if it is not divided into splits."""
    known = [root / alias for aliases in SPLITS for alias in aliases if (root / alias).is_dir()]
    if chosen := next((root / alias for alias in _aliases(split) if (root / alias).is_dir()), None):
        return chosen, [*{*known, chosen}]
    if known:
        shown = printable(root)
        others = ", ".join(folder.name for folder in known)
        raise ValueError(f"{shown} has {others} but no folder for {split!r}; add it, or ask for another split.")
    return root, [root]


def _stream(parts: list[Any], read: Callable[[Any], Iterable[Example]]) -> IterableDataset:
    """The examples in some parts, each of which is a shard of its own."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(_rows, gen_kwargs={"parts": parts, "read": read})


def _rows(parts: list[Any], read: Callable[[Any], Iterable[Example]]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for example in read(part):
            yield {"example": example}


def _to_video(row: tuple[str, str, int]) -> list[Example]:
    return [Example(*row)]


def _labelled(root: Path, splits: list[Path], files: list[Path]) -> tuple[list[Example], list[str]]:
    # The classes are those of all splits together, so that a class that one split lacks shifts no label.
    classes = sorted({printable(child.name) for folder in splits for child in list_folders(folder)})
    labels = {name: index for index, name in enumerate(classes)}
    examples = []
    for file in files:
        relative = file.relative_to(root)
        label = labels[printable(relative.parts[0])] if len(relative.parts) > 1 else -1
        examples.append(Example(printable(relative.as_posix()), str(file), label))
    return examples, classes


def _archive_source(name: str, tars: list[str], others: list[str]) -> Source:
    """Of tars, at paths or addresses; `others` are those of other splits, whose classes are the same.

    What labels are, words or numbers, the first tar with a video tells: reading all of them takes long, and only words
    need it.
    """
    first, problem = None, "they are empty"
    for tar in tars:
        found = read_labels(tar)
        found = list(found if "://" not in tar else islice(found, _FAR_LABELS))
        if first := [label for example, label in found if example.problem is None]:
            break
        problem = next((example.problem for example, _ in found), problem)
    if not first:
        raise ValueError(f"No video in the .tar files of {name}: {problem}")
    classes: list[str] = []
    if not all(label is None or is_number(label) for label in first):
        logger.info("reading the labels in %d tars of %s, which are words", len(tars) + len(others), name)
        known = {label for tar in [*tars, *others] for _, label in read_labels(tar)}
        classes = sorted(known - {None})
    read = partial(read_archive, classes={label: index for index, label in enumerate(classes)})
    return Source(name, _stream(tars, read), classes=tuple(classes), tars=tuple(tars))


def _hub_source(name: str, split: str) -> Source:
    from datasets import ClassLabel, Video
    from datasets.exceptions import DatasetNotFoundError

    shown = printable(name)
    try:
        builder = _builder(name)
        if builder.name == "webdataset":
            files = {str(key): list(map(str, found)) for key, found in builder.config.data_files.items()}
            chosen = _known_split(shown, split, files)
            return _archive_source(shown, files.pop(chosen), [tar for tars in files.values() for tar in tars])
        datasets = builder.as_streaming_dataset()
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"There is no folder {shown} and no such Hub dataset ({error}); mend the name.") from error
    dataset = datasets[_known_split(shown, split, datasets)]
    features = dataset.features or {}
    videos = [
        column
        for column, feature in features.items()
        if isinstance(feature, Video) or f".{column.rsplit('.', 1)[-1].lower()}" in VIDEO_SUFFIXES
    ]
    if len(videos) != 1:
        raise ValueError(f"{shown} must have one video column but has {videos} among {list(features)}; leave one.")
    label = next((column for column in ("label", "cls", "json") if column in features), None)
    classes, words = [], {}
    if label and isinstance(features[label], ClassLabel):
        classes = features[label].names
    elif label and getattr(features[label], "dtype", None) not in _NUMBERS:
        classes = _words(name, builder, label)
        words = {word: index for index, word in enumerate(classes)}
    # First of all: of files on the Hub, datasets decodes in threads, as a step that a later cast would not undo.
    dataset = dataset.decode(False)
    dataset = dataset.select_columns(videos + [column for column in (label, "__key__") if column in features])
    read = partial(_read_row, video=videos[0], label=label, classes=words)  # which workers may pickle
    return Source(shown, dataset, read, tuple(classes))


def _builder(name: str, **options: Any) -> DatasetBuilder:
    from datasets import load_dataset_builder

    # `datasets` takes a folder's name for a pattern, but reads the same layout of any folder that is named as one.
    if glob.has_magic(name):
        return load_dataset_builder("parquet", data_dir=glob.escape(os.path.realpath(name)), **options)
    return load_dataset_builder(name, **options)


def _known_split(name: str, split: str, found: Mapping[str, Any]) -> str:
    for alias in _aliases(split):
        if alias in found:
            return alias
    raise ValueError(f"{name} has {', '.join(found)} but nothing for {split!r}; ask for another split.")


def _words(name: str, builder: DatasetBuilder, label: str) -> list[str]:
    """The labels of all splits of a dataset, if any is a word; only their column is read where that is possible."""
    logger.info("reading the labels of %s", printable(name))
    if builder.name == "parquet":
        builder = _builder(name, columns=[label])
    splits = [dataset.select_columns([label]) for dataset in builder.as_streaming_dataset().values()]
    known = {to_label(row[label]) for rows in splits for row in rows} - {None}
    return [] if all(map(is_number, known)) else sorted(known)


def _read_row(row: dict[str, Any], video: str, label: str | None, classes: Mapping[str, int]) -> Example:
    """The example in a row of a dataset, whose columns of videos and labels are named."""
    struct = row[video] if isinstance(row[video], dict) else {"bytes": row[video], "path": None}
    path, content = struct.get("path"), struct.get("bytes") or struct.get("path") or b""
    key = row.get("__key__") or path or f"video-{zlib.crc32(content):08x}"
    word = to_label(row.get(label)) if label else None
    try:
        return Example(key, content, -1 if word is None else to_number(word, classes))
    except ValueError as error:
        return Example(key, content, -1, str(error))
