"""Registers the models with transformers' Auto classes, but not before something imports those.

`import evatok_hf` stays light this way, and `AutoModel.from_pretrained` still works after it. The modules of
transformers import each other in circles, so nothing is registered in the middle of their import: a finder counts how
deep it is, and registration waits for the end of the outermost.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_AUTO_MODEL = "transformers.models.auto.modeling_auto"
_AUTO_PROCESSOR = "transformers.models.auto.video_processing_auto"


def _register_configs() -> None:
    from transformers import AutoConfig

    from .models.configuration_evatok import EvatokConfig, EvatokGeneratorConfig, EvatokRouterConfig

    for kind in (EvatokConfig, EvatokRouterConfig, EvatokGeneratorConfig):
        AutoConfig.register(kind.model_type, kind, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from .models.configuration_evatok import EvatokConfig, EvatokGeneratorConfig, EvatokRouterConfig
    from .models.modeling_evatok import EvatokModel
    from .models.modeling_evatok_generator import EvatokGenerator
    from .models.modeling_evatok_router import EvatokRouter

    AutoModel.register(EvatokConfig, EvatokModel, exist_ok=True)
    AutoModel.register(EvatokRouterConfig, EvatokRouter, exist_ok=True)
    AutoModel.register(EvatokGeneratorConfig, EvatokGenerator, exist_ok=True)
    AutoModelForCausalLM.register(EvatokGeneratorConfig, EvatokGenerator, exist_ok=True)


def _register_processor() -> None:
    # Not from `transformers` itself, which hides the class where torchvision is missing.
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    from .models.configuration_evatok import EvatokConfig
    from .models.video_processing_evatok import EvatokVideoProcessor

    AutoVideoProcessor.register(EvatokConfig, EvatokVideoProcessor, exist_ok=True)


def _own(name: str) -> str:
    return f"{__package__}.{name}"


# What to do once one of these modules has been imported; either may come first.
_WHEN = {
    _register_configs: (_AUTO_CONFIG, _own("models.configuration_evatok")),
    _register_models: (
        _AUTO_MODEL,
        _own("models.modeling_evatok"),
        _own("models.modeling_evatok_router"),
        _own("models.modeling_evatok_generator"),
    ),
    _register_processor: (_AUTO_PROCESSOR, _own("models.video_processing_evatok")),
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs each registration at the end of the import that brings its modules, then is no longer asked."""

    def __init__(self):
        self.pending = dict(_WHEN)
        self.depth = 0

    def settle(self) -> None:
        """Registers what can be, unless an import is under way."""
        if self.depth:
            return
        self.depth += 1  # what registration imports settles here, too
        try:
            while due := [do for do, names in self.pending.items() if any(name in sys.modules for name in names)]:
                for register in due:
                    del self.pending[register]
                    register()
        finally:
            self.depth -= 1
        if not self.pending and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in ("transformers", __package__):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            self.settle()

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Registers at once where transformers' Auto classes are already imported, else when they are."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        finder = _AfterImport()
        sys.meta_path.insert(0, finder)
        finder.settle()
