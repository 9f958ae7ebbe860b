"""Frozen evaluation protocols: which clips are scored, how frames are brought to size, and by what.

A protocol is a JSON file, one of `training/protocols/` by name or any other by path. Every field has to be there:

| field | |
|---|---|
| `name`, `description`, `reference` | text; `reference` says whose protocol it is |
| `task` | `reconstruction`, `class-to-video` or `frame-prediction` |
| `split` | split of the data, where the folder is divided into splits |
| `clips` | `{"kind": ..}` and what the kind takes, see `CLIP_KINDS` |
| `num_frames`, `frame_stride` | frames of a clip, and the step from one to the next in frames of the video |
| `resize` | `{"short_side": pixels, or null for the model's size, "filter": "bilinear-antialias"}` |
| `crop` | `centre`, the middle square of that side |
| `feature_resolution` | pixels that frames are brought to before video features, null for none |
| `metrics` | names out of `METRIC_NAMES` |
| `count` | clips there should be, null if that depends on the folder |
| `known_differences` | list of texts: where the reference itself does otherwise or is not reproducible |
"""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from evatok_hf.metrics.features import VIDEO_FEATURE_NAMES
from evatok_hf.metrics.perceptual import PERCEPTUAL_NAMES

FOLDER = Path(__file__).parent
TASKS = ("reconstruction", "class-to-video", "frame-prediction")
METRIC_NAMES = ("psnr", "ssim", *PERCEPTUAL_NAMES, *VIDEO_FEATURE_NAMES, "codebook", "tokens")
# What each way to choose clips takes. `sample` draws `count` of all clips that do not overlap.
CLIP_KINDS = {
    "first": (),
    "centre": (),
    "evenly-spaced": ("per_video",),
    "random": ("seed",),
    "all-non-overlapping": (),
    "sample": ("seed", "count"),
    "list": ("clips",),
}


@dataclass(frozen=True)
class Protocol:
    """The fields of a protocol file, see the module, and `sha256`, 64 hex digits of the file."""

    name: str
    description: str
    task: str
    split: str
    clips: dict[str, Any]
    num_frames: int
    frame_stride: int
    resize: dict[str, Any]
    crop: str
    feature_resolution: int | None
    metrics: list[str]
    count: int | None
    reference: str
    known_differences: list[str]
    sha256: str

    @property
    def span(self) -> int:
        """Frames of the video from the first to the last of a clip."""
        return (self.num_frames - 1) * self.frame_stride + 1

    def frames(self, first: int) -> list[int]:
        """The frames of the video that make the clip which begins there."""
        return list(range(first, first + self.span, self.frame_stride))

    def content(self) -> dict[str, Any]:
        """All fields of the file."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "sha256"}


def protocol_names() -> list[str]:
    """Names of the protocols that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_protocol(name_or_path: str | Path) -> Protocol:
    """A protocol by its name or from a file.

    Raises:
        ValueError: no such protocol, or a file that is no JSON, lacks a field, has an unknown one, or one with a wrong
            value; the message names the file and the field.
    """
    path = FOLDER / f"{name_or_path}.json" if str(name_or_path) in protocol_names() else Path(name_or_path)
    try:
        data = path.read_bytes()
        values = json.loads(data)
    except OSError as error:
        raise ValueError(
            f"there is no protocol {name_or_path} ({error.strerror}); name a file, or one of "
            f"{', '.join(protocol_names())}."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); mend the protocol.") from error
    known = {field.name for field in fields(Protocol)} - {"sha256"}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object with the fields {sorted(known)}.")
    for what, names in (("has unknown fields", set(values) - known), ("lacks the fields", known - set(values))):
        if names:
            raise ValueError(f"{path} {what} {', '.join(sorted(names))}; a protocol has exactly {sorted(known)}.")
    for field, (good, expected) in _CHECKS.items():
        if not good(values[field]):
            raise ValueError(f"{path}: {field} must be {expected}, got {json.dumps(values[field])[:200]}.")
    _check_clips(path, values["clips"])
    return Protocol(**values, sha256=hashlib.sha256(data).hexdigest())


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _maybe_whole(value: Any) -> bool:
    return value is None or _whole(value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(_text(entry) for entry in value)


def _resize(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"short_side", "filter"}
        and _maybe_whole(value["short_side"])
        and value["filter"] == "bilinear-antialias"
    )


def _metrics(value: Any) -> bool:
    return _texts(value) and bool(value) and set(value) <= set(METRIC_NAMES) and len(set(value)) == len(value)


_CHECKS = {
    "name": (_text, "a text"),
    "description": (_text, "a text"),
    "task": (lambda value: value in TASKS, f"one of {list(TASKS)}"),
    "split": (_text, "the name of a split"),
    "clips": (
        lambda value: isinstance(value, dict) and value.get("kind") in list(CLIP_KINDS),
        f"an object whose kind is one of {list(CLIP_KINDS)}",
    ),
    "num_frames": (_whole, "a whole number of 1 or more"),
    "frame_stride": (_whole, "a whole number of 1 or more"),
    "resize": (_resize, 'an object with short_side (pixels or null) and filter ("bilinear-antialias")'),
    "crop": (lambda value: value == "centre", '"centre"'),
    "feature_resolution": (_maybe_whole, "pixels or null"),
    "metrics": (_metrics, f"a list of different names out of {list(METRIC_NAMES)}"),
    "count": (_maybe_whole, "a whole number of 1 or more, or null"),
    "reference": (_text, "a text"),
    "known_differences": (_texts, "a list of texts"),
}


def _check_clips(path: Path, clips: dict[str, Any]) -> None:
    takes = CLIP_KINDS[clips["kind"]]
    if set(clips) != {"kind", *takes}:
        raise ValueError(
            f"{path}: clips of kind {clips['kind']} takes {' and '.join(takes) or 'nothing else'}, got "
            f"{sorted(set(clips) - {'kind'})}."
        )
    for field, least in (("per_video", 1), ("count", 1), ("seed", 0)):
        if field in takes and not _whole(clips[field], least):
            raise ValueError(f"{path}: clips.{field} must be a whole number of {least} or more, got {clips[field]!r}.")
    if "clips" in takes:
        listed = clips["clips"]
        if not isinstance(listed, list) or not listed or not all(_is_clip(clip) for clip in listed):
            raise ValueError(f"{path}: clips.clips must be a list of [video, first frame], got {listed!r:.200}.")
        if len({tuple(clip) for clip in listed}) < len(listed):
            raise ValueError(f"{path}: clips.clips names a clip more than once; list each once.")


def _is_clip(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _text(value[0]) and _whole(value[1], 0)


# --- from the videos of a folder to clips -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The clips that a protocol scores.

    Attributes:
        clips: (video, first frame), in sorted order.
        unfit: (video, cause, reason) of videos that give none: "too short", or "missing" from the folder.
    """

    clips: list[tuple[str, int]]
    unfit: list[tuple[str, str, str]]


def choose_clips(protocol: Protocol, lengths: dict[str, int]) -> Plan:
    """Which clips of the videos are scored; a function of its arguments alone.

    Args:
        protocol: says how.
        lengths: frames of each readable video, by its path within the split.
    """
    kind, span = protocol.clips["kind"], protocol.span
    if kind == "list":
        return _listed(protocol, lengths)
    short = [(name, "too short", f"{n} frames, {span} are needed") for name, n in sorted(lengths.items()) if n < span]
    long = {name: count for name, count in sorted(lengths.items()) if count >= span}
    if kind == "random":
        clips = [(name, _window(protocol.clips["seed"], name, count - span)) for name, count in long.items()]
    elif kind in ("all-non-overlapping", "sample"):
        step = protocol.num_frames * protocol.frame_stride
        clips = [(name, first) for name, count in long.items() for first in range(0, count - span + 1, step)]
        if kind == "sample":
            wanted = min(protocol.clips["count"], len(clips))
            clips = sorted(random.Random(protocol.clips["seed"]).sample(clips, wanted))
    else:
        wanted = {"first": 1, "centre": 1, "evenly-spaced": protocol.clips.get("per_video")}[kind]
        clips = [(name, first) for name, count in long.items() for first in _spaced(count, wanted, span)]
        if kind == "first":
            clips = [(name, 0) for name, _ in clips]
    return Plan(clips, short)


def _window(seed: int, name: str, slack: int) -> int:
    """A start in 0..slack that depends on nothing but the seed and the video's path."""
    return int(np.random.default_rng([seed, zlib.crc32(name.encode())]).integers(slack + 1))


def _spaced(count: int, clips: int, span: int) -> Sequence[int]:
    """Starts of up to `clips` windows, evenly spaced without overlap; one alone lies in the middle."""
    clips = min(clips, count // span)
    if clips == 1:
        return [(count - span) // 2]
    return [index * (count - span) // (clips - 1) for index in range(clips)]


def _listed(protocol: Protocol, lengths: dict[str, int]) -> Plan:
    clips, unfit = [], []
    for name, first in sorted(map(tuple, protocol.clips["clips"])):
        if name not in lengths:
            unfit.append((name, "missing", "the protocol lists it and the folder has no readable video of that name"))
        elif first + protocol.span > lengths[name]:
            reason = f"{lengths[name]} frames, {first + protocol.span} are needed"
            unfit.append((name, "too short", reason))
        else:
            clips.append((name, first))
    return Plan(clips, sorted(set(unfit)))
