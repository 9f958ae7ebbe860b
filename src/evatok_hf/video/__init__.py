"""Video files to frames and frames to video files."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "VideoReadError": "read",
        "VideoReader": "read",
        "VideoWriteError": "read",
        "VideoWriter": "read",
        "open_video": "read",
        "probe_video": "read",
        "read_video": "read",
        "write_video": "read",
    },
)
