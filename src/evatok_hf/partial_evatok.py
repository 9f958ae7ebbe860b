"""Weights that a model leaves in the files of its checkpoint, where they count for its fingerprint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

# What says where a checkpoint is, of the arguments of `from_pretrained`.
_PLACE = ("subfolder", "revision", "token", "cache_dir", "local_files_only")


@dataclass(frozen=True)
class AbsentWeights:
    """Tensors of a checkpoint that a model was loaded without.

    Attributes:
        files: name of a tensor -> the file that has it.
        states: file -> its size in bytes and time of change in ns when the model was loaded.
    """

    files: dict[str, str] = field(default_factory=dict)
    states: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def find(
        cls, name: str | os.PathLike, prefix: str, expected: Iterable[str], options: Mapping[str, Any]
    ) -> AbsentWeights:
        """The tensors whose names begin with `prefix`. Only the headers of the files are read.

        Args:
            name: folder or Hub id.
            prefix: of the part that was left out.
            expected: names that the part has.
            options: the arguments of `from_pretrained`.

        Raises:
            ValueError: tensors that are missing or too many; a checkpoint that is not in safetensors.
        """
        files = {}
        for path in _weight_files(name, options):
            with safe_open(path, framework="pt") as file:
                files |= {key: path for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        for problem, keys in (("lacks", set(expected) - set(files)), ("has unknown", set(files) - set(expected))):
            if keys:
                named = ", ".join(sorted(keys)[:3])
                raise ValueError(f"{name} {problem} tensors: {named} ({len(keys)} in all); get a complete copy.")
        return cls(files, {path: _state(path) for path in set(files.values())})

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """A function from a name to its tensor, on the CPU, while the context lasts.

        Raises:
            ValueError: files that are no longer what they were.
        """
        with ExitStack() as stack:
            handles = {}
            for path, state in self.states.items():
                try:
                    same = _state(path) == state
                    handles[path] = stack.enter_context(safe_open(path, framework="pt")) if same else None
                except OSError:
                    handles[path] = None
                if handles[path] is None:
                    raise ValueError(f"{path} has changed since a part of it was loaded; load the model again.")
            yield lambda name: handles[self.files[name]].get_tensor(name)


def _state(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _weight_files(name: str | os.PathLike, options: Mapping[str, Any]) -> list[str]:
    """Paths of the safetensors files of a checkpoint that has just been loaded."""
    place = {key: options[key] for key in _PLACE if options.get(key) is not None}
    variant = options.get("variant")

    def find(file: str) -> str | None:
        if variant is not None:
            stem, end = file.split(".", 1)
            file = f"{stem}.{variant}.{end}"
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **place)

    if whole := find(SAFE_WEIGHTS_NAME):
        return [whole]
    if index := find(SAFE_WEIGHTS_INDEX_NAME):
        shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        return [cached_file(name, shard, **place) for shard in sorted(shards)]
    raise ValueError(f"{name} has no safetensors weights, which loading without the decoder needs.")
