"""Pictures and figures of training: running means, sample grids, the loss curve."""

from __future__ import annotations

import logging
import resource
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evatok_hf.models.files_evatok import checked, parse_json, ruled, whole
from evatok_hf.pictures.figures import pyplot, save_figure

logger = logging.getLogger(__name__)


def _can_draw(package: str, path: Path) -> bool:
    """True if the package that draws a picture is installed; else the log says that the picture is left out."""
    found = find_spec(package) is not None
    if not found:
        logger.warning("%s: no picture, since %s is not installed", path.name, package)
    return found


class MovingMean:
    """Means of the last `window` values of named terms. Their device is waited for when the means are asked for."""

    def __init__(self, window: int):
        self.window = window
        self._values: dict[str, deque[torch.Tensor | float]] = {}

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        for name, value in terms.items():
            self._values.setdefault(name, deque(maxlen=self.window)).append(value.detach())

    def values(self) -> dict[str, float]:
        return {name: sum(map(float, values)) / len(values) for name, values in self._values.items()}

    def state_dict(self) -> dict:
        return {name: [*map(float, values)] for name, values in self._values.items()}

    def load_state_dict(self, state: dict) -> None:
        self._values = {name: deque(values, maxlen=self.window) for name, values in state.items()}


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process had in use: of the GPU, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage * (1 if sys.platform == "darwin" else 1024) / 2**30


def _save(rows: torch.Tensor, path: Path) -> None:
    """(n, H, W, 3) uint8, one below another."""
    if not _can_draw("PIL", path):
        return
    from PIL import Image

    from evatok_hf.pictures.clips import save_picture

    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(Image.fromarray(rows.flatten(0, 1).numpy()), path)


def save_grid(originals: torch.Tensor, reconstructions: list[torch.Tensor], path: Path, frames: int = 4) -> None:
    """A picture with a row of frames for each clip and, below it, a row of their reconstructions.

    Args:
        originals: (B, F, 3, H, W) uint8.
        reconstructions: batches of (b, F, 3, H, W) in [-1, 1], for the first clips.
        path: PNG to write.
        frames: frames shown of each clip, evenly spaced.
    """
    made = ((torch.cat(reconstructions)[:8] + 1) * 127.5).round().to(torch.uint8)
    pick = torch.linspace(0, made.shape[1] - 1, frames).long()
    pairs = torch.stack([originals[: len(made)][:, pick], made[:, pick]], dim=1)  # (B, 2, n, 3, H, W)
    rows = pairs.flatten(0, 1).permute(0, 3, 1, 4, 2).flatten(2, 3)  # (2B, H, n * W, 3)
    _save(rows, path)


@checked
@dataclass
class _Line:
    step: int = ruled(whole(0, 10**12))


def read_log(log: Path) -> list[dict]:
    """The lines of a training log; a run of fewer steps than log_every has none.

    One that a run which was killed left unfinished is passed over, with a warning.
    """
    records = []
    for number, line in enumerate(log.read_text(errors="replace").splitlines() if log.exists() else (), start=1):
        try:
            records.append(parse_json(line, f"{log}, line {number},", _Line))
        except ValueError as error:
            logger.warning("%s", error)
    return records


def _keys(records: list[dict], start: str = "", end: str = "") -> list[str]:
    return sorted({key for record in records for key in record if key.startswith(start) and key.endswith(end)})


def _save_curves(
    records: list[dict], path: Path, panels: Sequence[tuple[str, Mapping[str, str | None], Mapping[str, Any]]]
) -> None:
    """A panel for each title, its terms with their labels, and settings of its axes; those of validation have dots."""
    if not _can_draw("matplotlib", path):
        return
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), layout="constrained")
    for axis, (title, terms, settings) in zip(axes, panels, strict=True):
        for key, label in terms.items():
            points = {r["step"]: r[key] for r in records if key in r}  # of a step that was done twice, the second time
            if points:
                marker = "." if key.startswith("val/") else None
                axis.plot(*np.array(sorted(points.items())).T, label=label, marker=marker, linewidth=1)
        axis.set(title=title, xlabel="step", **settings)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save_figure(figure, path)


def save_loss_curve(log: Path, path: Path) -> None:
    """Draws the training log (`log.jsonl`): loss terms, PSNR in training and validation, codebook use, and, of an
    adversarial run, the mean logits of real and reconstructed clips."""
    records = read_log(log)
    losses = {name: name for name in ("l1", "perceptual", "alignment_contrast")}
    lengths = sorted(int(key[9:]) for key in _keys(records, "val/psnr_"))
    quality = {"psnr": "training"} | {f"val/psnr_{n}": f"validation, {n} tokens a block" for n in lengths}
    panels = [
        ("training loss", losses, {"yscale": "log"}),
        ("PSNR, dB", quality, {}),
        ("codes used since the last log line, share", {"codebook_use": None}, {"ylim": (0, 1.03)}),
    ]
    logits = {}
    for name in _keys(records, end="_logit"):
        part, kind, _ = name.split("_")
        logits[name] = f"{part}, {'reconstructed' if kind == 'fake' else kind}"
    _save_curves(records, path, [*panels, ("discriminators' mean logits", logits, {})] if logits else panels)


def save_router_curve(log: Path, path: Path) -> None:
    """Draws the log of router training: loss, and P on held-out videos."""
    records = read_log(log)
    percentiles = {key: f"w_q {key.rsplit('_', 1)[-1]}" for key in _keys(records, "val/percentile_")}
    panels = [("training loss", {"loss": None}, {"yscale": "log"}), ("P on held-out videos, %", percentiles, {})]
    _save_curves(records, path, panels)


def save_clips(clips: torch.Tensor, path: Path, frames: int = 4) -> None:
    """A picture of clips, two side by side, of each some frames in a row.

    Args:
        clips: (B, F, 3, H, W) in [-1, 1].
        path: PNG to write.
        frames: frames shown of each clip, evenly spaced.
    """
    pick = torch.linspace(0, clips.shape[1] - 1, frames).round().long()
    strips = ((clips[:, pick].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    strips = strips.permute(0, 3, 1, 4, 2).flatten(2, 3)  # (B, H, n * W, 3)
    strips = torch.nn.functional.pad(strips, (0, 0, 0, 4, 0, 4), value=255)
    strips = torch.cat([strips, strips.new_full((len(strips) % 2, *strips.shape[1:]), 255)])
    rows = strips.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)  # (B / 2, H, 2 * n * W, 3)
    _save(rows, path)


def save_generator_curve(log: Path, path: Path) -> None:
    """Draws the log of generator training: loss by kind of token, of codes by block, and accuracy of lengths."""
    records = read_log(log)
    losses = {name: name for name in ("total", "codes", "lengths", "end")}
    losses |= {"val/total": "validation", "val/prediction_total": "validation, frame prediction"}
    blocks = {name: name.replace("_", " ") for name in _keys(records, "block_")}
    accuracy = {"length_accuracy": "training", "val/length_accuracy": "validation"}
    panels = [
        ("loss, nats a token", losses, {}),
        ("loss of codes by block, nats", blocks, {}),
        ("lengths that were the most likely, share", accuracy, {"ylim": (0, 1.03)}),
    ]
    _save_curves(records, path, panels)
