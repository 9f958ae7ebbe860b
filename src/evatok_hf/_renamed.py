"""Modules by the names that they had in the release before, each with a `FutureWarning` when a name of it is used."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

# Those that documentation showed. Old name -> where its names are now; goes with the next release.
_RENAMED = {
    "assignment": "configuration_evatok",
    "grammar_evatok": "modeling_evatok_generator",
    "pipeline_support": "pipeline_evatok",
    "prediction": "video_processing_evatok",
    "sampling_evatok": "generation_evatok",
    "sequences_evatok": "modeling_evatok_generator",
}


class _Renamed(ModuleType):
    def __init__(self, old: str, new: str):
        super().__init__(old, f"Renamed to {new}.")
        self.__dict__["_new"] = new

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(self._new), name)
        warnings.warn(f"{self.__name__} is {self._new} now; import {name} from there.", FutureWarning, stacklevel=2)
        return value


def install(package: str) -> None:
    """Makes `import package.old` work; nothing is imported before a name is asked for."""
    for old, new in _RENAMED.items():
        sys.modules[f"{package}.{old}"] = _Renamed(f"{package}.{old}", f"{package}.{new}")
