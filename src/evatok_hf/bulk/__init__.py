"""Tokens of very many videos, by Ray Data."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {"engine": "BulkOptions Progress tokenize_source"})
