"""The videos to try, of what is installed anyhow."""

from __future__ import annotations

import shutil
from pathlib import Path

import gradio

import evatok_hf

from ..video.read import open_video, write_video

_FROZEN = 48  # frames of the still


def example_videos(folder: Path) -> dict[str, str]:
    """Label -> path of each: the bundled clip, one frame of it that stands still, and one of gradio's samples if that
    is there. Copies in `folder`."""
    folder.mkdir(parents=True)
    bikes, frozen, earth = (folder / f"{name}.mp4" for name in ("bikes", "frozen", "earth"))
    shutil.copyfile(Path(evatok_hf.__file__).parent / "assets" / "bikes.mp4", bikes)
    with open_video(bikes) as video:
        write_video(frozen, video.read([0] * _FROZEN), video.fps)
    videos = {"Street, much motion": str(bikes), "The same street, frozen": str(frozen)}
    sample = Path(gradio.__file__).parent / "media_assets" / "videos" / "b.mp4"
    if sample.is_file():
        videos["The Earth at night"] = shutil.copyfile(sample, str(earth))
    return videos
