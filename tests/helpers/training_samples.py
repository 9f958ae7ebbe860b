"""What tests of tokenizer training share: a very small model, options of a quick run, and how to read what it left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from video_samples import encode, moving_frames

from evatok_hf import EvatokRouter, EvatokRouterConfig
from training import train_tokenizer

TRAINING = Path(__file__).parents[2] / "training"

MODEL = {
    "image_size": 32,
    "num_frames": 8,
    "block_lengths": [2, 4, 8, 16, 32],
    "codebook_size": 64,
    "embed_dim": 32,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 1,
    "encoder_num_heads": 2,
    "decoder_hidden_size": 32,
    "decoder_num_layers": 1,
    "decoder_num_heads": 2,
}


def options(output_dir: Path, videos: Path, *more: object) -> list[str]:
    given = {
        "output_dir": output_dir,
        "train_data": videos,
        "model_overrides": json.dumps(MODEL),
        "perceptual": "none",
        "mixed_precision": "no",
        "batch_size": 2,
        "learning_rate": 1e-3,
        "num_workers": 0,
        "log_every": 1,
        "cpu": "true",
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *map(str, more)]


def train(argv: list[str]) -> Path:
    # accelerate keeps its settings for the life of a process, as is right outside tests.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return train_tokenizer.main(argv)


def read_log(output_dir: Path) -> list[dict]:
    """The lines of the log without what depends on the clock or on how far the loader has read ahead."""
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    clock = ("clips_per_second", "mfu", "data_wait", "seconds", "skipped_videos")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_videos(root: Path) -> Path:
    """Six videos of 10 frames that differ in brightness."""
    for index in range(6):
        frames = np.clip(moving_frames(10, 32, 40).astype(int) + 12 * index, 0, 255).astype(np.uint8)
        encode(root / f"v{index}.mp4", frames, options={"preset": "ultrafast"})
    return root


def small_router(folder: Path, **overrides: object) -> Path:
    """A saved router with random weights for clips of `MODEL`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.2}
    clip = {name: MODEL[name] for name in ("image_size", "num_frames", "block_lengths")}
    path = folder / f"router{len(overrides)}"
    EvatokRouter(EvatokRouterConfig.from_preset("tiny", **{**clip, **sizes, **overrides})).save_pretrained(path)
    return path
