"""Small generators with random weights, and random tokens to train them on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from evatok_hf import EvatokForCausalLM, EvatokGeneratorConfig
from evatok_hf.data.token_dataset import SHARDS, features, make_rows
from evatok_hf.models.modeling_evatok_generator import Prompt

SPACE = {"block_lengths": [2, 4, 8], "num_blocks": 2}  # of the tokenizer of token_samples.py
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}

SMALL = {
    "codebook_size": 32,
    "block_lengths": [2, 4, 8],
    "num_blocks": 3,
    "class_names": ["walk", "run"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,  # logits far from equal
}


def make_generator(seed: int = 0, **overrides) -> EvatokForCausalLM:
    torch.manual_seed(seed)
    return EvatokForCausalLM(EvatokGeneratorConfig(**{**SMALL, **overrides})).eval()


def random_ids(lengths: torch.Tensor, codebook_size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(codebook_size, (int(lengths.sum()),), generator=torch.Generator().manual_seed(seed))


def conditions(model: EvatokForCausalLM, count: int) -> list[Prompt]:
    """Prompts with conditions of different lengths."""
    space = model.config.assignment_space
    rows = space.all()[torch.linspace(0, len(space) - 1, count).long()]
    return [Prompt(i % 2, row, random_ids(row, seed=i)) for i, row in enumerate(rows)]


def write_tokens(
    folder: Path,
    fingerprint: str,
    count: int = 20,
    classes: tuple[str, ...] = ("cat", "dog"),
    known: int | None = 2,
    seed: int = 0,
) -> Path:
    """A finished data set of random tokens; clip i is of class i % 3 - 1, -1 being none."""
    rng = np.random.default_rng(seed)
    summary = {**SPACE, "classes": list(classes), "codebook_size": 64, "tokenizer_fingerprint": fingerprint}
    summary |= {"known_frames": known, "clips": count, "strides": [2]}
    batch = {
        "source": [f"v{index}.mp4" for index in range(count)],
        "origin": torch.zeros(count, dtype=torch.int64),
        "label": torch.tensor([index % 3 - 1 if classes else -1 for index in range(count)]),
        "frames": torch.zeros(count, 4),
        "crop": torch.zeros(count, 4, dtype=torch.int64),
        "fps": torch.full((count,), 30.0),
    }
    tokens = []
    for _ in range(count):
        row = {}
        for prefix in ("", "condition_") if known else ("",):
            lengths = rng.choice([2, 4, 8], 2)
            row |= {f"{prefix}lengths": torch.from_numpy(lengths)}
            row |= {f"{prefix}ids": torch.from_numpy(rng.integers(0, 64, lengths.sum()))}
        tokens.append(row)
    columns = features(2, classes, known is not None)
    note = {"settings": {"tokenizer_fingerprint": fingerprint}}
    SHARDS.write(SHARDS.path(folder, 0, 0), make_rows(batch, tokens), columns, note)
    (folder / "tokens.json").write_text(json.dumps(summary))
    return folder
