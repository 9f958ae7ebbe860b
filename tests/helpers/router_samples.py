"""Routers beside the tiny checkpoints of the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from evatok_hf import EvatokConfig, EvatokModel, EvatokRouter, EvatokRouterConfig


def make_router(config: EvatokConfig, seed: int = 0, **fields) -> EvatokRouter:
    """A random router for tokenizers of that configuration, with large weights, so that clips get different lengths."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3}
    clip = {name: getattr(config, name) for name in ("image_size", "num_frames", "num_blocks", "block_lengths")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EvatokRouter(EvatokRouterConfig(**{**sizes, **clip, "position_embedding": "fixed", **fields})).eval()


def with_router(checkpoint: Path, folder: Path, **fields) -> Path:
    """A copy of a checkpoint with a random router in `router/`."""
    shutil.copytree(checkpoint, folder)
    make_router(EvatokConfig.from_pretrained(folder / "tokenizer"), **fields).save_pretrained(folder / "router")
    return folder


def with_two_candidates(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint of the same sizes with 16 assignments, which a test can search."""
    shutil.copytree(checkpoint, folder)
    config = EvatokConfig.from_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        EvatokModel(EvatokConfig(**{**config.to_dict(), "block_lengths": [8, 128]})).save_pretrained(
            folder / "tokenizer"
        )
    return folder
