"""Small generators with random weights."""

from __future__ import annotations

import torch

from evatok_hf import EvatokGenerator, EvatokGeneratorConfig, Prompt

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


def make_generator(seed: int = 0, **overrides) -> EvatokGenerator:
    torch.manual_seed(seed)
    return EvatokGenerator(EvatokGeneratorConfig(**{**SMALL, **overrides})).eval()


def random_ids(lengths: torch.Tensor, codebook_size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(codebook_size, (int(lengths.sum()),), generator=torch.Generator().manual_seed(seed))


def conditions(model: EvatokGenerator, count: int) -> list[Prompt]:
    """Prompts with conditions of different lengths."""
    space = model.config.assignment_space
    rows = space.all()[torch.linspace(0, len(space) - 1, count).long()]
    return [Prompt(i % 2, row, random_ids(row, seed=i)) for i, row in enumerate(rows)]
