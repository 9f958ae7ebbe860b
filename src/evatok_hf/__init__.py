"""Adaptive-length video tokenization (EVATok, arXiv 2603.12267) for the Hugging Face ecosystem.

Nothing heavy is imported until a name is used. `AutoConfig`, `AutoModel` and `AutoVideoProcessor` of transformers know
the models after `import evatok_hf`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import _registration, _renamed
from .bundled import default_checkpoint

__version__ = "0.1.0"

_NAMES = {
    "AssignmentSpace": "configuration_evatok",
    "EvatokConfig": "configuration_evatok",
    "EvatokGenerator": "modeling_evatok_generator",
    "EvatokGeneratorConfig": "configuration_evatok",
    "EvatokModel": "modeling_evatok",
    "EvatokOutput": "modeling_evatok",
    "EvatokPipeline": "pipeline_evatok",
    "EvatokPipelineOutput": "pipeline_evatok",
    "EvatokRouter": "modeling_evatok_router",
    "EvatokRouterConfig": "configuration_evatok",
    "EvatokRouterOutput": "modeling_evatok_router",
    "EvatokVideoProcessor": "video_processing_evatok",
    "Prompt": "modeling_evatok_generator",
    "SequenceCodec": "modeling_evatok_generator",
    "VideoTokens": "tokens_evatok",
    "VideoReadError": "video_io",
    "VideoReader": "video_io",
    "VideoWriteError": "video_io",
    "VideoWriter": "video_io",
    "open_video": "video_io",
    "read_video": "video_io",
    "write_video": "video_io",
    "VideoTokenizer": "video_tokenizer",
    "load_perceptual": "perceptual",
    "psnr": "metrics",
    "sample": "generation_evatok",
}

__all__ = ["__version__", "default_checkpoint", *sorted(_NAMES)]

if TYPE_CHECKING:
    from .configuration_evatok import AssignmentSpace, EvatokConfig, EvatokGeneratorConfig, EvatokRouterConfig
    from .generation_evatok import sample
    from .metrics import psnr
    from .modeling_evatok import EvatokModel, EvatokOutput
    from .modeling_evatok_generator import EvatokGenerator, Prompt, SequenceCodec
    from .modeling_evatok_router import EvatokRouter, EvatokRouterOutput
    from .perceptual import load_perceptual
    from .pipeline_evatok import EvatokPipeline, EvatokPipelineOutput
    from .tokens_evatok import VideoTokens
    from .video_io import (
        VideoReader,
        VideoReadError,
        VideoWriteError,
        VideoWriter,
        open_video,
        read_video,
        write_video,
    )
    from .video_processing_evatok import EvatokVideoProcessor
    from .video_tokenizer import VideoTokenizer


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})


_registration.install()
_renamed.install(__name__)
