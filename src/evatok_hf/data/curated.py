"""Curated clips on disk: what every assignment does to each of them, as Parquet shards that `datasets` reads.

A folder holds `data/curated-RANK-SHARD.parquet`, and when it is finished `curation.json` (space, metric, bounds,
fingerprint of the proxy, settings, counts) and `README.md`. A row is a clip: where it was cut, so that it can be cut
again, and its figures. The clips themselves are not stored: they are the sources' (size, licences).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..allocation.reward import DistanceBounds
from ..allocation.search import SearchResult, num_nodes
from ..models.configuration_evatok import AssignmentSpace
from ..models.files_evatok import checked, list_of, named, number, read_json, record, ruled, table_of, text, whole
from . import plain_shards
from .clip_cutting import ClipConfig, ClipCutter, Crop, Unusable
from .clip_sources import open_source
from .parquet_shards import ShardKind

if TYPE_CHECKING:
    from datasets import Dataset, Features

SUMMARY = "curation.json"
SHARDS = ShardKind("curated", "curated clips", SUMMARY)
_MAX_ASSIGNMENTS = 1_000_000
read_note, list_shards = SHARDS.read_note, SHARDS.list


def features(space: AssignmentSpace) -> Features:
    """Columns of a shard; `table` and `nodes` as `SearchResult` has them."""
    from datasets import Array2D, Features, Value
    from datasets import Sequence as ListOf

    return Features(
        {
            "clip_id": Value("string"),
            "origin": Value("int32"),
            "source": Value("string"),
            "label": Value("int64"),
            "frames": ListOf(Value("int32")),
            "crop": ListOf(Value("int32"), length=4),
            "fps": Value("float32"),
            "table": Array2D((len(space), 3), "float16"),
            "nodes": Array2D((num_nodes(space), 2), "float32"),
        }
    )


def make_rows(batch: Mapping[str, Any], result: SearchResult) -> list[dict[str, Any]]:
    """Rows of a batch of `ClipStream` and its search."""
    table, nodes = result.table().half().numpy(), torch.stack([result.distance, result.mse], dim=-1).numpy()
    rows = []
    for index, source in enumerate(batch["source"]):
        frames, crop, origin = batch["frames"][index].tolist(), batch["crop"][index].tolist(), batch["origin"][index]
        place = "_".join(map(str, (frames[0], frames[-1], *crop)))
        rows.append(
            {
                "clip_id": f"{int(origin)}/{source}#{place}",
                "origin": int(origin),
                "source": source,
                "label": int(batch["label"][index]),
                "frames": frames,
                "crop": crop,
                "fps": float(batch["fps"][index]),
                "table": table[index],
                "nodes": nodes[index],
            }
        )
    return rows


def read_rows(folder: Path) -> Dataset | dict[str, Any] | None:
    """The rows of all shards of a folder, by column; None where there is none. Raises ValueError for damaged ones."""
    shards = list_shards(folder)
    if any(path.suffix == plain_shards.SUFFIX for path in shards):
        return plain_shards.join(shards)
    for path in shards:
        read_note(path)  # that it is whole
    if not shards:
        return None
    from datasets import Dataset

    return Dataset.from_parquet([str(path) for path in shards], keep_in_memory=True)


def figures(rows: Dataset | dict[str, Any], space: AssignmentSpace) -> SearchResult:
    """All clips' figures at full precision, (N, nodes) each."""
    nodes = rows["nodes"] if isinstance(rows, dict) else np.stack(rows.with_format("numpy")["nodes"][:])
    nodes = torch.from_numpy(nodes).float()
    return SearchResult(space, mse=nodes[..., 1], distance=nodes[..., 0])


@checked
@dataclass
class _Clip:
    num_frames: int = ruled(whole(1, 8192))
    image_size: int = ruled(whole(1, 8192))


@checked
@dataclass
class _Summary:
    """Fields that `curation.json` must have."""

    block_lengths: list = ruled(list_of(whole(1, 1 << 16), 64, least=1))
    num_blocks: int = ruled(whole(1, 1024))
    bounds: dict = ruled(table_of(number(0, 1e9)))
    clips: int = ruled(whole(0, 1 << 40))
    clip: dict = ruled(record(_Clip))
    sources: list = ruled(list_of(text(), 10_000))


@dataclass
class CuratedClips:
    """A finished folder of curated clips.

    Attributes:
        folder: where it lies.
        summary: the contents of its `curation.json`.
        rows: its columns, those of `features`, by name: a `datasets.Dataset`, or a dict where that is not installed.
        space: the assignments of its tables.
        bounds: of its distance.
    """

    folder: Path
    summary: dict[str, Any]
    rows: Dataset | dict[str, Any]
    space: AssignmentSpace
    bounds: DistanceBounds

    @classmethod
    def load(cls, folder: str | Path) -> CuratedClips:
        """Raises ValueError when the folder is none, or its curation was not finished."""
        folder = Path(folder)
        try:
            summary = read_json(folder / SUMMARY, _Summary)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} holds no finished curation ({error}); run training/curate.py, with --resume true if it "
                "was interrupted."
            ) from error
        with named(folder / SUMMARY):
            space = AssignmentSpace(summary["block_lengths"], summary["num_blocks"])
            bounds = DistanceBounds(summary["bounds"]["low"], summary["bounds"]["high"])
            if len(space) > _MAX_ASSIGNMENTS:
                raise ValueError(f"block_lengths and num_blocks make {len(space):,} assignments")
        rows = read_rows(folder)
        if (found := 0 if rows is None else len(rows["clip_id"])) != summary["clips"]:
            raise ValueError(
                f"{folder} should hold {summary['clips']} clips and holds {found}; fetch it again, or "
                "run training/curate.py --resume true if it was interrupted while it grew."
            )
        for name, feature in features(space).items() if not isinstance(rows, dict) else ():
            if rows.features.get(name) != feature:
                raise ValueError(
                    f"{folder}: its clips have {name} {rows.features.get(name)}, {SUMMARY} asks for {feature}; "
                    "they are of another space, so fetch the folder again."
                )
        return cls(folder, summary, rows, space, bounds)

    def __len__(self) -> int:
        return len(self.rows["clip_id"])

    def figures(self) -> SearchResult:
        """All clips' figures at full precision, (N, nodes) each."""
        return figures(self.rows, self.space)

    def distances(self) -> torch.Tensor:
        """(N, A) float32 perceptual distances, NaN where a curation left assignments out."""
        return self.figures().table()[..., 0]

    def cut(self, sources: Sequence[str | Path], split: str = "train", progress: bool = False) -> np.ndarray:
        """Cuts every clip again: (N, F, 3, S, S) uint8, in the order of the rows, in memory.

        Args:
            sources: the sources of the curation, in its order; they may have moved.
            split: as there.
            progress: show a progress bar.

        Raises:
            ValueError: another number of sources, or clips that are not there any more.
        """
        out = np.zeros((len(self), *self.clip_shape), dtype=np.uint8)
        self.cut_into(out, sources, split, progress)
        return out

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(F, 3, S, S)."""
        clip = self.summary["clip"]
        return clip["num_frames"], 3, clip["image_size"], clip["image_size"]

    def cut_into(self, out: np.ndarray, sources: Sequence[str | Path], split: str, progress: bool = False) -> None:
        """As `cut`, into an array of that shape, which may be a memory map."""
        from tqdm.auto import tqdm

        if len(sources) != len(self.summary["sources"]):
            raise ValueError(
                f"{self.folder} was curated from {len(self.summary['sources'])} source(s), "
                f"{self.summary['sources']}; name them in that order, got {list(map(str, sources))}."
            )
        wanted: dict[tuple[int, str], list[int]] = {}
        for row, place in enumerate(zip(self.rows["origin"][:], self.rows["source"][:], strict=True)):
            wanted.setdefault((int(place[0]), place[1]), []).append(row)
        frames, crops = self.rows["frames"][:], self.rows["crop"][:]
        config = ClipConfig(num_frames=self.clip_shape[0], image_size=self.clip_shape[-1])
        with tqdm(total=len(self), unit="clip", desc="cutting clips", disable=not progress) as bar:
            for origin, name in enumerate(sources):
                for example in open_source(name, split).examples():
                    if not (chosen := wanted.pop((origin, example.key), [])):
                        continue
                    try:
                        with ClipCutter(example, config, training=False) as video:
                            for row in chosen:
                                out[row] = video.recut(frames[row], Crop(*map(int, crops[row]))).numpy()
                                bar.update()
                    except Unusable as error:
                        raise ValueError(f"{name}: {example.key} cannot be read any more ({error}).") from error
        if wanted:
            (origin, key), *_ = wanted
            raise ValueError(
                f"{len(wanted)} curated video(s) are not there any more, first {key} of source {origin} "
                f"({sources[origin]}); name the sources that were curated."
            )
