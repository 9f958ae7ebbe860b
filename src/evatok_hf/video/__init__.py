"""Video files to frames and frames to video files."""

from .._lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {"read": "VideoReadError VideoReader VideoWriteError VideoWriter open_video probe_video read_video write_video"},
)
