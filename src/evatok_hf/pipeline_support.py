"""What the pipeline and its commands are asked with and answer with: classes, seeds, videos, kinds of frames."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

if TYPE_CHECKING:
    from .configuration_evatok_generator import EvatokGeneratorConfig

ClassLabel = str | int | None
Generators = torch.Generator | Sequence[torch.Generator] | None


# --- classes and seeds ------------------------------------------------------------------------------------------------


def class_names(config: EvatokGeneratorConfig | None) -> list[str]:
    """Names of the classes of a generator's configuration, their numbers where they have none, none without it."""
    if config is None:
        return []
    return list(config.class_names or map(str, range(config.num_classes)))


def find_class(config: EvatokGeneratorConfig | None, name: ClassLabel) -> int | None:
    """The label of a class by name or number, None for None.

    Raises:
        ValueError: no such class; the message has names that are near.
    """
    if name is None:
        return None
    names = class_names(config)
    if not names:
        raise ValueError(f"this generator was trained without classes and knows no {name!r}; give no class.")
    if isinstance(name, str) and name in names:
        return names.index(name)
    if isinstance(name, Integral) and not isinstance(name, bool) and 0 <= name < len(names):
        return int(name)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"there is no class {name!r} among {len(names)}; {hint}`evatok classes` prints all.")


def as_list(value: Any) -> list[Any]:
    """One label or several -> a list of labels."""
    if value is None or isinstance(value, str | Integral):
        return [value]
    return value.tolist() if isinstance(value, torch.Tensor) else list(value)


def positive(name: str, value: int) -> int:
    """Raises ValueError unless a number is whole and at least 1."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{name} is {value}; give a whole number of 1 or more.")
    return int(value)


def next_seed(stream: torch.Generator | None) -> int:
    """A seed from a generator, or from torch's own."""
    device = "cpu" if stream is None else stream.device
    return int(torch.randint(2**53, (1,), generator=stream, device=device))  # JSON carries 53 bits


def draw_seeds(generator: Generators, seeds: Sequence[int] | None, classes: int, count: int) -> list[int]:
    """A seed for each of `count` clips of each class, class after class.

    From a generator they are drawn for the first clip of every class, then for the second, so that those of a clip do
    not depend on `count`.

    Raises:
        ValueError: another number of seeds or generators; both.
    """
    total = classes * count
    if seeds is not None:
        if generator is not None:
            raise ValueError("give either generator or seeds, not both.")
        seeds = [int(seed) for seed in seeds]
        if len(seeds) != total:
            raise ValueError(f"{len(seeds)} seeds for {total} videos; give one each.")
        return seeds
    if isinstance(generator, Sequence):
        if len(generator) != total:
            raise ValueError(f"{len(generator)} generators for {total} videos; give one, or one each.")
        return [next_seed(stream) for stream in generator]
    table = [[next_seed(generator) for _ in range(classes)] for _ in range(count)]
    return [row[index] for index in range(classes) for row in table]


# --- frames -----------------------------------------------------------------------------------------------------------


def check_output_type(output_type: str) -> None:
    """Raises ValueError for a kind of frames that is none of "np", "pt" and "pil"."""
    if output_type not in ("np", "pt", "pil"):
        raise ValueError(f"output_type must be 'np', 'pt' or 'pil', got {output_type!r}.")


def to_output(video: torch.Tensor, output_type: str) -> np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]:
    """(N, F, 3, H, W) in [-1, 1] -> the kind of frames that was asked for (see `EvatokPipelineOutput`)."""
    video = ((video.float().cpu() + 1) / 2).clamp(0, 1)
    if output_type == "pt":
        return video
    frames = video.permute(0, 1, 3, 4, 2).contiguous().numpy()  # (N, F, H, W, 3)
    if output_type == "np":
        return frames
    return [[PIL.Image.fromarray(frame) for frame in clip] for clip in to_uint8(frames)]


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] to the nearest of 256 levels."""
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


def stacked(video: Any) -> Any:
    """A list of arrays (H, W, 3) as one array, anything else as it is."""
    if isinstance(video, list | tuple) and video and getattr(video[0], "ndim", None) == 3:
        return torch.stack(list(video)) if isinstance(video[0], torch.Tensor) else np.stack(video)
    return video


def as_videos(frames: Any) -> list[Any]:
    """One video or several -> a list of videos. Raises ValueError for none, or something else."""
    frames = stacked(frames)
    if isinstance(frames, np.ndarray | torch.Tensor):
        videos = list(frames) if frames.ndim == 5 else [frames]
    elif isinstance(frames, list | tuple) and frames and isinstance(frames[0], PIL.Image.Image):
        videos = [frames]
    elif isinstance(frames, list | tuple):
        videos = [stacked(video) for video in frames]
    else:
        raise ValueError(f"a video cannot be a {type(frames).__name__}; give frames, such as read_video gives.")
    if not videos:
        raise ValueError("there is no video; give frames, at least one.")
    return videos
