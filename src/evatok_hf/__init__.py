"""Adaptive-length video tokenization (EVATok, arXiv 2603.12267) for the Hugging Face ecosystem.

Nothing heavy is imported until a name is used. With the first one, or at once where transformers is imported already,
`AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoVideoProcessor` come to know the models.

Where is what: `models` is what a repository of the Hub carries beside its weights; `video` reads and writes files;
`metrics` measures; `allocation` chooses how many tokens each block gets; `tokenize` takes whole videos to tokens and
back; `data` is what training reads; `hub` pushes, with code and cards; `export` is for other engines; `pictures` draws;
`bulk` tokenizes very many videos; `demo` is the web app, `cli` the commands. A folder imports only those before it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _renamed
from ._lazy import lazy

__version__ = "0.1.0"

_get, __dir__, _names = lazy(
    __name__,
    {
        "_old_pipeline": "EvatokPipeline",  # with methods that go with the next release
        "bundled": "bundled_checkpoints default_checkpoint",
        "models.configuration_evatok": "AssignmentSpace EvatokConfig EvatokGeneratorConfig EvatokRouterConfig",
        "models.modeling_evatok": "EvatokEncoderModel EvatokModel EvatokOutput",
        "models.modeling_evatok_generator": "EvatokForCausalLM",
        "models.modeling_evatok_router": "EvatokRouter EvatokRouterOutput",
        "models.pipeline_evatok": "EvatokPipelineOutput",
        "models.tokens_evatok": "VideoTokens",
        "models.video_processing_evatok": "EvatokVideoProcessor",
        "tokenize.video_tokenizer": "VideoTokenizer",
    },
)
__all__ = ["__version__", *_names]

if TYPE_CHECKING:
    from .bundled import bundled_checkpoints, default_checkpoint
    from .models.configuration_evatok import AssignmentSpace, EvatokConfig, EvatokGeneratorConfig, EvatokRouterConfig
    from .models.modeling_evatok import EvatokEncoderModel, EvatokModel, EvatokOutput
    from .models.modeling_evatok_generator import EvatokForCausalLM
    from .models.modeling_evatok_router import EvatokRouter, EvatokRouterOutput
    from .models.pipeline_evatok import EvatokPipeline, EvatokPipelineOutput
    from .models.tokens_evatok import VideoTokens
    from .models.video_processing_evatok import EvatokVideoProcessor
    from .tokenize.video_tokenizer import VideoTokenizer


def __getattr__(name: str) -> Any:
    old = _renamed.MOVED.get(name, "")
    if name in _names or old.startswith("models."):
        import_module("._registration", __name__)
    return _renamed.moved(__name__, name) if old else _get(name)


if "transformers" in sys.modules:
    import_module("._registration", __name__)
_renamed.install(__name__)
