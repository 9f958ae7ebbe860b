"""Shards of machines that have no `datasets`: the rows and the note of a Parquet shard in a safetensors file.

They are for the way home from a machine that only trains, where `training/pack.py --take` makes Parquet of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..models.files_evatok import MISFITS, parse_json

SUFFIX = ".safetensors"


def write(path: Path, rows: Sequence[Mapping[str, Any]], note: Mapping[str, Any]) -> None:
    """Writes rows: columns of numbers as arrays, others in the metadata.

    Arrays of different lengths lie one after another in theirs.
    """
    arrays, words, counts = {}, {}, {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if isinstance(values[0], str):
            words[name] = values
        elif isinstance(values[0], np.ndarray) and len({*map(len, values)}) > 1:
            arrays[name], counts[name] = np.concatenate(values), [*map(len, values)]
        else:
            arrays[name] = np.ascontiguousarray(values)
    save_file(arrays, path, {"note": json.dumps(note), "words": json.dumps(words), "counts": json.dumps(counts)})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The note of a shard and its columns, lists of words or of arrays, and arrays of numbers, one entry a row.

    Raises:
        ValueError: no such shard.
    """
    try:
        with safe_open(path, "np") as file:
            said = file.metadata() or {}
            columns: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        note = parse_json(said["note"], f"the note of {path}")
        columns |= parse_json(said["words"], f"the words of {path}")
        for name, counts in parse_json(said.get("counts", "{}"), f"the counts of {path}").items():
            columns[name] = np.split(columns[name], np.cumsum(counts)[:-1])
        if len({len(column) for column in columns.values()}) != 1:
            raise ValueError("its columns differ in length")
    except (OSError, SafetensorError, *MISFITS) as error:
        raise ValueError(f"{path} is no shard ({' '.join(str(error).split())[:300]}); move it away.") from error
    return note, columns


def join(paths: Sequence[Path]) -> dict[str, Any]:
    """The columns of several shards, one after another. Raises as `read`."""
    parts = [read(path)[1] for path in paths]
    return {
        name: [word for part in parts for word in part[name]]
        if isinstance(column, list)
        else np.concatenate([part[name] for part in parts])
        for name, column in parts[0].items()
    }
