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
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evatok_hf.data.clip_cutting import spaced
from evatok_hf.metrics.features import VIDEO_FEATURE_NAMES
from evatok_hf.metrics.perceptual import PERCEPTUAL_NAMES
from evatok_hf.models.files_evatok import Rule, checked, list_of, named, one_of, optional, parse_json, ruled, whole

FOLDER = Path(__file__).parent
TASKS = ("reconstruction", "class-to-video", "frame-prediction")
METRIC_NAMES = ("psnr", "ssim", *PERCEPTUAL_NAMES, *VIDEO_FEATURE_NAMES, "codebook", "tokens")
_COUNT, _SEED = whole(1, 1 << 40), whole(0, 1 << 64)
_TEXT = Rule("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
_LISTED = Rule(
    "a list of [video, first frame]",
    lambda value: (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(clip, list) and len(clip) == 2 for clip in value)
        and all(_TEXT.allows(video) and _SEED.allows(first) for video, first in value)
    ),
)
# What each way to choose clips takes. `sample` draws `count` of all clips that do not overlap.
CLIP_KINDS: dict[str, dict[str, Rule]] = {
    "first": {},
    "centre": {},
    "evenly-spaced": {"per_video": _COUNT},
    "random": {"seed": _SEED},
    "all-non-overlapping": {},
    "sample": {"seed": _SEED, "count": _COUNT},
    "list": {"clips": _LISTED},
}
_CLIPS = Rule(
    f"an object whose kind is one of {list(CLIP_KINDS)}",
    lambda value: isinstance(value, dict) and value.get("kind") in list(CLIP_KINDS),
)
_RESIZE = Rule(
    'an object with short_side (pixels or null) and filter ("bilinear-antialias")',
    lambda value: (
        isinstance(value, dict)
        and value == {"short_side": value.get("short_side"), "filter": "bilinear-antialias"}
        and optional(_COUNT).allows(value["short_side"])
    ),
)
_METRICS = Rule(
    f"a list of different names out of {list(METRIC_NAMES)}",
    lambda value: list_of(one_of(*METRIC_NAMES), 99, 1).allows(value) and len(set(value)) == len(value),
)


@checked
@dataclass
class Protocol:
    """The fields of a protocol file, see the module, and `sha256`, 64 hex digits of the file."""

    name: str = ruled(_TEXT)
    description: str = ruled(_TEXT)
    task: str = ruled(one_of(*TASKS))
    split: str = ruled(_TEXT)
    clips: dict = ruled(_CLIPS)
    num_frames: int = ruled(_COUNT)
    frame_stride: int = ruled(_COUNT)
    resize: dict = ruled(_RESIZE)
    crop: str = ruled(one_of("centre"))
    feature_resolution: int | None = ruled(optional(_COUNT))
    metrics: list = ruled(_METRICS)
    count: int | None = ruled(optional(_COUNT))
    reference: str = ruled(_TEXT)
    known_differences: list = ruled(list_of(_TEXT, 1000))
    sha256: str

    def validate_clips(self) -> None:
        """Raises ValueError for fields of `clips` that its kind does not take, or whose values are wrong."""
        kind, rules = self.clips["kind"], CLIP_KINDS[self.clips["kind"]]
        if (given := set(self.clips) - {"kind"}) != set(rules):
            raise ValueError(
                f"clips of kind {kind} takes {' and '.join(rules) or 'nothing else'}, got {sorted(given)}."
            )
        for field, rule in rules.items():
            if not rule.allows(value := self.clips[field]):
                raise ValueError(f"clips.{field} must be {rule.words}, got {value!r:.200}.")
        if kind == "list" and len(set(map(tuple, self.clips["clips"]))) < len(self.clips["clips"]):
            raise ValueError("clips.clips names a clip more than once; list each once.")

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
        ValueError: no such protocol, or a file that is no JSON object, lacks a field, has an unknown one, or one with a
            wrong value; the message names the file and the field.
    """
    path = FOLDER / f"{name_or_path}.json" if str(name_or_path) in protocol_names() else Path(name_or_path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"there is no protocol {name_or_path} ({error.strerror}); name a file, or one of "
            f"{', '.join(protocol_names())}."
        ) from error
    values = parse_json(data, path)
    known = {field.name for field in fields(Protocol)} - {"sha256"}
    for what, names in (("has unknown fields", set(values) - known), ("lacks the fields", known - set(values))):
        if names:
            raise ValueError(f"{path} {what} {', '.join(sorted(names))}; a protocol has exactly {sorted(known)}.")
    with named(path):
        return Protocol(**values, sha256=hashlib.sha256(data).hexdigest())


# --- from the videos of a folder to clips -----------------------------------------------------------------------------


class Plan(NamedTuple):
    """The clips that a protocol scores.

    Attributes:
        clips: (video, first frame), in sorted order.
        unfit: (video, cause, reason) of videos that give none: "too short", or "missing" from the folder.
    """

    clips: list[tuple[str, int]]
    unfit: list[tuple[str, str, str]]


def choose_clips(protocol: Protocol, lengths: dict[str, int]) -> Plan:
    """Chooses the clips of the videos that are scored; a function of its arguments alone.

    Args:
        protocol: says how.
        lengths: frames of each readable video, by its path within the split.
    """
    options, clips, unfit = protocol.clips, [], set()
    if options["kind"] == "list":
        asked = {(name, first): lengths.get(name) for name, first in options["clips"]}
    else:
        asked = {(name, 0): count for name, count in lengths.items()}
    for (name, first), count in sorted(asked.items()):
        if count is None:
            unfit.add((name, "missing", "the protocol lists it and the folder has no readable video of that name"))
        elif first + protocol.span > count:
            unfit.add((name, "too short", f"{count} frames, {first + protocol.span} are needed"))
        else:
            clips += [(name, start) for start in _starts(protocol, name, first, count)]
    if options["kind"] == "sample":
        clips = sorted(random.Random(options["seed"]).sample(clips, min(options["count"], len(clips))))
    return Plan(clips, sorted(unfit))


def _starts(protocol: Protocol, name: str, first: int, count: int) -> Iterable[int]:
    """First frames of the clips of a video with so many frames, of which one begins at `first`."""
    options, slack = protocol.clips, count - protocol.span
    match options["kind"]:
        case "first" | "list":
            return [first]
        case "centre":
            return spaced(count, 1, protocol.span)
        case "evenly-spaced":
            return spaced(count, options["per_video"], protocol.span)
        case "random":  # depends on nothing but the seed and the video's path
            rng = np.random.default_rng([options["seed"], zlib.crc32(name.encode())])
            return [int(rng.integers(slack + 1))]
        case _:  # all that do not overlap
            return range(0, slack + 1, protocol.num_frames * protocol.frame_stride)
