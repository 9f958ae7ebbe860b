"""The files of a training checkpoint: whether all of them are there and whole, before anything of them is used.

accelerate writes optimisers, schedulers, random states and what is registered as pickles. They are read as weights
only, so that no code in them can run, and only in the format that torch writes.
"""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load
from safetensors import SafetensorError, safe_open

from evatok_hf.models.checkpoint_evatok import one_line
from evatok_hf.models.files_evatok import checked, read_json, ruled, table_of, text

CHECKSUMS = "checksums.json"
_PICKLES = (".bin", ".pkl", ".pt")


@checked
@dataclass
class _Checksums:
    files: dict = ruled(table_of(text(64)))


def write_checksums(folder: Path) -> None:
    """Notes the SHA-256 of every file of a checkpoint in it."""
    (folder / CHECKSUMS).write_text(json.dumps({"files": _digests(folder)}, indent=2) + "\n", encoding="utf-8")


def check_files(folder: Path) -> None:
    """Reads all files of a checkpoint; those of before have no checksums.

    Raises:
        ValueError: naming the file that is missing, damaged, or something else than it should be.
    """
    try:
        if (folder / CHECKSUMS).is_file():
            found = _digests(folder)
            for name, written in read_json(folder / CHECKSUMS, _Checksums)["files"].items():
                if name not in found:
                    raise ValueError(f"{folder / name} is missing.")
                if found[name] != written:
                    raise ValueError(f"{folder / name} is damaged: its checksum is another.")
        for path in sorted(folder.rglob("*")):
            if path.suffix in _PICKLES:
                _read_pickle(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                read_json(path)
        processes = len(list(folder.glob("stream-*.json"))) or len(list(folder.glob("random_states_*.pkl"))) or 1
        for process in range(processes):
            _check_random_state(folder / f"random_states_{process}.pkl")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}).") from error
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror}).") from error


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, by its name in it."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(1 << 22):
                    digest.update(piece)
            digests[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return digests


def _read_pickle(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut, or no file of torch.")
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"{bad} in it is damaged")
        return load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # what is damaged may fail in any way
        reason = one_line(error)[:300]
        raise ValueError(f"{path} is damaged, or holds something that is no weights ({reason}).") from error


def _check_random_state(path: Path) -> None:
    """accelerate would go on without it, and the run would be another."""
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    states = _read_pickle(path)
    try:
        random.Random().setstate(states["random_state"])
        np.random.RandomState().set_state(states["numpy_random_seed"])
        torch.Generator().set_state(states["torch_manual_seed"])
    except Exception as error:
        raise ValueError(f"{path} holds no random state ({' '.join(str(error).split())[:300]}).") from error
