"""Data sets that grow shard by shard: Parquet files that `datasets` reads, each there as a whole or not at all.

A shard's schema metadata has a note, in which a run keeps its settings and its place, so that it can go on after it.
Its own metadata has a checksum of all its bytes, made with zeros in the place of the checksum; it is held against the
bytes whenever a shard is read. Shards of before have none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.files_evatok import MISFITS, Replacement, parse_json
from ..video.source_files import printable
from . import plain_shards

if TYPE_CHECKING:
    import pyarrow
    from datasets import Features

_NOTE = b"evatok_hf"
_SUM, _NO_SUM = b"evatok_hf_sha256", b"0" * 64
# As the metadata of a file has it: key, type and length of the value, value.
_SUM_WRITTEN = re.compile(_SUM + rb"\x18\x40([0-9a-f]{64})")
# Of all columns together: 512 MB of ids in memory. A thousand clips have some hundred thousand.
_MAX_VALUES = 1 << 27


@dataclass(frozen=True)
class ShardKind:
    """One kind of shards, `data/NAME-LANE-NUMBER.parquet` of a folder, .safetensors where `datasets` is missing."""

    name: str
    rows: str  # what messages call them
    summary: str  # the file that a finished folder has beside them

    def path(self, folder: Path, lane: int, number: int) -> Path:
        suffix = ".parquet" if find_spec("datasets") else plain_shards.SUFFIX
        return folder / "data" / f"{self.name}-{lane:04d}-{number:06d}{suffix}"

    def place(self, path: Path) -> tuple[int, int]:
        """The lane of a shard, and which of its shards it is. Raises ValueError for a file that is named otherwise."""
        if (found := re.fullmatch(rf"{self.name}-(\d+)-(\d+)", path.stem)) is None:
            raise ValueError(f"{path} is not named as a shard of {self.rows}; move it away.")
        return int(found[1]), int(found[2])

    def check(self, folder: Path) -> None:
        """Raises ValueError for a folder whose name Arrow cannot open."""
        if printable(folder) != str(folder):
            raise ValueError(f"the name of {printable(folder)} is no UTF-8, as Parquet needs; choose another folder.")

    def list(self, folder: Path, lane: int | None = None) -> list[Path]:
        """Complete shards in order, of one lane or of all."""
        pattern = f"{self.name}-{'*' if lane is None else f'{lane:04d}'}-*"
        found = (folder / "data").glob(pattern)
        return sorted(path for path in found if path.suffix in (".parquet", plain_shards.SUFFIX))

    def begun(self, folder: Path) -> bool:
        """Tells whether a folder holds any of these, finished or not."""
        return bool(self.list(folder)) or (folder / self.summary).exists()

    def write(
        self, path: Path, rows: Sequence[Mapping[str, Any]], features: Features | None, note: Mapping[str, Any]
    ) -> None:
        """Writes a shard under a temporary name and renames it; `note` goes into its metadata."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with Replacement(path) as partial:
            if path.suffix == plain_shards.SUFFIX:
                plain_shards.write(partial, rows, note)
            else:
                table = to_table(rows, features.arrow_schema)
                metadata = {**table.schema.metadata, _NOTE: json.dumps(note).encode()}
                _write_summed(table.replace_schema_metadata(metadata), partial)

    def read(self, path: Path, columns: Sequence[str] = ()) -> tuple[dict[str, Any], Any]:
        """The note of a shard, and columns by name, as pyarrow has them, or all columns as `plain_shards` has them.

        Raises:
            ValueError: no shard, or one that was changed since it was written.
        """
        if path.suffix == plain_shards.SUFFIX:
            return plain_shards.read(path)
        import pyarrow
        import pyarrow.parquet as pq

        try:
            content = path.read_bytes()
            if _SUM in content and not is_whole(content):
                raise ValueError(
                    f"{path} is damaged: its checksum is another; fetch it again, or move it away and make it anew."
                )
            file = pq.ParquetFile(pyarrow.BufferReader(content))
            written = (file.schema_arrow.metadata or {})[_NOTE]
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            values = sum(group.column(index).num_values for group in groups for index in range(group.num_columns))
            if max(values, file.metadata.num_rows) > _MAX_VALUES:
                raise ValueError(f"it says that it holds {values:,} values, more than {_MAX_VALUES:,}")
            table = file.read(columns=[*columns])
        except (OSError, pyarrow.ArrowException, *MISFITS) as error:
            if str(error).startswith(f"{path} is damaged"):
                raise
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} is no shard of {self.rows} ({reason}); move it away.") from error
        return parse_json(written, f"the note of {path}"), table

    def read_note(self, path: Path) -> dict[str, Any]:
        """The facts that `write` put into a shard. Raises as `read`."""
        return self.read(path)[0]


def to_table(rows: Sequence[Mapping[str, Any]], schema: pyarrow.Schema) -> pyarrow.Table:
    """Rows as the table that `datasets` makes of them, many times faster; `schema` is that of its features."""
    import pyarrow

    def column(field: pyarrow.Field) -> pyarrow.Array:
        values = [row[field.name] for row in rows]
        if not isinstance(field.type, pyarrow.ExtensionType):
            return pyarrow.array(values, type=field.type)
        values = [list(np.asarray(value, field.type.value_type)) for value in values]  # matrices
        stored = pyarrow.array(values, type=field.type.storage_type)
        return pyarrow.ExtensionArray.from_storage(field.type, stored)

    return pyarrow.table([column(field) for field in schema], schema=schema)


def _write_summed(table: pyarrow.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_SUM.decode(): _NO_SUM.decode()})
    with open(path, "r+b") as file:
        content = file.read()
        file.seek(_SUM_WRITTEN.search(content).start(1))
        file.write(hashlib.sha256(content).hexdigest().encode())


def is_whole(content: bytes) -> bool:
    """Tells whether the bytes of a shard are those that its checksum was made of."""
    *_, found = [None, *_SUM_WRITTEN.finditer(content)]
    if found is None:
        return False
    digest = hashlib.sha256(content[: found.start(1)])
    digest.update(_NO_SUM)
    digest.update(memoryview(content)[found.end(1) :])
    return digest.hexdigest().encode() == found[1]
