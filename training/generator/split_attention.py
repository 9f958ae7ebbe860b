"""Attention in packed rows, one sequence at a time: no work for places of other sequences. The quickest on CPUs."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "split"


def packed_lengths(position_ids: torch.Tensor) -> list[int]:
    """Of the sequences of packed rows (R, L), paddings counted as such, row after row."""
    starts = (position_ids.flatten() == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], position_ids.numel()], strict=True)]


def split_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    *,
    packed_lengths: list[int],
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence, as an attention function of transformers.

    Args:
        query, key, value: (R, H, L, D).
        packed_lengths: as `packed_lengths` gives them.

    Returns:
        (R, L, H, D), and no weights.

    Raises:
        ValueError: heads that share keys, or dropout.
    """
    if key.shape != query.shape or (dropout and module.training):
        raise ValueError("attention of this kind has as many keys as heads, and no dropout; use sdpa.")
    rows, _, row_length, _ = query.shape
    # Under autocast the rotary embedding has made float32 of queries and keys.
    query, key = (query * scaling).to(value.dtype), key.to(value.dtype)
    longest = max(packed_lengths)
    future = torch.full((longest, longest), -torch.inf, dtype=value.dtype, device=value.device).triu(1)
    parts = [
        tensor.transpose(1, 2).flatten(0, 1).split(packed_lengths) for tensor in (query, key, value)
    ]  # (n, H, D) each
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        scores = q.transpose(0, 1) @ k.permute(1, 2, 0) + future[: len(q), : len(q)]  # (H, n, n)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        outputs.append((weights @ v.transpose(0, 1)).transpose(0, 1))
    return torch.cat(outputs).unflatten(0, (rows, row_length)), None


# transformers makes no mask for an implementation that has none registered.
AttentionInterface.register(NAME, split_attention)
