"""The set of token assignments: how many tokens each temporal block of a clip may get.

An assignment is T block lengths, each from an ascending tuple of m candidates, so there are m**T of them
(625 for five candidates and four blocks, paper section 3). Assignments are numbered in lexicographic order of their
block lengths, the first block being the most significant digit in base m.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

LengthsLike = int | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor


class AssignmentSpace:
    """All assignments of `block_lengths` candidates to `num_blocks` temporal blocks.

    Args:
        block_lengths: ascending candidate lengths of one block, tokens.
        num_blocks: temporal blocks T of a clip.

    Raises:
        ValueError: candidates are empty, not positive, or not strictly ascending; `num_blocks` is not positive.
    """

    def __init__(self, block_lengths: Sequence[int], num_blocks: int):
        lengths = [int(length) for length in block_lengths]
        if not lengths or lengths[0] < 1 or any(b <= a for a, b in pairwise(lengths)):
            raise ValueError(f"block_lengths must be positive and strictly ascending, got {list(block_lengths)}.")
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}.")
        self.block_lengths = tuple(lengths)
        self.num_blocks = int(num_blocks)

    def __len__(self) -> int:
        return len(self.block_lengths) ** self.num_blocks

    def __repr__(self) -> str:
        return f"AssignmentSpace(block_lengths={self.block_lengths}, num_blocks={self.num_blocks})"

    @property
    def min_tokens(self) -> int:
        """Tokens of the shortest assignment."""
        return self.block_lengths[0] * self.num_blocks

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest assignment."""
        return self.block_lengths[-1] * self.num_blocks

    def validate(self, lengths: LengthsLike, batch_size: int | None = None) -> torch.Tensor:
        """Checks lengths and returns them as an int64 tensor on the CPU.

        Args:
            lengths: one int (uniform), T ints (one assignment for every clip), or (B, T).
            batch_size: when given, one assignment is repeated to (batch_size, T).

        Returns:
            (T,) or (B, T) int64; always (batch_size, T) when `batch_size` is given.

        Raises:
            ValueError: a wrong number of blocks or clips, or a length that is no candidate; the message lists the set.
        """
        if isinstance(lengths, torch.Tensor):
            if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
                raise ValueError(f"lengths must be integers, got a tensor of {lengths.dtype}.")
            values = lengths.detach().to("cpu", torch.int64)
        else:
            try:
                values = torch.as_tensor(lengths)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"lengths must be integers in rows of {self.num_blocks}: {error}") from error
            if values.is_floating_point() or values.dtype == torch.bool:
                raise ValueError(f"lengths must be integers, got {lengths!r}.")
            values = values.to(torch.int64)
        if values.ndim == 0:
            values = values.expand(self.num_blocks)
        if values.ndim > 2 or values.shape[-1] != self.num_blocks:
            raise ValueError(
                f"a clip has {self.num_blocks} temporal blocks, but lengths has shape {tuple(values.shape)}; "
                f"give {self.num_blocks} lengths a clip, each one of {list(self.block_lengths)}."
            )
        known = torch.isin(values, torch.tensor(self.block_lengths))
        if not known.all():
            wrong = sorted({int(value) for value in values[~known]})
            raise ValueError(f"block lengths {wrong} are not among the candidates; use {list(self.block_lengths)}.")
        if batch_size is None:
            return values.clone()
        if values.ndim == 1:
            return values.repeat(batch_size, 1)  # (B, T)
        if values.shape[0] != batch_size:
            raise ValueError(f"lengths has {values.shape[0]} rows for {batch_size} clips; give one row a clip.")
        return values.clone()

    def to_index(self, lengths: LengthsLike) -> torch.Tensor:
        """Block lengths (T,) or (B, T) -> assignment index () or (B,), int64. Raises ValueError as `validate`."""
        digits = torch.searchsorted(torch.tensor(self.block_lengths), self.validate(lengths))
        return (digits * self._place_values()).sum(-1)

    def to_lengths(self, index: int | torch.Tensor) -> torch.Tensor:
        """Assignment index () or (B,) -> block lengths (T,) or (B, T), int64.

        Raises:
            ValueError: an index outside [0, len(self)).
        """
        index = torch.as_tensor(index).to("cpu", torch.int64)
        if ((index < 0) | (index >= len(self))).any():
            raise ValueError(f"assignment indices run from 0 to {len(self) - 1}, got {index.tolist()}.")
        digits = index.unsqueeze(-1) // self._place_values() % len(self.block_lengths)
        return torch.tensor(self.block_lengths)[digits]

    def all(self, min_tokens: int | None = None, max_tokens: int | None = None) -> torch.Tensor:
        """Every assignment in index order, (A, T) int64, optionally only those with a total within the limits.

        Raises:
            ValueError: no assignment is within the limits.
        """
        lengths = self.to_lengths(torch.arange(len(self)))
        total = lengths.sum(-1)
        keep = torch.ones_like(total, dtype=torch.bool)
        if min_tokens is not None:
            keep &= total >= min_tokens
        if max_tokens is not None:
            keep &= total <= max_tokens
        if not keep.any():
            raise ValueError(
                f"no assignment has between {min_tokens} and {max_tokens} tokens; "
                f"totals run from {self.min_tokens} to {self.max_tokens}."
            )
        return lengths[keep]

    def random(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """Assignments drawn uniformly (within the limits), (batch_size, T) int64."""
        pool = self.all(min_tokens, max_tokens)
        return pool[torch.randint(len(pool), (batch_size,), generator=generator)]

    def uniform(self, length: int, batch_size: int | None = None) -> torch.Tensor:
        """The same candidate for every block, (T,) or (batch_size, T) int64."""
        return self.validate(int(length), batch_size)

    def _place_values(self) -> torch.Tensor:
        m = len(self.block_lengths)
        return m ** torch.arange(self.num_blocks - 1, -1, -1)
