"""Modules and names that the release before had elsewhere, each with a `FutureWarning` when it is used."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

# Those that documentation showed. Old name -> where its names are now; goes with the next release.
_RENAMED = {
    "assignment": "models.configuration_evatok",
    "base_evatok": "models.base_evatok",
    "checkpoint_evatok": "models.checkpoint_evatok",
    "clip_cutting": "data.clip_cutting",
    "configuration_evatok": "models.configuration_evatok",
    "curated": "data.curated",
    "frechet": "metrics.frechet",
    "grammar_evatok": "models.modeling_evatok_generator",
    "llama_export": "export.llama",
    "modeling_evatok": "models.modeling_evatok",
    "modeling_evatok_generator": "models.modeling_evatok_generator",
    "modeling_evatok_router": "models.modeling_evatok_router",
    "perceptual": "metrics.perceptual",
    "pipeline_evatok": "models.pipeline_evatok",
    "pipeline_support": "models.pipeline_evatok",
    "prediction": "models.video_processing_evatok",
    "reward": "allocation.reward",
    "sample_pictures": "pictures.samples",
    "sampling_evatok": "models.generation_evatok",
    "seams": "tokenize.seams",
    "search": "allocation.search",
    "sequences_evatok": "models.modeling_evatok_generator",
    "streaming": "data.streaming",
    "streaming_state": "tokenize.streams",
    "token_dataset": "data.token_dataset",
    "tokenized_clips": "tokenize.clips",
    "tokens_evatok": "models.tokens_evatok",
    "video_features": "metrics.features",
    "video_io": "video.read",
    "video_processing_evatok": "models.video_processing_evatok",
    "video_tokenizer": "tokenize.video_tokenizer",
    "vllm_grammar": "export.vllm_grammar",
}
# Names of the package itself -> the module that they are in now, and after a colon their new name where it is another.
MOVED = {
    "EvatokGenerator": "models.modeling_evatok_generator:EvatokForCausalLM",
    "Prompt": "models.modeling_evatok_generator",
    "SequenceCodec": "models.modeling_evatok_generator",
    "VideoReadError": "video",
    "VideoReader": "video",
    "VideoWriteError": "video",
    "VideoWriter": "video",
    "load_perceptual": "metrics",
    "open_video": "video",
    "psnr": "metrics",
    "read_video": "video",
    "sample": "models.generation_evatok",
    "write_video": "video",
}


def moved(package: str, name: str) -> Any:
    """A name of `MOVED`, from where it is now."""
    module, _, renamed = MOVED[name].partition(":")
    where = f"{package}.{module}"
    new = f"{renamed}, " if renamed else ""
    warnings.warn(f"{name} is {new}in {where} now; import it from there.", FutureWarning, stacklevel=3)
    return getattr(import_module(where), renamed or name)


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
