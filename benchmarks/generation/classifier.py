"""A small classifier of clips, the judge of whether generated clips show what was asked for.

It is trained on real clips, mirrored half of the time because a generator's clips may be. Most of its training clips
are blurred by a random amount (our choice), as a tokenizer blurs what it reconstructs, so that it goes by shapes and
colours rather than by detail that no reconstruction has. It never sees a reconstruction unless it is given them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from evatok_hf.data.streaming import to_float
from evatok_hf.models.files_evatok import Replacement

# Part of the key of cached weights; to be raised when the network or its training changes.
VERSION = 2


@dataclass
class ClassifierSettings:
    """Settings of a classifier's training."""

    epochs: int = 10  # times that each clip is seen
    batch_size: int = 32
    learning_rate: float = 2e-3  # the largest, of AdamW with a one-cycle schedule
    width: int = 32  # channels of the first layer
    blur_probability: float = 0.75  # share of clips that are blurred
    largest_blur: float = 8.0  # factor by which they lose resolution; logarithms of factors are drawn uniformly
    seed: int = 0  # of weights, order and augmentation


class ClipClassifier(nn.Module):
    """3D convolutions, the first over patches of 4 x 4 pixels and 4 frames, then a mean and a maximum over all places.
    The first has `width` channels, the others two and four times as many."""

    def __init__(self, num_classes: int, width: int = 32):
        super().__init__()
        self.stem = nn.Conv3d(3, width, (4, 6, 6), stride=4, padding=(0, 1, 1), bias=False)
        self.layers = nn.ModuleList()
        self.norms = nn.ModuleList([nn.BatchNorm3d(width)])
        for factor in (1, 2):
            self.layers.append(nn.Conv3d(factor * width, 2 * factor * width, 3, (1, 2, 2), padding=1, bias=False))
            self.norms.append(nn.BatchNorm3d(2 * factor * width))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, 3, H, W) in [-1, 1], at least 4 frames -> logits (B, classes)."""
        x = video.transpose(1, 2)  # (B, 3, F, H, W)
        for layer, norm in zip([self.stem, *self.layers], self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        x = torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4))], dim=1)
        return self.head(self.dropout(x))


def train_classifier(
    video: torch.Tensor, labels: torch.Tensor, num_classes: int, settings: ClassifierSettings
) -> ClipClassifier:
    """A classifier trained on clips (N, F, 3, H, W), uint8 or in [-1, 1], and labels (N,) int64, in evaluation mode;
    the same for the same clips, settings and machine."""
    if len(video) == 0 or len(video) != len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"{len(video)} clips, {len(labels)} labels; give a label below {num_classes} for each clip.")
    draws = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = ClipClassifier(num_classes, settings.width).train()
        steps = settings.epochs * math.ceil(len(video) / settings.batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=steps + 1, pct_start=0.15
        )
        bar = tqdm(total=steps, desc="classifier", unit="step", file=sys.stderr)
        for _ in range(settings.epochs):
            total = 0.0
            for rows in torch.randperm(len(video), generator=draws).split(settings.batch_size):
                x = augment(to_float(video[rows]), settings.blur_probability, settings.largest_blur, draws)
                loss = F.cross_entropy(model(x), labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                total += loss.item() * len(rows)
            bar.set_postfix(loss=f"{total / len(video):.3f}")
        bar.close()
    return model.eval()


def augment(
    video: torch.Tensor, blur_probability: float, largest_blur: float, generator: torch.Generator
) -> torch.Tensor:
    """Mirrors half of the clips and blurs some of them, (B, F, 3, H, W), all frames of a clip alike."""
    chances = torch.rand(len(video), 3, generator=generator)
    video = torch.where((chances[:, 0] < 0.5).view(-1, 1, 1, 1, 1), video.flip(-1), video)
    for row in torch.nonzero(chances[:, 1] < blur_probability)[:, 0].tolist():
        size = video.shape[-2:]
        small = [max(1, round(side / largest_blur ** float(chances[row, 2]))) for side in size]
        low = F.interpolate(video[row], small, mode="bilinear", antialias=True)
        video[row] = F.interpolate(low, size, mode="bilinear")
    return video


@torch.no_grad()
def predict_classes(model: ClipClassifier, video: torch.Tensor) -> torch.Tensor:
    """The likeliest class of each clip, (N, F, 3, H, W) uint8 or floats in [-1, 1] -> (N,) int64."""
    rows = [model(to_float(part)).argmax(-1) for part in video.split(64)]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)


def accuracy(predicted: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """Shares that are right, in all and by class (None without clips of it), and each class's most usual answer."""

    def share(right: torch.Tensor) -> float | None:
        return right.double().mean().item() if len(right) else None

    rows = {}
    for label, name in enumerate(classes):
        answers = predicted[labels == label]
        usual = classes[int(answers.bincount(minlength=len(classes)).argmax())] if len(answers) else None
        rows[name] = {"clips": len(answers), "accuracy": share(answers == label), "taken_for": usual}
    return {"clips": len(labels), "accuracy": share(predicted == labels), "by_class": rows}


def cached_classifier(
    folder: str | Path,
    facts: dict,
    clips: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    num_classes: int,
    settings: ClassifierSettings,
) -> tuple[ClipClassifier, str]:
    """A classifier, kept in a folder once it is trained, and the name of its file. `facts` tell the clips from others;
    `clips` gives video and labels, where they are needed."""
    key = json.dumps({"version": VERSION, "settings": asdict(settings), **facts}, sort_keys=True)
    path = cache_path(folder, "classifier", key)
    model = ClipClassifier(num_classes, settings.width)
    model.load_state_dict(cached(path, lambda: train_classifier(*clips(), num_classes, settings).state_dict()))
    return model.eval(), path.name


def cache_path(folder: str | Path, kind: str, key: str) -> Path:
    return Path(folder) / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def cached(path: Path, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of a file, which are computed and kept where it is not there; it appears only when it is complete."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with Replacement(path) as partial:
            save_file(compute(), partial)
    return load_file(path)
