"""The files of a training checkpoint: whether all of them are there and whole, before anything of them is used.

accelerate writes optimisers, schedulers, random states and what is registered as pickles. They are read as weights
only, so that no code in them can run, and only in the format that torch writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pickle import PickleError
from typing import Any

import numpy as np
import torch
from accelerate.utils import load
from safetensors import SafetensorError, safe_open

from evatok_hf.models.checkpoint_evatok import one_line
from evatok_hf.models.files_evatok import MISFITS, Rule, checked, read_json, ruled, table_of, text

CHECKSUMS = "checksums.json"
_PICKLES = (".bin", ".pkl", ".pt")
_NAME = Rule(
    "names of files in the checkpoint, each with its checksum",
    lambda value: (
        table_of(text(64)).allows(value)
        and all(
            0 < len(name) < 256 and ".." not in PurePosixPath(name).parts and not PurePosixPath(name).is_absolute()
            for name in value
        )
    ),
)


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be gone on from."""


@checked
@dataclass
class _Checksums:
    files: dict = ruled(_NAME)


def write_checksums(folder: Path) -> None:
    """Notes the SHA-256 of every file of a checkpoint in it."""
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / CHECKSUMS).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def check_files(folder: Path) -> None:
    """Reads all files of a checkpoint once; those of before have no checksums.

    Raises:
        DamagedCheckpoint: naming the file that is missing, damaged, or something else than it should be.
    """
    try:
        _check_sums(folder)
        for path in sorted(folder.rglob("*")):
            if path.suffix in _PICKLES:
                _check_pickle(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                read_json(path)
        processes = len(list(folder.glob("stream-*.json"))) or len(list(folder.glob("random_states_*.pkl"))) or 1
        for process in range(processes):
            _check_random_state(folder / f"random_states_{process}.pkl")
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path} is damaged ({' '.join(str(error).split())}).") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{folder} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error


@contextmanager
def weights_only() -> Iterator[None]:
    """torch reads files as weights only inside, also where accelerate asks for more."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _check_sums(folder: Path) -> None:
    if not (folder / CHECKSUMS).is_file():
        return
    for name, written in read_json(folder / CHECKSUMS, _Checksums)["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing.")
        if _digest(folder / name) != written:
            raise ValueError(f"{folder / name} is damaged: its checksum is another.")


def _check_pickle(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut, or no file of torch.")
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"{bad} in it is damaged")
        return load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*MISFITS, OSError, EOFError, RuntimeError, PickleError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged, or holds something that is no weights ({one_line(error)[:300]})."
        ) from error


def _check_random_state(path: Path) -> None:
    """accelerate would go on without it, and the run would be another."""
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    states = _check_pickle(path)
    try:
        random.Random().setstate(states["random_state"])
        np.random.RandomState().set_state(states["numpy_random_seed"])
        torch.Generator().set_state(states["torch_manual_seed"])
    except (*MISFITS, RuntimeError) as error:
        raise ValueError(f"{path} holds no random state ({' '.join(str(error).split())[:300]}).") from error
