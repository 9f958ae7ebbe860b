"""Pictures of clips, of their tokens, and of samples."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "SideBySide": "clips",
        "comparison_picture": "clips",
        "enlarge": "clips",
        "routing_picture": "clips",
        "save_picture": "clips",
        "Sample": "samples",
        "SampleGrid": "samples",
        "contact_sheet": "samples",
        "prediction_picture": "samples",
    },
)
