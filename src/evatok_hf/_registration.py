"""Registers the models with transformers' Auto classes, but not before something imports those.

`import evatok_hf` stays light this way, and `AutoModel.from_pretrained` still works after it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys


def _register_config() -> None:
    if _ready("configuration_evatok"):
        from transformers import AutoConfig

        from .configuration_evatok import EvatokConfig, EvatokRouterConfig

        AutoConfig.register("evatok", EvatokConfig, exist_ok=True)
        AutoConfig.register("evatok_router", EvatokRouterConfig, exist_ok=True)


# What the models are made of, here and in transformers.
_MODEL_MODULES = ("base_evatok", "layers_evatok", "modeling_evatok", "modeling_evatok_router")
_MODEL_NEEDS = tuple(
    f"transformers.{name}"
    for name in ("modeling_layers", "modeling_outputs", "modeling_utils", "models.vit.modeling_vit")
)
_AUTO_MODEL = "transformers.models.auto.modeling_auto"


def _register_model() -> None:
    # Importing a model of transformers may import the Auto classes on the way, half of that model being there.
    needed = (_AUTO_MODEL, *_MODEL_NEEDS)
    if _AUTO_MODEL in sys.modules and all(map(_complete, needed)) and all(map(_ready, _MODEL_MODULES)):
        from transformers import AutoModel

        from .configuration_evatok import EvatokConfig, EvatokRouterConfig
        from .modeling_evatok import EvatokModel
        from .modeling_evatok_router import EvatokRouter

        AutoModel.register(EvatokConfig, EvatokModel, exist_ok=True)
        AutoModel.register(EvatokRouterConfig, EvatokRouter, exist_ok=True)


def _register_processor() -> None:
    if _ready("video_processing_evatok"):
        # Not from `transformers` itself, which hides the class where torchvision is missing.
        from transformers.models.auto.video_processing_auto import AutoVideoProcessor

        from .configuration_evatok import EvatokConfig
        from .video_processing_evatok import EvatokVideoProcessor

        AutoVideoProcessor.register(EvatokConfig, EvatokVideoProcessor, exist_ok=True)


def _ready(name: str) -> bool:
    """`_complete` of a module of ours."""
    return _complete(f"{__package__}.{name}")


def _complete(name: str) -> bool:
    """False in the middle of importing that module: then the end of its import registers."""
    module = sys.modules.get(name)
    return module is None or not module.__spec__._initializing


# Either may come first: what imports our module may be what imports transformers' Auto classes.
_AFTER = {
    "transformers.models.auto.configuration_auto": _register_config,
    f"{__package__}.configuration_evatok": _register_config,
    **dict.fromkeys((_AUTO_MODEL, *_MODEL_NEEDS), _register_model),
    **{f"{__package__}.{name}": _register_model for name in _MODEL_MODULES},
    "transformers.models.auto.video_processing_auto": _register_processor,
    f"{__package__}.video_processing_evatok": _register_processor,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs a registration right after its module has been imported, then is no longer asked for it."""

    def __init__(self, pending: dict):
        self.pending = pending

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.pending:
            return None
        register = self.pending.pop(fullname)
        if not self.pending:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.__spec__._initializing = False  # complete as far as `_complete` is concerned
            register()

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Registers at once where transformers' Auto classes are already imported, else when they are."""
    pending = {}
    for name, register in _AFTER.items():
        if name in sys.modules:
            register()
        else:
            pending[name] = register
    if pending and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(pending))
