"""The Hub: checkpoints and data sets go there, with their code and cards."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {"push": "Pushed collect push_checkpoint"})
