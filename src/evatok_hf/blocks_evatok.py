"""Where the 1D tokens of a batch lie, and attention under temporal causality: anything of block t sees blocks <= t.

Clips of a batch have tokens of different numbers. `PaddedLayout` gives each clip a row, blocks padded to the longest
clip's: simple, and the reference. `PackedLayout` has one row with the tokens of all clips one after another, so that
linear layers compute no padding, and attention is a call for each clip and block (equal sizes together), or one call of
flex attention under a block mask. All give the same to rounding; what is masked is in no case attended to.

Shapes: B clips, T blocks, C cells of a block, M longest candidate, N places of a row, D width, d of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch

# Tokens that are worked on together on a CPU: what a layer makes of more does not stay in its cache.
_TOKENS_TOGETHER = 2048

# query, key, value (B, heads, Q or K, d) and a mask or None -> (B, Q, heads, d)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, object], torch.Tensor]


class Blocks(ABC):
    """Which keys the queries of a call see."""

    @abstractmethod
    def attend(self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(rows, heads, Q or K, d), rows of queries and keys each as their layout has them -> (rows, Q, heads, d)."""


@dataclass
class CausalBlocks(Blocks):
    """Clips in rows of their own, all with the same places.

    There is a call for each block rather than one under a mask: what is masked is not computed, and calls without a
    mask have quicker kernels.

    Attributes:
        queries: (T,) how many queries each block has.
        keys: (T,) how many keys.
        valid: (B, 1, 1, all keys) False for keys that are padding, or None where none are.
    """

    queries: list[int]
    keys: list[int]
    valid: torch.Tensor | None = None

    # Like that of packed blocks, its Python depends on lengths, which differ from step to step; compiled, it would be
    # compiled again and again. The linear layers around it are compiled once for all lengths.
    @torch.compiler.disable
    def attend(self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = []
        for own, seen in zip(q.split(self.queries, dim=2), accumulate(self.keys), strict=True):
            mask = None if self.valid is None else self.valid[..., :seen]
            parts.append(attend(own, k[:, :, :seen], v[:, :, :seen], mask))
        return torch.cat(parts, dim=1)


@dataclass
class PackedBlocks(Blocks):
    """Clips of different lengths one after another: a call for each clip and block, those of equal sizes together.

    Attributes:
        queries: (B, T) how many queries each block of each clip has.
        keys: (B, T) how many keys.
    """

    queries: list[list[int]]
    keys: list[list[int]]

    def __post_init__(self):
        self._calls: dict[tuple[int, int], list[tuple[int, int]]] = {}  # sizes of a call -> clips and blocks
        for clip, (queries, keys) in enumerate(zip(self.queries, self.keys, strict=True)):
            for block, sizes in enumerate(zip(queries, accumulate(keys), strict=True)):
                self._calls.setdefault(sizes, []).append((clip, block))

    @torch.compiler.disable
    def attend(self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Splits rather than slices of the whole, whose gradients would each be as large as the whole.
        own = [clip.split(sizes, dim=1) for clip, sizes in zip(_clips(q, self.queries), self.queries, strict=True)]
        keys, values = _clips(k, self.keys), _clips(v, self.keys)  # B of (heads, K, d)
        outputs: dict[tuple[int, int], torch.Tensor] = {}
        for (_, seen), places in self._calls.items():
            out = attend(
                torch.stack([own[clip][block] for clip, block in places]),
                torch.stack([keys[clip][:, :seen] for clip, _ in places]),
                torch.stack([values[clip][:, :seen] for clip, _ in places]),
                None,
            )  # (calls, Q, heads, d)
            outputs.update(zip(places, out.unbind(0), strict=True))
        return torch.cat([outputs[place] for place in sorted(outputs)]).unflatten(0, (len(q), -1))


def _clips(x: torch.Tensor, sizes: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """(B, heads, N, d), or (1, heads, N, d) with all clips one after another -> B of (heads, N of the clip, d)."""
    return x.unbind(0) if len(x) == len(sizes) else x[0].split([sum(clip) for clip in sizes], dim=1)


class FlexBlocks(Blocks):
    """Clips one after another in one call of flex attention, which skips tiles of 128 x 128 that are masked."""

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor):
        """queries, keys: (B, T) how many each block of each clip has."""
        from torch.nn.attention.flex_attention import create_block_mask

        (query_clip, query_block), (key_clip, key_block) = _owners(queries), _owners(keys)

        def sees(batch, head, query, key):
            return (query_clip[query] == key_clip[key]) & (key_block[key] <= query_block[query])

        # Compiled, the mask of all pairs does not have to be in memory at once; that needs a GPU's compiler to pay.
        self.mask = create_block_mask(
            sees, None, None, len(query_clip), len(key_clip), queries.device, _compile=queries.is_cuda
        )

    def attend(self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = len(q)
        q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))  # (1, heads, all Q or K, d)
        return attend(q, k, v, self.mask).unflatten(1, (rows, -1))[0]


def _owners(sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) -> clip and block of each of the places that they have one after another."""
    owner = torch.arange(sizes.numel(), device=sizes.device).repeat_interleave(sizes.flatten())
    return owner // sizes.shape[1], owner % sizes.shape[1]


class TokenLayout(ABC):
    """Where the 1D tokens of a batch lie.

    Attributes:
        lengths: (B, T) tokens of each block.
        block: (N,) temporal block of each place of a row.
        slot: (N,) its index inside the block.
    """

    lengths: torch.Tensor
    block: torch.Tensor
    slot: torch.Tensor

    @staticmethod
    def choose(lengths: torch.Tensor, implementation: str) -> TokenLayout:
        """The layout for (B, T) lengths and an attention implementation: eager is the reference, padded."""
        if implementation == "flex_attention":
            return PackedLayout(lengths, flex=True)
        # Equal lengths need no padding, and rows of their own no copies.
        if implementation == "eager" or (lengths == lengths[:1]).all():
            return PaddedLayout(lengths)
        return PackedLayout(lengths)

    def parts(self) -> list[tuple[slice, slice, TokenLayout]]:
        """Clips, their tokens and their layout, for every part of the batch that is better worked on by itself."""
        return [(slice(None), slice(None), self)]

    @abstractmethod
    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """(B, T, M, D) of all slots that a block can have -> (rows, N, D)."""

    @abstractmethod
    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, N, D) -> (tokens of all clips, D), clip after clip, block after block."""

    @abstractmethod
    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """Undoes `pack`, with 0 in padding."""

    @abstractmethod
    def first(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, N, D) -> (B, T, D): the first token of each block."""

    @abstractmethod
    def over_tokens(self) -> Blocks:
        """Tokens see tokens."""

    @abstractmethod
    def over_cells(self, cells: int) -> Blocks:
        """Tokens see the `cells` of each block."""

    @abstractmethod
    def from_cells(self, cells: int) -> Blocks:
        """Cells see tokens."""


@dataclass
class PaddedLayout(TokenLayout):
    """A row for each clip; a block takes as many places as its longest clip needs.

    Attributes:
        sizes: (T,) places of each block.
        starts: (T,) the first of them.
        valid: (B, N) False for padding.
    """

    lengths: torch.Tensor
    sizes: list[int] = field(init=False)
    block: torch.Tensor = field(init=False)
    slot: torch.Tensor = field(init=False)
    starts: torch.Tensor = field(init=False)
    valid: torch.Tensor = field(init=False)

    def __post_init__(self):
        sizes = self.lengths.amax(0)
        self.sizes = sizes.tolist()
        self.starts = sizes.cumsum(0) - sizes
        self.block = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        self.slot = torch.arange(len(self.block), device=sizes.device) - self.starts[self.block]
        self.valid = self.slot < self.lengths[:, self.block]

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        return slots.flatten(1, 2)[:, self.block * slots.shape[2] + self.slot]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.valid]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(*self.valid.shape, x.shape[-1])
        padded[self.valid] = x
        return padded

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.starts]

    def _over(self, queries: list[int]) -> Blocks:
        return CausalBlocks(queries, self.sizes, None if self.valid.all() else self.valid[:, None, None])

    def over_tokens(self) -> Blocks:
        return self._over(self.sizes)

    def over_cells(self, cells: int) -> Blocks:
        return CausalBlocks(self.sizes, [cells] * len(self.sizes))

    def from_cells(self, cells: int) -> Blocks:
        return self._over([cells] * len(self.sizes))


@dataclass
class PackedLayout(TokenLayout):
    """One row with the tokens of all clips, as `VideoTokens` has them.

    Attributes:
        flex: whether attention is one call of flex attention.
        clip: (N,) clip of each place.
        starts: (B, T) place of each block's first token.
    """

    lengths: torch.Tensor
    flex: bool = False
    clip: torch.Tensor = field(init=False)
    block: torch.Tensor = field(init=False)
    slot: torch.Tensor = field(init=False)
    starts: torch.Tensor = field(init=False)

    def __post_init__(self):
        flat = self.lengths.flatten()
        self.clip, self.block = _owners(self.lengths)
        self.starts = (flat.cumsum(0) - flat).view_as(self.lengths)
        self.slot = torch.arange(len(self.clip), device=flat.device) - self.starts[self.clip, self.block]

    def parts(self) -> list[tuple[slice, slice, TokenLayout]]:
        if self.flex or self.lengths.device.type != "cpu":
            return super().parts()
        tokens = [0, *self.lengths.sum(-1).cumsum(0).tolist()]  # before each clip
        found, first = [], 0
        for clip in range(1, len(tokens)):
            if clip == len(self.lengths) or tokens[clip + 1] - tokens[first] > _TOKENS_TOGETHER:
                places = slice(tokens[first], tokens[clip])
                found.append((slice(first, clip), places, PackedLayout(self.lengths[first:clip])))
                first = clip
        return found

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        return slots[self.clip, self.block, self.slot][None]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return x[0]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        return x[None]

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return x[0, self.starts]

    def _blocks(self, queries: torch.Tensor, keys: torch.Tensor) -> Blocks:
        return FlexBlocks(queries, keys) if self.flex else PackedBlocks(queries.tolist(), keys.tolist())

    def over_tokens(self) -> Blocks:
        return self._blocks(self.lengths, self.lengths)

    def over_cells(self, cells: int) -> Blocks:
        return self._blocks(self.lengths, torch.full_like(self.lengths, cells))

    def from_cells(self, cells: int) -> Blocks:
        return self._blocks(torch.full_like(self.lengths, cells), self.lengths)
