"""The videos to try, of what is installed anyhow."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np

import evatok_hf

from ..video.read import open_video, probe_video, write_video
from .limits import Limits, UploadError

_FROZEN = 48  # frames of the still


def example_videos(folder: Path, limits: Limits) -> dict[str, str]:
    """Label -> path of each that is within the limits: the bundled clip, one frame of it that stands still, and one of
    gradio's samples if that is there. Copies in `folder`."""
    folder.mkdir(parents=True)
    bikes = folder / "bikes.mp4"
    shutil.copyfile(Path(evatok_hf.__file__).parent / "assets" / "bikes.mp4", bikes)
    videos = {"Street, much motion": bikes, "The same street, frozen": _frozen(bikes, folder / "frozen.mp4")}
    spec = importlib.util.find_spec("gradio")
    sample = Path(spec.origin).parent / "media_assets" / "videos" / "b.mp4"
    if sample.is_file():
        videos["The Earth at night"] = Path(shutil.copyfile(sample, folder / "earth.mp4"))
    return {label: str(path) for label, path in videos.items() if _fits(path, limits)}


def _frozen(source: Path, target: Path) -> Path:
    with open_video(source) as video:
        frame, fps = video.read([0])[0], video.fps  # (H, W, 3)
    write_video(target, np.repeat(frame[None], _FROZEN, axis=0), fps)
    return target


def _fits(path: Path, limits: Limits) -> bool:
    try:
        limits.check_file(path)
        limits.check_header(probe_video(path))
    except UploadError:
        return False
    return True
