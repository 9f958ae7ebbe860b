"""A tokenizer with a router, videos of two classes and runs of tokenize_dataset.py small enough for any test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from curated_samples import CLIP, make_proxy, make_videos
from router_samples import make_router
from video_samples import moving_frames

from evatok_hf import EvatokModel, EvatokVideoProcessor
from evatok_hf.data.streaming import to_float
from evatok_hf.data.token_dataset import SHARDS
from evatok_hf.models.modeling_evatok import PaddedLayout
from training import tokenize_dataset

SIZE = CLIP["image_size"]


@torch.no_grad()
def make_checkpoint(folder: Path, seed: int = 0, router: bool = True) -> Path:
    """A random tokenizer whose ids differ from token to token, and a router that gives clips different lengths."""
    tokenizer = make_proxy(folder / "tokenizer", seed)
    model = EvatokModel.from_pretrained(tokenizer).eval()
    # Random features all point the same way, towards one code; around their mean they point everywhere.
    frames = torch.from_numpy(moving_frames(4, SIZE, SIZE)).permute(0, 3, 1, 2)[None]
    features = model.features(to_float(frames), PaddedLayout(torch.full((1, 2), 8)))
    model.encoder.to_codebook.bias.sub_(features.mean(0))
    model.save_pretrained(tokenizer)
    sides = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    EvatokVideoProcessor(**sides).save_pretrained(tokenizer)
    if router:
        make_router(model.config, seed).save_pretrained(folder / "router")
    return folder


def make_labelled(root: Path) -> Path:
    """train: 3 videos of cats, 2 of dogs, 2 damaged files; test: 2 videos, of a bird and of a dog."""
    made = make_videos(root / "made", 7)
    places = {
        "train/cat": ["v0.mp4", "v1.mp4", "v2.mp4"],
        "train/dog": ["v3.mp4", "v4.mp4", "broken.mp4", "short.mp4"],
        "test/bird": ["v5.mp4"],
        "test/dog": ["v6.mp4"],
    }
    for place, names in places.items():
        (root / "videos" / place).mkdir(parents=True)
        for name in names:
            shutil.move(made / name, root / "videos" / place / name)
    return root / "videos"


def options(output_dir: Path, videos: Path, checkpoint: Path, *more: object) -> list[str]:
    given = {
        "output_dir": output_dir,
        "train_data": videos,
        "tokenizer": checkpoint,
        "clips_per_video": 2,
        "shard_size": 4,
        "batch_size": 3,
        "num_workers": 0,
        "cpu": "true",
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *map(str, more)]


def run_tokenizing(argv: list[str], picture: bool = False) -> Path:
    """A run of the script; without the picture, which takes longer than all the rest."""
    # accelerate keeps its settings for the life of a process, as is right outside tests.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.MonkeyPatch.context() as patch:
        if not picture:
            patch.setattr("evatok_hf.hub.tokens_card._draw", lambda *args: None)
        return tokenize_dataset.main(argv)


def read_shards(folder: Path) -> list[tuple]:
    """All that the shards hold."""
    found = []
    for path in SHARDS.list(folder):
        found.append((path.name, SHARDS.read_note(path), pq.read_table(path).to_pydict()))
    return found


def read_rows(folder: Path) -> list[dict]:
    """The rows of all shards, in order."""
    return [row for path in SHARDS.list(folder) for row in pq.read_table(path).to_pylist()]


def read_summary(folder: Path) -> dict:
    """`tokens.json` without the time that it took and how the script was called."""
    summary = json.loads((folder / "tokens.json").read_text())
    return {name: value for name, value in summary.items() if name not in ("seconds", "command")}
