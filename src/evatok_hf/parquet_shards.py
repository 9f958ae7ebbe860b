"""Data sets that grow shard by shard: Parquet files that `datasets` reads, each there as a whole or not at all.

A shard's schema metadata has a note, in which a run keeps its settings and its place, so that it can go on after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files_evatok import Replacement
from .source_files import printable

if TYPE_CHECKING:
    import pyarrow
    from datasets import Features

_NOTE = b"evatok_hf"


@dataclass(frozen=True)
class ShardKind:
    """One kind of shards, `data/NAME-RANK-SHARD.parquet` of a folder.

    Attributes:
        name: how their files begin.
        rows: what messages call their rows.
    """

    name: str
    rows: str

    def path(self, folder: Path, rank: int, number: int) -> Path:
        return folder / "data" / f"{self.name}-{rank:04d}-{number:06d}.parquet"

    def check(self, folder: Path) -> None:
        """Raises ValueError for a folder whose name Arrow cannot open."""
        if printable(folder) != str(folder):
            raise ValueError(f"the name of {printable(folder)} is no UTF-8, as Parquet needs; choose another folder.")

    def list(self, folder: Path, rank: int | None = None) -> list[Path]:
        """Complete shards in order, of one process or of all."""
        return sorted((folder / "data").glob(f"{self.name}-{'*' if rank is None else f'{rank:04d}'}-*.parquet"))

    def write(self, path: Path, rows: Sequence[Mapping[str, Any]], features: Features, note: Mapping[str, Any]) -> None:
        """Writes a shard under a temporary name and renames it; `note` goes into its metadata."""
        from datasets import Dataset

        data = Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
        self.write_table(path, data.with_format("arrow")[:], note)

    def write_table(self, path: Path, table: pyarrow.Table, note: Mapping[str, Any]) -> None:
        """`write` of rows that are a table of `datasets` already."""
        import pyarrow.parquet as pq

        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _NOTE: json.dumps(note).encode()})
        path.parent.mkdir(parents=True, exist_ok=True)
        with Replacement(path) as partial:
            pq.write_table(table, partial, compression="zstd")

    def read_note(self, path: Path) -> dict[str, Any]:
        """The facts that `write` put into a shard. Raises ValueError when it is none."""
        import pyarrow
        import pyarrow.parquet as pq

        try:
            return json.loads(pq.read_schema(path).metadata[_NOTE])
        except (OSError, pyarrow.ArrowInvalid, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no shard of {self.rows} ({error}); move it away.") from error
