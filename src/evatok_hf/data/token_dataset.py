"""Tokens of clips on disk, for the training of generators: Parquet shards that `datasets` reads.

A folder holds `data/tokens-LANE-SHARD.parquet` (see `data.shard_folder`), and when it is finished `tokens.json`
(tokenizer, allocation, classes, settings, counts) and `README.md`. A row is a clip: where it was cut, and its tokens,
block after block. The clips themselves are not stored: they are the sources' (size, licences).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..models.files_evatok import (
    MISFITS,
    check,
    checked,
    list_of,
    named,
    optional,
    read_json,
    ruled,
    table_of,
    text,
    whole,
)
from ..models.tokens_evatok import VideoTokens
from ..video.source_files import printable
from .parquet_shards import ShardKind

if TYPE_CHECKING:
    from datasets import Features

    from ..allocation.strategies import Allocation
    from .clip_cutting import ClipConfig

SUMMARY = "tokens.json"
SHARDS = ShardKind("tokens", "tokens", SUMMARY)
FINGERPRINT = text(128)


@checked
@dataclass
class _Summary:
    """Fields that `tokens.json` must have."""

    classes: list = ruled(list_of(text(1000), 1 << 20))
    codebook_size: int = ruled(whole(1, 1 << 24))
    block_lengths: list = ruled(list_of(whole(1, 1 << 16), 64, least=1))
    num_blocks: int = ruled(whole(1, 1024))
    tokenizer_fingerprint: str = ruled(FINGERPRINT)
    known_frames: int | None = ruled(optional(whole(1, 8192)))
    clips: int = ruled(whole(0, 1 << 40))
    sources: list = ruled(list_of(text(), 10_000), ())
    skipped: dict | None = ruled(optional(table_of(whole(0, 1 << 40))), None)


@checked
@dataclass
class _Made:
    """Settings in the note of a shard, of which only the tokens are read."""

    tokenizer_fingerprint: str = ruled(FINGERPRINT)


def features(num_blocks: int, classes: Sequence[str] = (), conditions: bool = False) -> Features:
    """Columns of a shard.

    Args:
        num_blocks: temporal blocks T of a clip.
        classes: names in the order of labels; without any, labels are plain numbers.
        conditions: with the tokens of what is shown in frame prediction.
    """
    from datasets import ClassLabel, Features, List, Value  # not where tokens are only read

    columns = {
        "source": Value("string"),
        "origin": Value("int32"),
        "label": ClassLabel(names=list(classes)) if classes else Value("int64"),  # -1 is no class in both
        "frames": List(Value("int32")),
        "crop": List(Value("int32"), length=4),
        "fps": Value("float32"),
    }
    for prefix in ("", "condition_") if conditions else ("",):
        columns[f"{prefix}lengths"] = List(Value("int32"), length=num_blocks)
        columns[f"{prefix}ids"] = List(Value("int32"))
    return Features(columns)


def make_rows(batch: Mapping[str, Any], tokens: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Rows of a batch of `ClipStream` and the tokens of its clips."""
    return [
        {
            "source": source,
            "origin": int(batch["origin"][index]),
            "label": int(batch["label"][index]),
            "frames": batch["frames"][index].to(torch.int32).numpy(),
            "crop": batch["crop"][index].tolist(),
            "fps": float(batch["fps"][index]),
            **{name: values.to(torch.int32).numpy() for name, values in tokens[index].items()},
        }
        for index, source in enumerate(batch["source"])
    ]


def shard_settings(
    mix: Sequence[tuple[str, float]],
    counted: str,
    options: Any,
    clips: ClipConfig,
    allocation: Allocation,
    classes: Sequence[str],
) -> dict[str, Any]:
    """All that the shards of a command depend on, as JSON keeps it.

    Args:
        mix: sources and their weights.
        counted: what the command counts off: "videos" of units, "epochs" or "clips" of processes.
        options: of the command.
        clips: how views are cut.
        allocation: how lengths are chosen, bound.
        classes: of all sources.
    """
    cut = ("clips_per_video", "random_position", "flip_probability", "random_start")
    return {
        "sources": [printable(name) for name, _ in mix],
        "weights": [weight for _, weight in mix],
        "counted": counted,
        **{name: getattr(options, name) for name in ("split", "views", "seed", "known_frames", "shard_size")},
        **{name: getattr(clips, name) for name in cut},
        "strides": list(clips.strides),
        "scale": list(clips.scale),
        "tokenizer_fingerprint": allocation.model.fingerprint(),
        **allocation.describe(),
        "classes": list(classes),
    }


def read_summary(folder: Path) -> dict[str, Any]:
    """The contents of `tokens.json`. Raises ValueError for a damaged one, OSError where it cannot be read."""
    return read_json(folder / SUMMARY, _Summary)


@dataclass
class TokenRow:
    """The tokens of a clip.

    Attributes:
        source: the video, within its source.
        label: number of its class, -1 without one.
        fps: frames a second of the video.
        lengths: (T,) int64, tokens of each block.
        ids: (N,) int64, block after block.
        condition_lengths, condition_ids: the same of the clip that stands still from its last known frame on, or None.
    """

    source: str
    label: int
    fps: float
    lengths: torch.Tensor
    ids: torch.Tensor
    condition_lengths: torch.Tensor | None = None
    condition_ids: torch.Tensor | None = None


class _Tokens:
    """Lengths (N, T) and ids of many clips, packed into flat arrays."""

    def __init__(self, lengths: list[np.ndarray], ids: list[np.ndarray]):
        self.lengths, self.ids = np.concatenate(lengths), np.concatenate(ids)
        self.counts = self.lengths.sum(1, dtype=np.int64)
        self.ends = self.counts.cumsum()

    def row(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.ends[index]
        ids = self.ids[end - self.counts[index] : end]
        return torch.from_numpy(self.lengths[index].astype(np.int64)), torch.from_numpy(ids.astype(np.int64))


class TokenDataset(torch.utils.data.Dataset):
    """A finished folder of tokens; item `index` is a `TokenRow`.

    The tokens of all clips are in memory as flat arrays, two bytes a token for codebooks up to 65,536 and else four, so
    that millions of clips are a few gigabytes, shared with forked loader processes.

    Args:
        folder: with the shards.
        summary: the contents of its `tokens.json`.

    Attributes:
        folder, summary: as given.
        classes: names in the order of labels; empty where there are none.

    Raises:
        ValueError: shards that are missing, damaged, or of another tokenizer than the summary says.
    """

    def __init__(self, folder: Path, summary: Mapping[str, Any]):
        self.folder, self.summary = folder, dict(summary)
        self.classes: list[str] = list(summary["classes"])
        prefixes = [""] if summary["known_frames"] is None else ["", "condition_"]
        parts = [self._read(path, prefixes) for path in SHARDS.list(folder)]
        found = sum(len(part["label"]) for part in parts)
        if found != summary["clips"] or not parts:
            raise ValueError(
                f"{folder} should hold {summary['clips']} clips and holds {found}; fetch it again, or run "
                "training/tokenize_dataset.py --resume true (or `evatok tokenize-dataset` again) if it was interrupted "
                "while it grew."
            )
        columns = {name: [part[name] for part in parts] for name in parts[0]}
        self._tokens = _Tokens(columns["lengths"], columns["ids"])
        self._conditions = None
        if len(prefixes) > 1:
            self._conditions = _Tokens(columns["condition_lengths"], columns["condition_ids"])
        self._labels, self._fps = np.concatenate(columns["label"]), np.concatenate(columns["fps"])
        if any(isinstance(column, list) for column in columns["source"]):
            self._sources = [str(name) for column in columns["source"] for name in column]
        else:
            import pyarrow

            self._sources = pyarrow.chunked_array([chunk for column in columns["source"] for chunk in column.chunks])

    @classmethod
    def load(
        cls, folder_or_hub_id: str | Path, token: str | bool | None = None, revision: str | None = None
    ) -> TokenDataset:
        """Loads a folder, or a data set of the Hub.

        Args:
            folder_or_hub_id: a folder, or owner/name.
            token: for private data sets; by default the one of `hf auth login`.
            revision: branch, tag or commit on the Hub.

        Raises:
            ValueError: no such folder or data set, one without tokens or with unfinished ones; and as the class.
        """
        name, folder = str(folder_or_hub_id), Path(folder_or_hub_id).expanduser()
        if not folder.is_dir():
            if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
                raise ValueError(
                    f"there is no folder {name}; name a folder of tokens, or a data set of the Hub, owner/name."
                )
            from ..models.checkpoint_evatok import download  # with transformers, which takes seconds

            hub = {"repo_type": "dataset", "revision": revision, "token": token}
            folder = download(name, [SUMMARY, "data/*"], "data set", **hub)
        try:
            summary = read_summary(folder)
        except FileNotFoundError as error:
            if SHARDS.list(folder):
                raise ValueError(
                    f"{folder} has no {SUMMARY}, so its tokens are not finished; go on with "
                    "training/tokenize_dataset.py --resume true, or repeat `evatok tokenize-dataset`."
                ) from error
            raise ValueError(
                f"{folder} holds no tokens; make some with training/tokenize_dataset.py or `evatok tokenize-dataset`."
            ) from error
        except OSError as error:
            raise ValueError(f"{folder / SUMMARY} cannot be read ({error.strerror}); fetch it again.") from error
        return cls(folder, summary)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> TokenRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index = int(index) % len(self)
        condition = (None, None) if self._conditions is None else self._conditions.row(index)
        source, label = str(self._sources[index]), int(self._labels[index])
        return TokenRow(source, label, float(self._fps[index]), *self._tokens.row(index), *condition)

    def clips(self, indices: Iterable[int]) -> VideoTokens:
        """Tokens of some clips, in that order, which the tokenizer that made them decodes.

        Raises:
            ValueError: no indices.
        """
        rows = [self[index] for index in indices]
        if not rows:
            raise ValueError("name one clip at least.")
        return VideoTokens(
            torch.cat([row.ids for row in rows]),
            torch.stack([row.lengths for row in rows]),
            fps=rows[0].fps,
            fingerprint=self.summary["tokenizer_fingerprint"],
        )

    def lengths(self) -> np.ndarray:
        """(N, T) int32, tokens of each block of every clip."""
        return self._tokens.lengths

    def counts(self) -> np.ndarray:
        """(N,) int64, tokens of every clip."""
        return self._tokens.counts

    def condition_counts(self) -> np.ndarray | None:
        """(N,) int64, tokens of every clip's condition; None where there are no conditions."""
        return None if self._conditions is None else self._conditions.counts

    def labels(self) -> np.ndarray:
        """(N,) int64, number of every clip's class, -1 without one."""
        return self._labels

    def _read(self, path: Path, prefixes: list[str]) -> dict[str, Any]:
        """The columns of a shard, checked: lengths (n, T) int32, ids flat, the others (n,)."""
        names = ["source", "label", "fps", *(f"{prefix}{name}" for prefix in prefixes for name in ("lengths", "ids"))]
        note, columns = SHARDS.read(path, names)
        with named(f"the note of {path}"):
            made = check(_Made, note.get("settings")).tokenizer_fingerprint
        expected = self.summary["tokenizer_fingerprint"]
        if made != expected:
            raise ValueError(
                f"{path} was made by tokenizer {made}, {SUMMARY} speaks of {expected}; keep tokens of different "
                "tokenizers in different folders."
            )
        try:
            part = {"source": columns["source"], **{name: np.asarray(columns[name]) for name in ("label", "fps")}}
            for prefix in prefixes:
                part[f"{prefix}lengths"] = self._lengths(columns[f"{prefix}lengths"])
                part[f"{prefix}ids"] = self._ids(columns[f"{prefix}ids"], part[f"{prefix}lengths"])
            labels = part["label"]  # none, in a unit of evatok tokenize-dataset of which no video gave a clip
            if len(labels) and (labels.min() < -1 or (self.classes and labels.max() >= len(self.classes))):
                raise ValueError(f"labels run from {labels.min()} to {labels.max()}")
        except (NotImplementedError, *MISFITS) as error:  # what pyarrow does not do with a type
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} is damaged ({reason}); fetch it again, or make the tokens anew.") from error
        return part

    def _lengths(self, column: Any) -> np.ndarray:
        blocks, candidates = self.summary["num_blocks"], self.summary["block_lengths"]
        values, counts = _flatten(column)
        if (counts != blocks).any() or not np.isin(values, candidates).all():
            raise ValueError(f"lengths are not {blocks} of {candidates}")
        return values.reshape(-1, blocks)

    def _ids(self, column: Any, lengths: np.ndarray) -> np.ndarray:
        size = self.summary["codebook_size"]
        values, counts = _flatten(column)
        if (counts != lengths.sum(1)).any():
            raise ValueError("there are more or fewer ids than its lengths say")
        if len(values) and (values.min() < 0 or values.max() >= size):
            raise ValueError(f"ids run from {values.min()} to {values.max()}, the codebook has {size}")
        return values.astype(np.uint16 if size <= 2**16 else np.int32)


def _flatten(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists -> all values in a row, and how many each list has."""
    if isinstance(column, (list, np.ndarray)):  # of a shard without `datasets`
        return np.concatenate([*column]), np.array([*map(len, column)])
    import pyarrow.compute as pc

    array = column.combine_chunks()
    return array.flatten().to_numpy(), pc.list_value_length(array).to_numpy()
