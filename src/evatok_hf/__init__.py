"""Adaptive-length video tokenization (EVATok, arXiv 2603.12267) for the Hugging Face ecosystem.

Nothing heavy is imported until a name is used. `AutoConfig`, `AutoModel` and `AutoVideoProcessor` of transformers know
the models after `import evatok_hf`.

Where is what: `models` is what a repository of the Hub carries beside its weights; `video` reads and writes files;
`metrics` measures; `allocation` chooses how many tokens each block gets; `tokenize` takes whole videos to tokens and
back; `data` is what training reads; `hub` pushes, with code and cards; `export` is for other engines; `pictures` draws;
`bulk` tokenizes very many videos; `demo` is the web app, `cli` the commands. A folder imports only those before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _registration, _renamed
from ._lazy import lazy
from .bundled import default_checkpoint

__version__ = "0.1.0"

_NAMES = {
    "AssignmentSpace": "models.configuration_evatok",
    "EvatokConfig": "models.configuration_evatok",
    "EvatokGenerator": "models.modeling_evatok_generator",
    "EvatokGeneratorConfig": "models.configuration_evatok",
    "EvatokModel": "models.modeling_evatok",
    "EvatokOutput": "models.modeling_evatok",
    "EvatokPipeline": "_old_pipeline",  # with methods that go with the next release
    "EvatokPipelineOutput": "models.pipeline_evatok",
    "EvatokRouter": "models.modeling_evatok_router",
    "EvatokRouterConfig": "models.configuration_evatok",
    "EvatokRouterOutput": "models.modeling_evatok_router",
    "EvatokVideoProcessor": "models.video_processing_evatok",
    "VideoTokens": "models.tokens_evatok",
    "VideoTokenizer": "tokenize.video_tokenizer",
}

__all__ = ["__version__", "default_checkpoint", *sorted(_NAMES)]

if TYPE_CHECKING:
    from .models.configuration_evatok import AssignmentSpace, EvatokConfig, EvatokGeneratorConfig, EvatokRouterConfig
    from .models.modeling_evatok import EvatokModel, EvatokOutput
    from .models.modeling_evatok_generator import EvatokGenerator
    from .models.modeling_evatok_router import EvatokRouter, EvatokRouterOutput
    from .models.pipeline_evatok import EvatokPipeline, EvatokPipelineOutput
    from .models.tokens_evatok import VideoTokens
    from .models.video_processing_evatok import EvatokVideoProcessor
    from .tokenize.video_tokenizer import VideoTokenizer


_get, __dir__, _ = lazy(__name__, _NAMES)


def __getattr__(name: str) -> Any:
    return _renamed.moved(__name__, name) if name in _renamed.MOVED else _get(name)


_registration.install()
_renamed.install(__name__)
