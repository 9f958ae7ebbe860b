"""A proxy tokenizer, videos and curations small enough for any test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState, GradientState
from video_samples import encode, moving_frames

from evatok_hf import EvatokConfig, EvatokModel
from evatok_hf.data.curated import list_shards, read_note
from training import curate

TRAINING = Path(__file__).parents[2] / "training"

METRIC = "perceptual-effnet-lite0"
CLIP = {"num_frames": 4, "image_size": 32}
SPACE = {"block_lengths": [2, 4, 8], "num_blocks": 2}  # 9 assignments, 12 nodes


@torch.no_grad()
def make_proxy(folder: Path, seed: int = 0, **fields) -> Path:
    """A random tokenizer whose assignments differ in what they reconstruct."""
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2}
    parts = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = EvatokConfig(
            **{**CLIP, **SPACE, **parts, "codebook_size": 64, "embed_dim": 32, "initializer_range": 0.25, **fields}
        )
        EvatokModel(config).save_pretrained(folder)
    return folder


def make_videos(folder: Path, count: int = 6, damaged: bool = True) -> Path:
    """Videos of 10 frames, from flat to busy; and one file that is no video, and one video of 2 frames."""
    folder.mkdir(parents=True)
    for index in range(count):
        noise = np.random.default_rng(index).normal(size=(10, 32, 40, 3)) * 60 * index / count
        frames = np.clip(moving_frames(10, 32, 40) * 0.6 + noise + 10 * index, 0, 255).astype(np.uint8)
        encode(folder / f"v{index}.mp4", frames, options={"preset": "ultrafast"})
    if damaged:
        (folder / "broken.mp4").write_bytes(b"no video")
        encode(folder / "short.mp4", moving_frames(2, 32, 40), options={"preset": "ultrafast"})
    return folder


def options(output_dir: Path, videos: Path, proxy: Path, *more: object) -> list[str]:
    given = {
        "output_dir": output_dir,
        "train_data": videos,
        "tokenizer": proxy,
        "perceptual": METRIC,
        "clips": 6,
        "shard_size": 2,
        "num_workers": 0,
        "cpu": "true",
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *map(str, more)]


def run_curation(argv: list[str]) -> Path:
    # accelerate keeps its settings for the life of a process, as is right outside tests.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return curate.main(argv)


def read_shards(folder: Path) -> list[tuple]:
    """All that the shards hold."""
    found = []
    for path in list_shards(folder):
        found.append((path.name, read_note(path), repr(pq.read_table(path).to_pydict())))  # in which NaN equals NaN
    return found


def read_summary(folder: Path) -> dict:
    """`curation.json` without the time that it took and how the script was called."""
    summary = json.loads((folder / "curation.json").read_text())
    return {name: value for name, value in summary.items() if name not in ("seconds", "command")}
