"""Pictures of clips, of their tokens, and of samples."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "clips": "SideBySide comparison_picture enlarge routing_picture save_picture",
        "samples": "Sample SampleGrid contact_sheet prediction_picture",
    },
)
