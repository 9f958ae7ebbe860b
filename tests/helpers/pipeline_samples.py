"""Checkpoints with a tiny random generator, and a pipeline of one."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from evatok_hf import EvatokForCausalLM, EvatokGeneratorConfig, EvatokModel

CLASSES = ["walk", "run", "jump"]
# Of the tokenizer of `conftest.checkpoint`.
TOKENS = {"codebook_size": 64, "block_lengths": [8, 16, 32, 64, 128], "num_blocks": 4}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_generator(seed: int = 0, **fields) -> EvatokForCausalLM:
    """A random generator with large weights, so that its samples depend on what it is asked for."""
    config = {**SIZES, **TOKENS, "class_names": CLASSES, "initializer_range": 1.0, "fps": 12.5, **fields}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EvatokForCausalLM(EvatokGeneratorConfig(**config)).eval()


def with_generator(checkpoint: Path, folder: Path, **fields) -> Path:
    """A copy of a checkpoint with a random generator in `generator/`, which names the copy's tokenizer."""
    shutil.copytree(checkpoint, folder)
    fingerprint = EvatokModel.from_pretrained(folder / "tokenizer").fingerprint()
    make_generator(**{"tokenizer_fingerprint": fingerprint, **fields}).save_pretrained(folder / "generator")
    return folder
