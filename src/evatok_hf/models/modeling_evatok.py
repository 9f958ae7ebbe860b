"""EvatokModel: the adaptive-length 1D video tokenizer, from pure functions to the model.

`EvatokEncoderModel` is what of it encodes.

A clip is cut into 3D patches, T temporal blocks deep. Block t gets as many 1D queries as its assignment says, each the
mean of some cells of that block's grid (coarse to fine, so a shorter length is a prefix of a longer one). A Q-Former
encoder refines the queries, a vector quantiser turns them into ids, a Q-Former decoder turns ids back into patches.
Anything of block t sees only blocks <= t. Under `token_patches` a token codes a patch of the block's frames, resized to
as many patches as it has tokens, and a linear codec (`LinearCodec`) takes the encoder's place; the decoder adds to what
it makes of the ids.

Two ways compute the same to rounding: `forward` takes a batch without computing padding (`attn_implementation="eager"`
is the padded reference, "flex_attention" is for GPUs), and so do `encode` and `decode` with `exact=False`, the default
on accelerators; exactly, they go through one clip block by block with cached keys and values, so that a clip's ids
depend on no other clip of the batch and a block's ids on no later block, to the last bit.

Shapes: B clips, T blocks, G x G cells of a block, M longest candidate, N tokens of a clip or places of a row, D width,
d of a head.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .base_evatok import EvatokBaseModel
from .configuration_evatok import EvatokConfig, LengthsLike
from .tokens_evatok import VideoTokens, check_is_tokens

# Where the heads of "shifted" attention look at the start, from the query, in (blocks, rows, columns); further heads
# begin anew. Tokens gather the cells that they pool, cells the tokens around them, and both what was there before.
_QUARTERS = ((0, -0.5, -0.5), (0, -0.5, 0.5), (0, 0.5, -0.5), (0, 0.5, 0.5))
HEAD_OFFSETS = {
    "encoder_self": ((0, 0, 0), (0, 0, 1.5), (0, 0, -1.5), (0, 1.5, 0), (0, -1.5, 0), (-1, 0, 0)),
    "encoder_cross": (*_QUARTERS, (0, 0, 0), (-1, 0, 0)),
    "decoder_self": ((0, 0, 0), (0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (-1, 0, 0), (-1, 0, 0), (-2, 0, 0)),
    "decoder_cross": ((0, 0, 0), *_QUARTERS, (-1, 0, 0), (-2, 0, 0), (-3, 0, 0)),
}
# Tokens that are worked on together on a CPU: what a layer makes of more does not stay in its cache.
_TOKENS_TOGETHER = 2048
# What of the (tokens x codebook) distance table is alive at once: rows, to bound memory. On a CPU distances are found
# faster where they stay in its cache: those of few rows with all codes, or of many with some.
_ROWS_PER_CHUNK, _CODES_IN_GROUP = 8192, 128
_FEW_ROWS, _MANY_ROWS, _SOME_CODES = 16, 256, 512
# Adam on unit vectors, its step falling linearly to a twentieth. Chosen on clips of the training videos (our choice).
_LEARNING_RATE = 0.1
_BETAS = (0.5, 0.9)
_LAST_RATE = 0.05
# Under `token_patches`, how much of what the decoder says is added to the linear codec's frames, and how loud that
# starts. Frames are nearly right then, so that a step of Adam, which moves hundreds of weights alike, must not add more
# than a little (our choice).
ADDED, _START = 0.05, 0.02
# Of a patch, as a linear map, what the filters of `LinearCodec` look at (our choice; 48 gain nothing more).
FILTER_INPUTS = 32
# Below a 20th of an 8-bit step in [-1, 1], squared: nothing is left to gain.
_LEAST_ERROR = 1e-7


# --- pure functions ---------------------------------------------------------------------------------------------------


def pooling_matrix(grid_size: int) -> torch.Tensor:
    """Averages that make the 1D queries of a block from its grid, (2 G^2, G^2), rows coarse to fine.

    Groups of 1, 1, 2, 4, .. G^2 rows; group g averages the grid in 2^ceil(l/2) columns x 2^floor(l/2) rows with
    l = max(g - 1, 0), in raster order (GigaTok's multi-level queries). Its first k rows serve length k.
    """
    cells = torch.eye(grid_size**2).view(grid_size**2, 1, grid_size, grid_size)
    groups = [F.adaptive_avg_pool2d(cells, 1)]
    for level in range(2 * int(math.log2(grid_size)) + 1):
        groups.append(F.adaptive_avg_pool2d(cells, (2 ** (level // 2), 2 ** ((level + 1) // 2))))
    return torch.cat([group.flatten(1) for group in groups], dim=1).T.contiguous()


def interlaced_places(grid_size: int, block: int) -> torch.Tensor:
    """The cell at which each 1D query of a block is placed when queries take turns, (2 G^2,) indices into G^2 cells.

    It is one of the cells that the query pools. Levels of pooling and blocks differ in where inside: bit k of the row
    and of the column, from a region's corner, is taken from a fixed round of the four corners of a square, at
    `block + level + k`. So the queries of a block, and those of four consecutive blocks, spread over all cells.
    """
    corners = torch.tensor([(0, 0), (1, 1), (0, 1), (1, 0)])  # row, column
    regions = (pooling_matrix(grid_size) > 0).view(-1, grid_size, grid_size)
    bits = torch.arange(int(math.log2(grid_size)))
    level = torch.arange(len(regions)).clamp_min(1).log2().floor().long() + (torch.arange(len(regions)) > 0)
    turns = corners[(block + level[:, None] + bits) % 4]  # (2 G^2, bits, 2)
    places = []
    for axis, other in ((0, 2), (1, 1)):
        present = regions.any(other)  # (2 G^2, G)
        first, extent = present.int().argmax(1), present.sum(1)
        chosen = turns[..., axis] * (2**bits < extent[:, None])
        places.append(first + (chosen * 2**bits).sum(1))
    return places[0] * grid_size + places[1]


def _angular_frequencies(length: int, channels: int) -> torch.Tensor:
    """Of the sine-cosine positions along an axis, radians a cell, (channels / 2,)."""
    return math.pi / (2.0 * length) ** torch.linspace(0, 1, channels // 2)


def sincos_positions(
    num_blocks: int, grid_size: int, dim: int, rows: int | None = None, columns: int | None = None
) -> torch.Tensor:
    """Fixed positions of the 3D grid, (T, G^2, dim): a quarter of the channels for time, the rest for rows and columns.

    Wavelengths are geometric from 2 cells to 4 times the axis, since the axes are short (our choice). With `rows` and
    `columns` those of the centres of so many parts of the frame, in the same coordinates, (T, rows * columns, dim).
    """

    def axis(places: torch.Tensor, length: int, channels: int) -> torch.Tensor:
        angle = places[:, None] * _angular_frequencies(length, channels)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (places, channels)

    def centres(parts: int) -> torch.Tensor:
        return (torch.arange(parts) + 0.5) * grid_size / parts - 0.5

    t, r, c = num_blocks, rows or grid_size, columns or grid_size
    time = axis(torch.arange(t), t, dim // 4)
    down, across = (axis(centres(parts), grid_size, 3 * dim // 8) for parts in (r, c))
    parts = [
        time[:, None, None].expand(t, r, c, -1),
        down[None, :, None].expand(t, r, c, -1),
        across[None, None, :].expand(t, r, c, -1),
    ]
    return torch.cat(parts, dim=-1).flatten(1, 2)


def position_shift(num_blocks: int, grid_size: int, dim: int, offset: tuple[float, float, float]) -> torch.Tensor:
    """The linear map that moves positions of `sincos_positions` by `offset` (blocks, rows, columns), (dim, dim).

    It holds for averages of positions too, those of pooled queries.
    """
    turns = []
    for length, channels, delta in zip(
        (num_blocks, grid_size, grid_size), (dim // 4, 3 * dim // 8, 3 * dim // 8), offset, strict=True
    ):
        angle = delta * _angular_frequencies(length, channels)
        cos, sin = angle.cos().diag(), angle.sin().diag()
        turns.append(torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)]))
    return torch.block_diag(*turns)


def cosine_transform(*sizes: int) -> torch.Tensor:
    """Orthonormal cosine transform (DCT-II) over all axes of flattened arrays of `sizes`, (P, P); rows: frequencies."""
    transform = torch.ones(1, 1)
    for size in sizes:
        frequency, place = torch.arange(size)[:, None], torch.arange(size)[None]
        axis = (math.pi * (2 * place + 1) * frequency / (2 * size)).cos() * (2 / size) ** 0.5
        axis[0] /= 2**0.5
        transform = torch.kron(transform, axis)
    return transform


def patch_spectrum(channels: int, frames: int, patch_size: int) -> torch.Tensor:
    """Typical amplitude of each row of `cosine_transform(channels, frames, patch_size, patch_size)`, (P,), largest 1.

    (1 + f)^-2 where f is in half cycles over 8 pixels or frames, and a colour difference counts as one more half cycle:
    a rough fit to ordinary video (our choice).
    """
    axes = [torch.arange(channels), torch.arange(frames) * 8 / frames]
    axes += [torch.arange(patch_size) * 8 / patch_size] * 2
    grid = torch.stack(torch.meshgrid(*[axis.float() for axis in axes], indexing="ij"))
    return (1 + grid.square().sum(0).sqrt()).flatten() ** -2


def patch_analysis(patch_shape: tuple[int, int, int, int]) -> torch.Tensor:
    """The map of patches under `patch_basis` "cosine": their transform, scaled half-way to equal variances, (P, P).

    The total variance stays. All the way, the noise of fine detail would drown the rest.
    """
    return analysis_scale(patch_spectrum(*patch_shape[:3]))[:, None] * cosine_transform(*patch_shape)


def analysis_scale(spectrum: torch.Tensor) -> torch.Tensor:
    """The factors of the rows of `patch_analysis` for the amplitudes of `patch_spectrum`, (P,)."""
    return spectrum**-0.5 * (spectrum.square().sum() / spectrum.sum()) ** 0.5


def patchify(video: torch.Tensor, num_blocks: int, patch_size: int) -> torch.Tensor:
    """(B, F, C, H, W) -> (B, T, G^2, C * F/T * p * p)."""
    b, f, c, h, w = video.shape
    t, p = num_blocks, patch_size
    x = video.reshape(b, t, f // t, c, h // p, p, w // p, p)
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(b, t, (h // p) * (w // p), -1)


def unpatchify(
    patches: torch.Tensor, frames_per_block: int, patch_size: int, channels: int, rows: int | None = None
) -> torch.Tensor:
    """(B, T, G^2, C * F/T * p * p) -> (B, F, C, H, W); undoes `patchify`. `rows` of patches where not as many as
    columns."""
    b, t, cells, _ = patches.shape
    rows, p = rows or math.isqrt(cells), patch_size
    columns = cells // rows
    x = patches.reshape(b, t, rows, columns, channels, frames_per_block, p, p)
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(b, t * frames_per_block, channels, rows * p, columns * p)


def token_grid(length: int) -> tuple[int, int]:
    """Rows and columns of patches that so many tokens are under `token_patches`; columns are as many or twice."""
    power = length.bit_length() - 1
    return 2 ** (power // 2), 2 ** ((power + 1) // 2)


def token_places(config: EvatokConfig, length: int) -> slice:
    """The places of the tokens of a block with `length` tokens, among all that a block can have.

    Pooled tokens of a shorter block are the first of a longer one's; under `token_patches` each candidate has its own.
    """
    if not config.token_patches:
        return slice(0, length)
    start = sum(other for other in config.block_lengths if other < length)
    return slice(start, start + length)


def resizing_matrix(source: int, target: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Bilinear interpolation of an axis, without aliasing where it shrinks, (target, source)."""
    centres = (torch.arange(target, device=device)[:, None] + 0.5) * (source / target) - 0.5
    away = (torch.arange(source, device=device) - centres).abs()
    weights = (1 - away / max(1.0, source / target)).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Frames (.., H, W) in another size; as products of matrices, whose gradients are quicker than interpolation's."""
    rows, columns = (
        resizing_matrix(source, target, frames.device).to(frames.dtype)
        for source, target in zip(frames.shape[-2:], (height, width), strict=True)
    )
    return rows @ frames @ columns.T


def frames_to_token_patches(frames: torch.Tensor, length: int, patch_size: int) -> torch.Tensor:
    """The patches of a block's frames (n, f, C, H, W), resized so that there are `length` of them: (n, length, P)."""
    rows, columns = token_grid(length)
    return patchify(resize(frames, rows * patch_size, columns * patch_size), 1, patch_size)[:, 0]


def token_patches_to_frames(patches: torch.Tensor, patch_size: int, channels: int, size: int) -> torch.Tensor:
    """(n, length, P) -> frames (n, f, C, size, size); the way back of `frames_to_token_patches`."""
    depth = patches.shape[-1] // (channels * patch_size**2)
    small = unpatchify(patches[:, None], depth, patch_size, channels, token_grid(patches.shape[1])[0])
    return resize(small, size, size)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The readable reference: softmax(q k^T / sqrt(d)) v with a boolean mask. (B, heads, N, d) -> (B, N, heads, d)."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# --- where tokens lie, and what sees what -----------------------------------------------------------------------------


# Clips of a batch have tokens of different numbers. `PaddedLayout` gives each clip a row, blocks padded to the longest
# clip's: simple, and the reference. `PackedLayout` has one row with the tokens of all clips one after another, so that
# linear layers compute no padding, and attention is a call for each clip and block (on accelerators, one for those of
# equal sizes), or one call of flex attention under a block mask. All give the same to rounding; what is masked is in no
# case attended to.

# query, key, value (B, heads, Q or K, d) and a mask or None -> (B, Q, heads, d)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, object], torch.Tensor]


# Which keys the queries of a call see: `attend` takes queries, keys and values (rows, heads, Q or K, d), rows each as
# their layout has them, and gives (rows, Q, heads, d).
Blocks: TypeAlias = "CausalBlocks | PackedBlocks | FlexBlocks"


@dataclass
class CausalBlocks:
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
class PackedBlocks:
    """Clips of different lengths one after another: a call for each clip and block.

    Attributes:
        queries: (B, T) how many queries each block of each clip has.
        keys: (B, T) how many keys.
        together: make one call of those of equal sizes. It copies keys, for which a CPU takes longer than for calls.
    """

    queries: list[list[int]]
    keys: list[list[int]]
    together: bool

    def __post_init__(self):
        self._calls: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # sizes of a call, .. -> clips and blocks
        for clip, (queries, keys) in enumerate(zip(self.queries, self.keys, strict=True)):
            for block, sizes in enumerate(zip(queries, accumulate(keys), strict=True)):
                call = sizes if self.together else (*sizes, clip, block)
                self._calls.setdefault(call, []).append((clip, block))

    @torch.compiler.disable
    def attend(self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Splits rather than slices of the whole, whose gradients would each be as large as the whole.
        own = [clip.split(sizes, dim=1) for clip, sizes in zip(_clips(q, self.queries), self.queries, strict=True)]
        # Contiguous, as attention reads them fastest: once rather than for each block.
        keys, values = ([clip.contiguous() for clip in _clips(x, self.keys)] for x in (k, v))  # B of (heads, K, d)
        outputs: dict[tuple[int, int], torch.Tensor] = {}
        for (_, seen, *_), places in self._calls.items():
            out = attend(
                _stack([own[clip][block] for clip, block in places]),
                _stack([keys[clip][:, :seen] for clip, _ in places]),
                _stack([values[clip][:, :seen] for clip, _ in places]),
                None,
            )  # (calls, Q, heads, d)
            outputs.update(zip(places, out.unbind(0), strict=True))
        return torch.cat([outputs[place] for place in sorted(outputs)]).unflatten(0, (len(q), -1))


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """`torch.stack`, without a copy where there is one, as in most calls of a mixed batch."""
    return torch.stack(parts) if len(parts) > 1 else parts[0][None]


def _clips(x: torch.Tensor, sizes: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """(B, heads, N, d), or (1, heads, N, d) with all clips one after another -> B of (heads, N of the clip, d)."""
    return x.unbind(0) if len(x) == len(sizes) else x[0].split([sum(clip) for clip in sizes], dim=1)


class FlexBlocks:
    """Clips one after another in one call of flex attention, which skips tiles of 128 x 128 that are masked."""

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor, device: torch.device):
        """queries, keys: (B, T), on the CPU, how many each block of each clip has; device: where attention is."""
        from torch.nn.attention.flex_attention import create_block_mask

        query_clip, query_block, key_clip, key_block = (
            x.to(device, non_blocking=True) for x in (*_owners(queries), *_owners(keys))
        )

        def sees(batch, head, query, key):
            return (query_clip[query] == key_clip[key]) & (key_block[key] <= query_block[query])

        # Compiled, the mask of all pairs does not have to be in memory at once; that needs a GPU's compiler to pay.
        compiled = torch.device(device).type == "cuda"
        self.mask = create_block_mask(sees, None, None, len(query_clip), len(key_clip), device, _compile=compiled)

    def attend(self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = len(q)
        q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))  # (1, heads, all Q or K, d)
        return attend(q, k, v, self.mask).unflatten(1, (rows, -1))[0]


def _owners(sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) -> clip and block of each of the places that they have one after another."""
    owner = torch.arange(sizes.numel()).repeat_interleave(sizes.flatten())
    return owner // sizes.shape[1], owner % sizes.shape[1]


class TokenLayout:
    """The places of the 1D tokens of a batch.

    It is worked out on the CPU, from lengths that are there, so that no accelerator is waited for; its tables are where
    the model is.

    Attributes:
        lengths: (B, T) tokens of each block, on the CPU.
        device: of all other tensors.
        sizes: (T,), or (B, T) where clips differ, how many places each block has, on the CPU.
        clip: (N,) clip of each place, or all clips where each has a row.
        block: (N,) temporal block of each place of a row.
        slot: (N,) its index inside the block.
        length: (N,), or (rows, N) where rows differ, the tokens of its block.
    """

    sizes: torch.Tensor
    clip: torch.Tensor | slice
    block: torch.Tensor
    slot: torch.Tensor
    length: torch.Tensor

    def __init__(self, lengths: torch.Tensor, device: torch.device | str = "cpu"):
        self.lengths, self.device = lengths.cpu(), device

    @staticmethod
    def choose(lengths: torch.Tensor, implementation: str, device: torch.device | str = "cpu") -> TokenLayout:
        """The layout for (B, T) lengths and an attention implementation: eager is the reference, padded."""
        if implementation == "flex_attention":
            return PackedLayout(lengths, device, flex=True)
        # Equal lengths need no padding, and rows of their own no copies.
        if implementation == "eager" or (lengths == lengths[:1]).all():
            return PaddedLayout(lengths, device)
        return PackedLayout(lengths, device)

    def _place(self, **tables: torch.Tensor) -> None:
        """Keeps tables, on the device."""
        for name, table in tables.items():
            setattr(self, name, table.to(self.device, non_blocking=True))

    def by_length(self) -> list[list[tuple[int, torch.Tensor]]]:
        """For each block the lengths that it has, with the clips in which it has them, on the device."""
        return [
            [
                (length, (lengths == length).nonzero()[:, 0].to(self.device, non_blocking=True))
                for length in lengths.unique().tolist()
            ]
            for lengths in self.lengths.T
        ]

    def parts(self) -> list[tuple[slice, slice, TokenLayout]]:
        """Clips, their tokens and their layout, for every part of the batch that is better worked on by itself."""
        return [(slice(None), slice(None), self)]

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """(B, T, M, ..) of all slots that a block can have -> (rows, N, ..)."""
        return slots[self.clip, self.block, self.slot].view(-1, len(self.block), *slots.shape[3:])

    def scatter(self, x: torch.Tensor, slots: int) -> torch.Tensor:
        """(rows, N, D), 0 in padding -> (B, T, slots, D), with 0 where a block has no token; undoes `gather`."""
        spread = x.new_zeros(*self.lengths.shape, slots, x.shape[-1])
        spread[self.clip, self.block, self.slot] = x
        return spread

    def over_tokens(self) -> Blocks:
        """Tokens see tokens."""
        return self._blocks(self.sizes, self.sizes)

    def over_cells(self, cells: int) -> Blocks:
        """Tokens see the `cells` of each block."""
        return self._blocks(self.sizes, torch.full_like(self.sizes, cells))

    def from_cells(self, cells: int) -> Blocks:
        """Cells see tokens."""
        return self._blocks(torch.full_like(self.sizes, cells), self.sizes)


class PaddedLayout(TokenLayout):
    """A row for each clip; a block takes as many places as its longest clip needs.

    Attributes:
        starts: (T,) the first place of each block.
        places: (tokens,) which of the B * N places are no padding.
        valid: (B, N) False for padding, or None where there is none.
    """

    clip = slice(None)

    def __init__(self, lengths: torch.Tensor, device: torch.device | str = "cpu"):
        super().__init__(lengths, device)
        self.sizes = self.lengths.amax(0)
        starts = self.sizes.cumsum(0) - self.sizes
        block = torch.arange(len(starts)).repeat_interleave(self.sizes)
        slot = torch.arange(len(block)) - starts[block]
        valid = slot < self.lengths[:, block]
        length = self.lengths[:, block] if (self.lengths != self.lengths[:1]).any() else self.lengths[0, block]
        self._place(block=block, slot=slot, length=length, starts=starts, places=valid.flatten().nonzero()[:, 0])
        self.valid = None if valid.all() else valid.to(self.device, non_blocking=True)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, N, D) -> (tokens of all clips, D), clip after clip, block after block."""
        return x.flatten(0, 1)[self.places]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """Undoes `pack`, with 0 in padding."""
        rows, width = len(self.lengths), x.shape[-1]
        padded = x.new_zeros(rows * len(self.block), width).index_copy(0, self.places, x)
        return padded.unflatten(0, (rows, -1))

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, N, D) -> (B, T, D): the first token of each block."""
        return x[:, self.starts]

    def _blocks(self, queries: torch.Tensor, keys: torch.Tensor) -> Blocks:
        padded = self.valid is not None and keys is self.sizes
        return CausalBlocks(queries.tolist(), keys.tolist(), self.valid[:, None, None] if padded else None)


class PackedLayout(TokenLayout):
    """One row with the tokens of all clips, as `VideoTokens` has them. Its methods are those of `PaddedLayout`.

    Attributes:
        flex: whether attention is one call of flex attention.
        starts: (B, T) place of each block's first token.
    """

    def __init__(self, lengths: torch.Tensor, device: torch.device | str = "cpu", flex: bool = False):
        super().__init__(lengths, device)
        self.flex, self.sizes = flex, self.lengths
        flat = self.lengths.flatten()
        clip, block = _owners(self.lengths)
        starts = (flat.cumsum(0) - flat).view_as(self.lengths)
        slot, length = torch.arange(len(clip)) - starts[clip, block], self.lengths[clip, block]
        self._place(clip=clip, block=block, starts=starts, slot=slot, length=length)

    def parts(self) -> list[tuple[slice, slice, TokenLayout]]:
        if self.flex or torch.device(self.device).type != "cpu":
            return super().parts()
        tokens = [0, *self.lengths.sum(-1).cumsum(0).tolist()]  # before each clip
        found, first = [], 0
        for clip in range(1, len(tokens)):
            if clip == len(self.lengths) or tokens[clip + 1] - tokens[first] > _TOKENS_TOGETHER:
                places = slice(tokens[first], tokens[clip])
                found.append((slice(first, clip), places, PackedLayout(self.lengths[first:clip])))
                first = clip
        return found

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return x[0]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        return x[None]

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return x[0, self.starts]

    def _blocks(self, queries: torch.Tensor, keys: torch.Tensor) -> Blocks:
        if self.flex:
            return FlexBlocks(queries, keys, self.device)
        return PackedBlocks(queries.tolist(), keys.tolist(), torch.device(self.device).type != "cpu")


# --- attention and layers ---------------------------------------------------------------------------------------------


@dataclass
class LayerCache:
    """Keys and values of the temporal blocks that a layer has already seen, each (B, heads, tokens, head dim)."""

    attention: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def extend(self, name: str, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if name in self.attention:
            past_key, past_value = self.attention[name]
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self.attention[name] = (key, value)
        return key, value

    def branch(self) -> LayerCache:
        """A cache that goes on from here without changing this one."""
        return LayerCache(dict(self.attention))


class EvatokAttention(nn.Module):
    """Multi-head attention; keys carry positions, values do not. `name` is its slot in a `LayerCache`."""

    def __init__(self, config: EvatokConfig, dim: int, num_heads: int, name: str):
        super().__init__()
        self.config = config
        self.name = name
        self.head_dim = dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: Blocks | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """query (B, Q, D); key, value (B, K, D), all of which every query sees unless `blocks` says less -> (B, Q, D).

        With `blocks`, the rows of queries and keys are those of its layout.
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, Q or K, d)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if cache is not None:
            k, v = cache.extend(self.name, k, v)
        out = self._attend(q, k, v, None) if blocks is None else blocks.attend(self._attend, q, k, v)
        return self.o_proj(out.flatten(2))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object) -> torch.Tensor:
        """(B, heads, Q or K, d), mask None, (B, 1, 1, K) or flex attention's block mask -> (B, Q, heads, d)."""
        implementation = self.config._attn_implementation
        if implementation == "flex_attention":
            if mask is None or isinstance(mask, torch.Tensor):
                implementation = "sdpa"  # a call without a block mask has nothing that flex attention could skip
            elif q.device.type == "cpu":
                # Uncompiled, so slow and without gradients: torch 2.13 cannot compile it there for lengths that change.
                return flex_attention(q, k, v, block_mask=mask, scale=self.scaling).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attend(self, q, k, v, mask, scaling=self.scaling, dropout=0.0)[0]


class EvatokLayer(GradientCheckpointingLayer):
    """A pre-norm Q-Former layer: self-attention over queries, cross-attention to a memory that stays as it is, FFN."""

    def __init__(self, config: EvatokConfig, dim: int, num_heads: int):
        super().__init__()
        self.self_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.self_attention = EvatokAttention(config, dim, num_heads, "self")
        self.cross_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.cross_attention = EvatokAttention(config, dim, num_heads, "cross")
        self.mlp_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.mlp_ratio * dim), nn.GELU(), nn.Linear(config.mlp_ratio * dim, dim)
        )
        # The other branches start small, so that they do not drown what cross-attention brings.
        self.self_attention.o_proj.init_scale = self.mlp[2].init_scale = 0.2

    def forward(
        self,
        x: torch.Tensor,
        position: torch.Tensor,
        memory: torch.Tensor,
        memory_position: torch.Tensor,
        self_blocks: Blocks | None = None,
        cross_blocks: Blocks | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """x (rows, Q, D), memory (rows, K, D) and their positions, broadcast over rows -> (rows, Q, D)."""
        h = self.self_norm(x)
        placed = h + position
        x = x + self.self_attention(placed, placed, h, self_blocks, cache)
        h = self.cross_norm(x)
        x = x + self.cross_attention(h + position, memory + memory_position, memory, cross_blocks, cache)
        return x + self.mlp(self.mlp_norm(x))


class PatchTransform(nn.Module):
    """The cosine transform of patches with its rows scaled (`patch_basis` "cosine"), and a scaled inverse of it.

    In two products, of channels and frames and of the area, which take a tenth of the operations of the one large one.
    """

    def __init__(self, patch_shape: tuple[int, int, int, int]):
        super().__init__()
        self.patch_shape = patch_shape
        channels, frames, rows, columns = patch_shape
        depth, area = channels * frames, rows * columns
        self.register_buffer("depth", torch.empty(depth, depth), persistent=False)
        self.register_buffer("area", torch.empty(area, area), persistent=False)
        self.register_buffer("inward", torch.empty(depth * area), persistent=False)
        self.register_buffer("outward", torch.empty(depth * area), persistent=False)

    def reset_tables(self) -> None:
        """Fills what no checkpoint holds."""
        init.copy_(self.depth, cosine_transform(*self.patch_shape[:2]))
        init.copy_(self.area, cosine_transform(*self.patch_shape[2:]))
        spectrum = patch_spectrum(*self.patch_shape[:3])
        init.copy_(self.inward, analysis_scale(spectrum))
        init.copy_(self.outward, spectrum / spectrum.square().mean() ** 0.5)

    def analysis(self, patches: torch.Tensor) -> torch.Tensor:
        """Pixels (.., P) -> scaled frequencies (.., P)."""
        x = self.depth @ patches.unflatten(-1, (len(self.depth), len(self.area)))
        return F.linear(x, self.area).flatten(-2) * self.inward

    def synthesis(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Frequencies of a decoder (.., P), not yet scaled as in video, to pixels (.., P)."""
        x = (frequencies * self.outward).unflatten(-1, (len(self.depth), len(self.area)))
        return (self.depth.T @ x @ self.area).flatten(-2)

    def synthesis_matrix(self) -> torch.Tensor:
        """(P, P): `synthesis` as one product."""
        return torch.kron(self.depth, self.area).T * self.outward


class EvatokPositions(nn.Module):
    """Positions of the 3D cells and of the 1D tokens for one of the two transformers (see `position_embedding`)."""

    def __init__(self, config: EvatokConfig, dim: int):
        super().__init__()
        self.config = config
        self.dim = dim
        t, cells, longest = config.num_blocks, config.embeddings_per_block, max(config.block_lengths)
        if config.position_embedding == "learned":
            self.cell_table = nn.Parameter(torch.empty(t, cells, dim))
            self.token_table = nn.Parameter(torch.empty(t, longest, dim))
        else:
            places = sum(config.block_lengths) if config.token_patches else longest
            kinds = len(config.block_lengths) if config.token_patches else longest
            self.index_embedding = nn.Parameter(torch.empty(kinds, dim))
            self.register_buffer("cell_table", torch.empty(t, cells, dim), persistent=False)
            self.register_buffer("pooled_table", torch.empty(t, places, dim), persistent=False)
            if config.token_patches:
                self.register_buffer("first_place", torch.empty(longest + 1, dtype=torch.int64), persistent=False)
                self.register_buffer("kind", torch.empty(places, dtype=torch.int64), persistent=False)

    def reset_tables(self) -> None:
        """Fills what no checkpoint holds."""
        if self.config.position_embedding == "pooled":
            cells = sincos_positions(self.config.num_blocks, self.config.grid_size, self.dim)
            cells = self.config.position_scale * cells
            grid, longest = self.config.grid_size, max(self.config.block_lengths)
            if self.config.token_patches:
                t, lengths = self.config.num_blocks, self.config.block_lengths
                parts = [sincos_positions(t, grid, self.dim, *token_grid(length)) for length in lengths]
                pooled = self.config.position_scale * torch.cat(parts, dim=1)
                first = torch.zeros(longest + 1, dtype=torch.int64)
                first[lengths] = torch.tensor([token_places(self.config, length).start for length in lengths])
                init.copy_(self.first_place, first)
                init.copy_(self.kind, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))
            elif self.config.interlaced_positions:
                places = torch.stack([interlaced_places(grid, t)[:longest] for t in range(self.config.num_blocks)])
                pooled = cells.gather(1, places[..., None].expand(-1, -1, self.dim))
            else:
                pooled = pooling_matrix(grid)[:longest] @ cells
            init.copy_(self.cell_table, cells)
            init.copy_(self.pooled_table, pooled)

    def cells(self) -> torch.Tensor:
        """(T, G^2, D)."""
        return self.cell_table

    def tokens(self) -> torch.Tensor:
        """Of all tokens that a block can have, (T, M, D); see `token_places`."""
        if self.config.position_embedding == "learned":
            return self.token_table
        return self.pooled_table + (
            self.index_embedding[self.kind] if self.config.token_patches else self.index_embedding
        )

    def block(self, t: int, length: int) -> torch.Tensor:
        """Of the tokens of block t, (length, D)."""
        return self.tokens()[t, token_places(self.config, length)]

    def of(self, layout: TokenLayout) -> torch.Tensor:
        """Of a layout's tokens, (N, D), or (rows, N, D) where rows differ."""
        place = layout.slot
        if self.config.token_patches:
            place = self.first_place[layout.length] + torch.minimum(layout.slot, layout.length - 1)
        return self.tokens()[layout.block, place]


# --- encoder and decoder ----------------------------------------------------------------------------------------------


class EvatokEncoder(nn.Module):
    """Patches -> features of the 1D tokens, before quantisation."""

    def __init__(self, config: EvatokConfig):
        super().__init__()
        self.config = config
        dim = config.encoder_hidden_size
        patch_dim = config.num_channels * config.frames_per_block * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_dim, config.embed_dim)
        self.patch_norm = (
            nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps) if config.patch_norm else nn.Identity()
        )
        self.memory_projection = nn.Linear(config.embed_dim, dim)
        self.query_projection = nn.Linear(dim, dim)
        self.positions = EvatokPositions(config, dim)
        self.layers = nn.ModuleList(
            EvatokLayer(config, dim, config.encoder_num_heads) for _ in range(config.encoder_num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.out_projection = nn.Linear(dim, config.embed_dim)
        self.to_codebook = nn.Linear(config.embed_dim, config.codebook_dim)
        self.to_codebook.init_bias = 1.0  # away from the origin, normalising a feature keeps its magnitude as an angle
        pooling = torch.empty(max(config.block_lengths), config.embeddings_per_block)
        self.register_buffer("pooling", pooling, persistent=False)
        if config.patch_basis == "cosine":
            self.transform = PatchTransform(config.patch_shape)

    def reset_tables(self) -> None:
        """Fills what no checkpoint holds."""
        init.copy_(self.pooling, pooling_matrix(self.config.grid_size)[: max(self.config.block_lengths)])

    def memory(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) -> (B, T', G^2, D); T' blocks, as many as the frames fill."""
        num_blocks = video.shape[1] // self.config.frames_per_block
        return self._embed(patchify(video, num_blocks, self.config.patch_size))

    def _embed(self, patches: torch.Tensor) -> torch.Tensor:
        """(.., P) -> (.., D)."""
        if self.config.patch_basis == "cosine":
            patches = self.transform.analysis(patches)
        return self.memory_projection(self.patch_norm(self.patch_embedding(patches)))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(.., D) -> (.., codebook dim)."""
        return self.to_codebook(self.out_projection(self.norm(x)))

    def forward(self, video: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """The path of a whole batch: (rows, N, codebook dim), meaningless where padded."""
        memory = self.memory(video)  # (B, T, G^2, D)
        position = self.positions.of(layout)
        queries = self.query_projection(layout.gather(self.pooling[: int(layout.lengths.max())] @ memory))
        x = queries + position  # (rows, N, D)
        self_blocks, cross_blocks = layout.over_tokens(), layout.over_cells(memory.shape[2])
        cells = self.positions.cells().flatten(0, 1)
        memory = memory.flatten(1, 2)
        for layer in self.layers:
            x = layer(x, position, memory, cells, self_blocks, cross_blocks)
        return self.head(x)

    def block(self, video: torch.Tensor, t: int, length: int, caches: list[LayerCache]) -> torch.Tensor:
        """The cached path: frames (B, F/T, C, H, W) of block t after blocks < t -> (B, length, codebook dim)."""
        memory = self.memory(video)[:, 0]  # (B, G^2, D)
        position, cells = self.positions.block(t, length), self.positions.cells()[t]
        x = self.query_projection(self.pooling[:length] @ memory) + position
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, position, memory, cells, cache=cache)
        return self.head(x)


class EvatokDecoder(nn.Module):
    """Codes of the 1D tokens -> patches."""

    def __init__(self, config: EvatokConfig):
        super().__init__()
        self.config = config
        dim = config.decoder_hidden_size
        patch_dim = config.num_channels * config.frames_per_block * config.patch_size**2
        self.from_codebook = nn.Linear(config.codebook_dim, config.embed_dim)
        self.from_codebook.init_scale = config.codebook_dim**0.5  # codes have norm 1, features should have variance 1
        self.memory_projection = nn.Linear(config.embed_dim, dim)
        self.positions = EvatokPositions(config, dim)
        self.layers = nn.ModuleList(
            EvatokLayer(config, dim, config.decoder_num_heads) for _ in range(config.decoder_num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.out_projection = nn.Linear(dim, config.embed_dim)
        self.to_patch = nn.Linear(config.embed_dim, patch_dim)
        self.to_patch.init_scale = 0.1  # start from grey rather than from noise
        if config.token_patches:
            self.draft_embedding = nn.Linear(patch_dim, dim)
            self.to_patch.init_scale = _START
        if config.patch_basis == "cosine":
            self.transform = PatchTransform(config.patch_shape)

    def memory(self, codes: torch.Tensor) -> torch.Tensor:
        """(.., codebook dim) -> (.., D)."""
        return self.memory_projection(self.from_codebook(codes))

    def head(self, x: torch.Tensor, draft: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, G^2, D), and the frames that it is added to, -> frames (B, T * F/T, C, H, W)."""
        patches = self.to_patch(self.out_projection(self.norm(x)))
        if self.config.patch_basis == "cosine":
            patches = self.transform.synthesis(patches)
        frames = unpatchify(patches, self.config.frames_per_block, self.config.patch_size, self.config.num_channels)
        return frames if draft is None else torch.add(draft, frames, alpha=ADDED)

    def draft_queries(self, frames: torch.Tensor) -> torch.Tensor:
        """The 3D queries of drafts (n, F / T, C, H, W), (n, G^2, D)."""
        patches = patchify(frames, 1, self.config.patch_size)[:, 0]
        if self.config.patch_basis == "cosine":
            patches = self.transform.analysis(patches)
        return self.draft_embedding(patches)

    def forward(
        self, codes: torch.Tensor, layout: TokenLayout, draft: torch.Tensor | None = None, with_hidden: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """The path of a batch.

        Args:
            codes: (rows, N, codebook dim).
            layout: of the tokens.
            draft: under `token_patches` what the linear codec says, (B, F, C, H, W).
            with_hidden: give the hidden states too.

        Returns:
            (B, F, C, H, W), and the hidden states by layer, (B, T, G^2, D).
        """
        t, cells = self.config.num_blocks, self.config.embeddings_per_block
        memory = self.memory(codes)  # (rows, N, D)
        memory_position = self.positions.of(layout)
        if draft is None:
            queries = layout.first(memory)[:, :, None]  # all of a block start alike
        else:
            blocks = draft.unflatten(1, (t, -1)).flatten(0, 1)
            queries = self.draft_queries(blocks).unflatten(0, (-1, t))
        position = self.positions.cells()  # (T, G^2, D)
        x, position = (queries + position).flatten(1, 2), position.flatten(0, 1)  # (B, T * G^2, D)
        self_blocks, cross_blocks = CausalBlocks([cells] * t, [cells] * t), layout.from_cells(cells)
        hidden = [x]
        for layer in self.layers:
            x = layer(x, position, memory, memory_position, self_blocks, cross_blocks)
            hidden.append(x)
            hidden = hidden if with_hidden else []
        return self.head(x.unflatten(1, (t, cells)), draft), *(h.unflatten(1, (t, cells)) for h in hidden)

    def block(
        self, codes: torch.Tensor, t: int, caches: list[LayerCache], draft: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The cached path: codes (B, length, codebook dim) of block t after blocks < t -> (B, F/T, C, H, W)."""
        memory = self.memory(codes)  # (B, length, D)
        position, memory_position = self.positions.cells()[t], self.positions.block(t, codes.shape[1])
        queries = memory[:, :1] if draft is None else self.draft_queries(draft)
        x = queries + position  # (B, G^2, D)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, position, memory, memory_position, cache=cache)
        return self.head(x[:, None], draft)


# --- quantiser --------------------------------------------------------------------------------------------------------


@dataclass
class Quantized:
    """Outcome of quantising N vectors; the losses are None where they were not asked for.

    Attributes:
        codes: (N, D) fp32 unit vectors for the decoder, with straight-through gradient to the encoder.
        ids: (N,) int64.
        codebook_loss: mean squared distance that pulls codes to features.
        commitment_loss: the same distance, pulling features to codes.
        entropy_loss: mean entropy of the soft assignments minus the entropy of their mean, nats.
    """

    codes: torch.Tensor
    ids: torch.Tensor
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None


def _sum_over_processes(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The sum of `x` over all processes that train together, and how many these are.

    Its gradient is that of the processes' number times the own summand: after the mean of gradients over processes,
    which data-parallel training takes, it is the gradient of the sum.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x, 1
    processes = torch.distributed.get_world_size()
    total = x.detach().clone()
    torch.distributed.all_reduce(total)
    return processes * x + (total - processes * x.detach()), processes


@torch.no_grad()
def nearest_codes(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code within rounding, the first of equals; for unit vectors that is the largest cosine.

    (N, D), (K, D) -> (N,) int64. The largest of each group of codes is found first, which CPUs do several times faster
    than they find where it is.
    """
    rows_at_once, codes_at_once = _ROWS_PER_CHUNK, len(codebook)
    if features.device.type == "cpu":
        many = len(features) >= _MANY_ROWS
        rows_at_once, codes_at_once = (4 * _MANY_ROWS, _SOME_CODES) if many else (_FEW_ROWS, len(codebook))
    group = math.gcd(len(codebook), _CODES_IN_GROUP)
    groups, found = codebook.unflatten(0, (-1, group)), []
    for rows in features.split(rows_at_once):
        largest = [(rows @ codes.T).unflatten(-1, (-1, group)).amax(-1) for codes in codebook.split(codes_at_once)]
        best = torch.cat(largest, dim=-1).argmax(-1)  # (n,)
        found.append(best * group + (groups[best] @ rows[..., None])[..., 0].argmax(-1))
    return torch.cat(found)


def spread(count: int, total: int) -> torch.Tensor:
    """`count` of the numbers 0..total - 1, without a period and the same every time, (count,) int64.

    Multiples of the golden ratio modulo 1: as even as random draws, but a resumed run needs no state for them.
    """
    return (torch.arange(count, dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1 * total).long()


def _entropy_sums(rows: torch.Tensor, codebook: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    # Squared distance of unit vectors is 2 - 2 cos; the constant drops out of the softmax.
    logits = 2.0 / temperature * (rows @ codebook.T)  # (n, K)
    log_p = logits.log_softmax(-1)
    p = logits.softmax(-1)  # not log_p.exp(), which is slow where it underflows
    return -(p * log_p).sum(), p.sum(0)


def codebook_entropy_loss(
    features: torch.Tensor, codebook: torch.Tensor, temperature: float, synchronize: bool = False
) -> torch.Tensor:
    """Mean of H(p_i) minus H(mean of p_i), p_i = softmax(-squared distance / temperature), fp32, any N.

    With `synchronize` the second mean is over the tokens of all processes; so is, on average over them, the first.
    """
    entropy, mass = features.new_zeros(()), features.new_zeros(codebook.shape[0])
    for rows in features.split(_ROWS_PER_CHUNK):
        row_entropy, row_mass = checkpoint(_entropy_sums, rows, codebook, temperature, use_reentrant=False)
        entropy, mass = entropy + row_entropy, mass + row_mass
    own = total = features.new_full((), features.shape[0])
    if synchronize:
        total, processes = _sum_over_processes(own)
        mass, own = _sum_over_processes(mass)[0], total / processes
    mean = mass / total
    return entropy / own + (mean * mean.clamp_min(1e-12).log()).sum()


class VectorQuantizer(nn.Module):
    """A codebook of `size` unit vectors of `dim` dimensions. All arithmetic is fp32 whatever the model's dtype.

    In training the entropy term is of `entropy_tokens` tokens spread over the batch, where there are more; 0: of all.
    """

    def __init__(self, size: int, dim: int, entropy_temperature: float, entropy_tokens: int = 0):
        super().__init__()
        self.entropy_temperature = entropy_temperature
        self.entropy_tokens = entropy_tokens
        self.weight = nn.Parameter(torch.empty(size, dim))

    def unit_codes(self) -> torch.Tensor:
        """(K, D) fp32, normalised."""
        return F.normalize(self.weight.float(), dim=-1)

    def to_ids(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D) features of any norm -> (N,) int64."""
        with torch.autocast(features.device.type, enabled=False):
            return nearest_codes(F.normalize(features.float(), dim=-1), self.unit_codes())

    def to_codes(self, ids: torch.Tensor) -> torch.Tensor:
        """(N,) -> (N, D) fp32 unit vectors."""
        return F.normalize(self.weight[ids].float(), dim=-1)

    def forward(self, features: torch.Tensor, return_loss: bool = True, ids: torch.Tensor | None = None) -> Quantized:
        """Quantises with gradients.

        In training by several processes the means of the losses are over the tokens of all of them: each process gets
        its share, such that their mean over processes is what one process with all the clips would have.

        Args:
            features: (N, D) of any norm.
            return_loss: compute the losses, too.
            ids: (N,) those of the features, where they are known.
        """
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize(features.float(), dim=-1)
            codebook = self.unit_codes()
            ids = nearest_codes(z.detach(), codebook.detach()) if ids is None else ids
            codes = codebook[ids]
            quantized = Quantized(z + (codes - z).detach(), ids)
            if not return_loss:
                return quantized
            synchronize = self.training and torch.is_grad_enabled()
            share = 1.0  # of this process's tokens, in those of a process on average
            if synchronize:
                total, processes = _sum_over_processes(z.new_full((), len(z)))
                share = len(z) * processes / total
            sample = z
            if self.training and 0 < self.entropy_tokens < len(z):
                sample = z[spread(self.entropy_tokens, len(z)).to(z.device, non_blocking=True)]
            quantized.codebook_loss = share * F.mse_loss(codes, z.detach())
            quantized.commitment_loss = share * F.mse_loss(z, codes.detach())
            quantized.entropy_loss = codebook_entropy_loss(sample, codebook, self.entropy_temperature, synchronize)
            return quantized


# --- linear codec -----------------------------------------------------------------------------------------------------


class LinearCodec(nn.Module):
    """Linear maps to codes, back and over seams, which encode under `token_patches`, and which the decoder adds to (our
    choice).

    A token codes its patch, or what the last frame before the block lacks of it: the residual, whichever comes nearer.
    Its code says which by the sign of its last dimension, negative for a residual. The last frame before is what the
    maps back make of the codes so far (grey before the first block), so that a decoder has it too. Thus a block of a
    still scene costs few tokens, and refines what came before.

    A filter in the loop, as video codecs have one, adds to each patch of a frame what it and its neighbours tell of the
    error; there is one for each candidate length, since seams differ.

    All arithmetic is fp32 whatever the model's dtype.
    """

    def __init__(self, config: EvatokConfig):
        super().__init__()
        self.config = config
        dim, patch_dim = config.codebook_dim, math.prod(config.patch_shape)
        self.patch_to_code = nn.Linear(patch_dim, dim)
        self.residual_to_code = nn.Linear(patch_dim, dim)
        self.code_to_patch = nn.Linear(dim, patch_dim)
        self.code_to_residual = nn.Linear(dim, patch_dim)
        self.patch_to_code.init_scale = self.residual_to_code.init_scale = patch_dim**0.5
        self.filter_inputs = nn.Linear(patch_dim, FILTER_INPUTS)
        self.filter_inputs.init_scale = patch_dim**-0.5
        # All filters are one parameter, so that each step has a gradient for it: data-parallel training asks for that.
        self.filters = nn.Conv2d(FILTER_INPUTS, len(config.block_lengths) * patch_dim, 3, padding=1)

    def reset(self) -> None:
        """Makes the maps to codes start so that a code says which of them it is from, and filters that do little."""
        init.normal_(self.filters.weight, std=_START)
        init.zeros_(self.filters.bias)
        for projection, sign in ((self.patch_to_code, 1.0), (self.residual_to_code, -1.0)):
            init.copy_(projection.bias, F.pad(torch.zeros(self.config.codebook_dim - 1), (0, 1), value=sign))

    def grey(self, clips: int) -> torch.Tensor:
        """The frames before the first blocks of clips, (clips, C, H, W)."""
        c, weight = self.config, self.code_to_patch.weight
        return weight.new_zeros(clips, c.num_channels, c.image_size, c.image_size, dtype=torch.float32)

    def cut(self, frames: torch.Tensor, length: int) -> torch.Tensor:
        """The patches of a block's frames (n, f, C, H, W), one for each of its tokens, (n, length, P)."""
        with torch.autocast(frames.device.type, enabled=False):
            return frames_to_token_patches(frames.float(), length, self.config.patch_size)

    def residuals(self, patches: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The patches (n, length, P) of a block less those of the frame before it, (n, C, H, W), held still."""
        c = self.config
        held = self.cut(before[:, None], patches.shape[1]).unflatten(-1, (c.num_channels, 1, -1))
        return patches - held.expand(-1, -1, -1, c.frames_per_block, -1).flatten(-3)

    def choose(
        self, patches: torch.Tensor, before: torch.Tensor, quantizer: VectorQuantizer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a block the features of its tokens, (n, length, codebook dim), and their ids (n, length).

        Args:
            patches: of the block, from `cut`, (n, length, P).
            before: the last frame of the block before, (n, C, H, W).
            quantizer: whose codes are used.
        """
        with torch.autocast(patches.device.type, enabled=False):
            values, inward, outward = zip(
                (patches, self.patch_to_code, self.code_to_patch),
                (self.residuals(patches, before), self.residual_to_code, self.code_to_residual),
                strict=True,
            )
            features = torch.stack([_in_fp32(m, v / v.shape[-1]) for m, v in zip(inward, values, strict=True)])
            with torch.no_grad():
                ids = quantizer.to_ids(features.flatten(0, 2)).view(features.shape[:3])  # (2, n, length)
                made = [_in_fp32(m, c) for m, c in zip(outward, quantizer.to_codes(ids), strict=True)]
                as_patch, as_residual = ((v - m).square().sum(-1) for v, m in zip(values, made, strict=True))
                is_residual = as_residual < as_patch
            return torch.where(is_residual[..., None], *features.flip(0)), torch.where(is_residual, *ids.flip(0))

    def decode(self, codes: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The frames (n, F / T, C, H, W) of a block that its codes (n, length, codebook dim) make after a frame."""
        with torch.autocast(codes.device.type, enabled=False):
            frames = self.unfiltered(codes.float(), before)
            return frames + self.corrections(frames, *self.filter_of(codes.shape[1]))

    @torch.no_grad()
    def last_frame(self, codes: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The last frame of `decode`, (n, C, H, W), without filtering those that nobody looks at."""
        with torch.autocast(codes.device.type, enabled=False):
            frames, c = self.unfiltered(codes.float(), before), self.config
            shape = c.num_channels, c.frames_per_block, c.patch_size**2
            last = [part.unflatten(0, shape)[:, -1].flatten(0, 1) for part in self.filter_of(codes.shape[1])]
            return frames[:, -1] + self.corrections(frames, *last)[:, -1]

    def filter_of(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (P, inputs, 3, 3) and bias (P,) of the filter for blocks of so many tokens."""
        number, count = self.config.block_lengths.index(length), len(self.config.block_lengths)
        return self.filters.weight.chunk(count)[number], self.filters.bias.chunk(count)[number]

    def corrections(self, frames: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """A filter's corrections to a block's frames (n, F / T, C, H, W), for those that it has outputs for."""
        c = self.config
        seams = self.seams(frames)
        # The convolutions of a GPU are not in fp32 by default, its products are.
        convolve = _convolve_by_product if seams.is_cuda else partial(F.conv2d, padding=1)
        patches = convolve(seams, weight.float(), bias.float()).flatten(2).mT[:, None]
        count = patches.shape[-1] // (c.num_channels * c.patch_size**2)
        return unpatchify(patches, count, c.patch_size, c.num_channels)

    def unfiltered(self, codes: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """`decode` before its filter; codes in fp32."""
        c, residual = self.config, codes[..., -1:] < 0
        patches = torch.where(residual, _in_fp32(self.code_to_residual, codes), _in_fp32(self.code_to_patch, codes))
        share = residual.float().expand(-1, -1, c.patch_size**2)
        frames = token_patches_to_frames(patches, c.patch_size, c.num_channels, c.image_size)
        return frames + token_patches_to_frames(share, c.patch_size, 1, c.image_size) * before[:, None]

    def seams(self, frames: torch.Tensor) -> torch.Tensor:
        """The inputs of the filters, of a block's frames (n, F / T, C, H, W): (n, inputs, G, G)."""
        cells = _in_fp32(self.filter_inputs, patchify(frames, 1, self.config.patch_size)[:, 0])
        return cells.mT.unflatten(-1, (self.config.grid_size, -1))

    def encode_clips(
        self, video: torch.Tensor, layout: TokenLayout, quantizer: VectorQuantizer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`choose` for the blocks of clips (B, F, C, H, W): features (rows, N, codebook dim) and ids (rows, N)."""
        blocks, last = video.unflatten(1, (layout.lengths.shape[1], -1)), self.grey(len(video))
        slots = *layout.lengths.shape, int(layout.lengths.max())
        features, ids = last.new_zeros(*slots, self.config.codebook_dim), last.new_zeros(slots, dtype=torch.int64)
        for t, lengths in enumerate(layout.by_length()):
            for length, clip in lengths:
                found = self.choose(self.cut(blocks[clip, t], length), last[clip], quantizer)
                features[clip, t, :length], ids[clip, t, :length] = found
                if t + 1 < blocks.shape[1]:
                    last[clip] = self.last_frame(quantizer.to_codes(found[1]), last[clip])
        return layout.gather(features), layout.gather(ids)

    def decode_clips(self, codes: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """`decode` of the blocks of clips, codes (rows, N, codebook dim), 0 in padding, to frames (B, F, C, H, W)."""
        slots, last, frames = layout.scatter(codes, int(layout.lengths.max())), self.grey(len(layout.lengths)), []
        for t, lengths in enumerate(layout.by_length()):
            block = last[:, None].repeat(1, self.config.frames_per_block, 1, 1, 1)
            for length, clip in lengths:
                block = block.index_put((clip,), self.decode(slots[clip, t, :length], last[clip]))
            frames.append(block)
            last = block[:, -1]
        return torch.cat(frames, 1)


def _convolve_by_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`F.conv2d` of (n, C, H, W) with (P, C, 3, 3) and padding 1 as one product, (n, P, H, W)."""
    around = F.unfold(x, 3, padding=1)  # (n, 9 C, H W)
    return F.linear(around.mT, weight.flatten(1), bias).mT.unflatten(-1, x.shape[-2:])


def _in_fp32(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear.weight.float(), linear.bias.float())


# --- refinement -------------------------------------------------------------------------------------------------------


# Better ids for the same tokens: searched for through the decoder, where the encoder only guesses in one pass. The
# features that the encoder made are the start of a gradient descent on the squared error of the decoded frames; codes
# take their place in the decoder and pass the gradient straight through, as in training. It goes block by block with
# the blocks before fixed, so that a refined block depends on no later frame, and the best ids on the way are kept.
# Nothing of the model changes, and who decodes needs to know nothing of it. The idea is that of semi-amortised
# inference (Kim et al., arXiv 1802.02550) and of content-adaptive compression (Campos et al., arXiv 1906.01223); the
# paper of this tokenizer has nothing like it.


def refined_ids(
    quantizer: VectorQuantizer,
    features: torch.Tensor,
    frames: torch.Tensor,
    decode: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """Ids whose decoded frames have at most the squared error of the encoder's ids, after so many steps of descent.

    Args:
        quantizer: the codebook.
        features: (n, d), the encoder's, of any norm.
        frames: what shall come out, (1, f, C, H, W) in [-1, 1].
        decode: codes (n, d) fp32 to frames (1, f, C, H, W), differentiable and without memory of earlier calls.
        steps: each a pass through the decoder forwards and backwards; one forwards more looks at the last ids.

    Returns:
        (n,) int64.
    """
    codebook = quantizer.unit_codes().detach()
    z = F.normalize(features.float(), dim=-1).requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=_LEARNING_RATE, betas=_BETAS)
    best, least = quantizer.to_ids(features), float("inf")
    for step in range(steps + 1):
        unit = F.normalize(z, dim=-1)
        ids = quantizer.to_ids(unit.detach()) if step else best
        decoded = decode(unit + (codebook[ids] - unit).detach()).float()
        error = (decoded.detach().clamp(-1, 1) - frames).square().mean().item()
        if error < least:
            best, least = ids, error
        if step < steps:
            loss = (decoded - frames).square().mean().clamp_min(_LEAST_ERROR).log()
            (z.grad,) = torch.autograd.grad(loss, [z])
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - (1 - _LAST_RATE) * step / steps)
            optimizer.step()
    return best


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass
class EvatokOutput(ModelOutput):
    """Output of `EvatokModel.forward`.

    Attributes:
        loss: L1 + codebook + weighted commitment + weighted entropy, the part of the paper's loss that needs no other
            network. It and its terms are there in training, and where they were asked for.
        reconstruction: (B, F, C, H, W), unclamped.
        reconstruction_loss: mean absolute error.
        codebook_loss, commitment_loss, entropy_loss: unweighted terms of the quantiser.
        ids: (N,) int64, packed clip after clip, block after block.
        lengths: (B, T) int64.
        decoder_hidden_states: with `output_hidden_states=True`, (B, T, G * G, D) before and after every decoder layer.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class ClipState:
    """The state of a clip that is encoded or decoded block by block.

    Attributes:
        caches: keys and values of the blocks so far, of each layer.
        last: under `token_patches`, the linear codec's last frame of these blocks, (1, C, H, W).
        block: number of the next block.
        decoding: while encoding with refinement, how far the refined blocks are decoded.
    """

    caches: list[LayerCache]
    last: torch.Tensor | None
    block: int = 0
    decoding: ClipState | None = None


class EvatokPreTrainedModel(EvatokBaseModel):
    config_class = EvatokConfig
    base_model_prefix = "evatok"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules = ["EvatokLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and self.config.initialization == "scaled":
            self._draw(module.weight, getattr(module, "init_scale", 1.0) * module.in_features**-0.5)
            init.normal_(module.bias, std=module.init_bias) if hasattr(module, "init_bias") else init.zeros_(
                module.bias
            )
        elif isinstance(module, VectorQuantizer):
            init.normal_(module.weight)
            init.copy_(module.weight, F.normalize(module.weight, dim=-1))
        elif isinstance(module, EvatokPositions):
            for table in module.parameters(recurse=False):
                init.normal_(table, std=module.dim**-0.5)
            module.reset_tables()
        elif isinstance(module, EvatokEncoder | PatchTransform):
            module.reset_tables()
        elif isinstance(module, LinearCodec):
            module.reset()
        else:
            super()._init_weights(module)


class EvatokEncoderModel(EvatokPreTrainedModel):
    """The tokenizer without its decoder: clips to the same tokens, under the same fingerprint, from the same files.

    None of the decoder's weights is read. What needs a decoder is refused with a ValueError.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]
    _is_part = True

    def __init__(self, config: EvatokConfig):
        super().__init__(config)
        self.assignment_space = config.assignment_space
        self.encoder = None if config.token_patches else EvatokEncoder(config)
        self.quantizer = VectorQuantizer(
            config.codebook_size, config.codebook_dim, config.entropy_temperature, config.entropy_tokens
        )
        self.codec = LinearCodec(config) if config.token_patches else None
        if not self._is_part:
            self.decoder = EvatokDecoder(config)
        self.post_init()
        self._aim_attention()

    @torch.no_grad()
    def _aim_attention(self) -> None:
        """With `attention_init` "shifted", makes every head start by attending around its own place in `HEAD_OFFSETS`,
        from where a query is.

        Not in `_init_weights`, which transformers does not call for modules without tensors of their own. A model that
        is about to be loaded is on the meta device here, where this does nothing.
        """
        if self.config.attention_init != "shifted" or self.device.type == "meta":
            return
        for part in ("encoder", "decoder"):
            for layer in getattr(getattr(self, part, None), "layers", ()):
                for attention in (layer.self_attention, layer.cross_attention):
                    offsets = HEAD_OFFSETS[f"{part}_{attention.name}"]
                    query, key = (
                        projection.weight.unflatten(0, (-1, attention.head_dim))
                        for projection in (attention.q_proj, attention.k_proj)
                    )
                    for head in range(len(key)):
                        offset = offsets[head % len(offsets)]
                        shift = position_shift(self.config.num_blocks, self.config.grid_size, key.shape[-1], offset)
                        query[head] = key[head] @ shift.to(key)

    def check_decoder(self, what: str = "decode") -> None:
        """Raises ValueError where there is no decoder; `what` says for whom it would be needed."""
        raise ValueError(f"this model was loaded without its decoder and cannot {what}; load it with its decoder.")

    def forward(
        self, pixel_values_videos: torch.Tensor, lengths: LengthsLike | None = None, return_dict: bool | None = None
    ) -> VideoTokens | tuple:
        """The tokens of clips; see `encode`."""
        return self.encode(pixel_values_videos, lengths, return_dict=return_dict)

    @torch.no_grad()
    def encode(
        self,
        pixel_values_videos: torch.Tensor,
        lengths: LengthsLike | None = None,
        refinement_steps: int = 0,
        exact: bool | None = None,
        return_dict: bool | None = None,
    ) -> VideoTokens | tuple:
        """Encodes clips to tokens. Without refinement the decoder does not run.

        Args:
            pixel_values_videos: (B, F, C, H, W) in [-1, 1].
            lengths: tokens of each block, (B, T), (T,) for all clips or one number; the middle candidate by default.
                On the CPU, so that no accelerator is waited for.
            exact: True takes each clip and block on its own, so that a clip's ids are the same in any batch to the last
                bit; False all clips together, which an accelerator needs to be busy: where two codes are equally near
                within rounding, the other one may then be chosen. By default True on a CPU, False elsewhere.
            refinement_steps: of searching, block by block, for ids that decode to less squared error than the
                encoder's (see `refined_ids`); each costs about two passes of the decoder.
            return_dict: False returns a tuple, of ids, lengths and what else is known.

        Returns:
            `VideoTokens` with ids (N,) and lengths (B, T), on the model's device.

        Raises:
            ValueError: a wrong video shape, lengths outside the assignment space, a negative number of steps, or
                refinement by a model without its decoder.
        """
        video = self.check_video(pixel_values_videos)
        lengths = self._check_lengths(lengths, len(video))
        self.check_refinement(refinement_steps)
        if len(video) and not refinement_steps and not self._exact(exact):
            layout = TokenLayout.choose(lengths, self.config._attn_implementation, video.device)
            features, found = self._features(video, layout)  # (N, d)
            ids = [self.quantizer.to_ids(features) if found is None else found]
        else:
            ids = [torch.empty(0, dtype=torch.int64, device=video.device)]
            for index, clip_lengths in enumerate(lengths.tolist()):
                state = self.start_encoding()
                blocks = video[index : index + 1].split(self.config.frames_per_block, dim=1)
                for block, length in zip(blocks, clip_lengths, strict=True):
                    ids.append(self.encode_block(block, length, state, refinement_steps))
        tokens = VideoTokens(torch.cat(ids), lengths.to(video.device), **self.origin())
        return self._returned(tokens, return_dict)

    def features(self, video: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """The features that are quantised, of clips (B, F, C, H, W) together: (tokens of all clips, codebook dim)."""
        return self._features(video, layout)[0]

    def _features(self, video: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`features`, and their ids (tokens of all clips,) where the features depend on ids, so that they are known."""
        if self.codec is not None:
            features, ids = self.codec.encode_clips(video, layout, self.quantizer)
            return layout.pack(features), layout.pack(ids)
        made = [self.encoder(video[clips], part) for clips, _, part in layout.parts()]
        return layout.pack(torch.cat(made, dim=1) if len(made) > 1 else made[0]), None

    def origin(self) -> dict[str, Any]:
        """The fields of `VideoTokens` that say which tokenizer made them."""
        return {
            "height": self.config.image_size,
            "width": self.config.image_size,
            "checkpoint": self.config._name_or_path.rstrip("/").rsplit("/", 1)[-1] or None,
            "fingerprint": self.fingerprint(),
        }

    def start_encoding(self) -> ClipState:
        """The state before the first block of a clip, for `encode_block`."""
        return self._start(self.encoder)

    def _start(self, part: nn.Module | None) -> ClipState:
        caches = [] if part is None else [LayerCache() for _ in part.layers]
        return ClipState(caches, None if self.codec is None else self.codec.grey(1))

    @torch.no_grad()
    def encode_block(
        self, frames: torch.Tensor, length: int, state: ClipState, refinement_steps: int = 0
    ) -> torch.Tensor:
        """Encodes the next block of a clip to ids, the same that `encode` gives it, as soon as its frames are there.

        Args:
            frames: (1, F / T, C, H, W) in [-1, 1].
            length: its tokens, one of the candidates.
            state: from `start_encoding`; moves on by a block.
            refinement_steps: see `encode`; for all blocks of a clip or for none.

        Returns:
            (length,) int64.

        Raises:
            ValueError: a wrong shape, a length that is no candidate, a clip that is complete, a negative number of
                steps, or refinement by a model without its decoder or after blocks without it.
        """
        frames = self.check_video(frames, self.config.frames_per_block)
        self._check_block(length, state)
        self.check_refinement(refinement_steps)
        if state.block and (state.decoding is None) != (not refinement_steps):
            raise ValueError("refine all blocks of a clip or none; the blocks before would be decoded with others.")
        if self.codec is not None:
            features, ids = self.codec.choose(self.codec.cut(frames, length), state.last, self.quantizer)
            if not refinement_steps and state.block + 1 < self.config.num_blocks:
                state.last = self.codec.last_frame(self.quantizer.to_codes(ids), state.last)
        else:
            features = self.encoder.block(frames, state.block, length, state.caches)
            ids = self.quantizer.to_ids(features[0])[None]
        state.block += 1
        return self._refine(features[0], frames, state, refinement_steps) if refinement_steps else ids[0]

    def check_refinement(self, steps: int) -> None:
        """Raises ValueError for a number of refinement steps that is negative or not whole, or steps without a
        decoder."""
        if isinstance(steps, bool) or int(steps) != steps or steps < 0:
            raise ValueError(f"refinement_steps is {steps}; give a whole number, 0 for the encoder's own ids.")
        if steps:
            self.check_decoder("refine")

    def _check_lengths(self, lengths: LengthsLike | None, batch_size: int) -> torch.Tensor:
        if lengths is None:
            lengths = self.config.block_lengths[len(self.config.block_lengths) // 2]
        return self.assignment_space.validate(lengths, batch_size)

    def _check_block(self, length: int, state: ClipState) -> None:
        if length not in self.config.block_lengths:
            raise ValueError(f"a block has one of {self.config.block_lengths} tokens, not {length}.")
        if state.block >= self.config.num_blocks:
            raise ValueError(f"all {self.config.num_blocks} blocks of this clip are done; start another one.")


class EvatokModel(EvatokEncoderModel):
    """The adaptive tokenizer. See the module docstring for the method and `EvatokConfig` for sizes."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = None
    _is_part = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, decoder: bool = True, **kwargs: Any):
        """Loads a tokenizer as transformers does; `decoder=False`, of earlier versions, gives `EvatokEncoderModel`."""
        if decoder:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        warnings.warn("decoder=False is the class EvatokEncoderModel now; load that.", FutureWarning, stacklevel=2)
        return EvatokEncoderModel.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def check_decoder(self, what: str = "decode") -> None:
        """Does nothing: the decoder is there."""

    def forward(
        self,
        pixel_values_videos: torch.Tensor,
        lengths: LengthsLike | None = None,
        output_hidden_states: bool = False,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> EvatokOutput | tuple:
        """Encodes, quantises and decodes with gradients; the clips of a batch may have any assignments.

        Args:
            pixel_values_videos: (B, F, C, H, W) in [-1, 1].
            lengths: tokens of each block, (B, T), (T,) for all clips or one number; the middle candidate by default.
            output_hidden_states: also return the decoder's hidden states.
            return_loss: compute the loss and its terms; by default in training mode.
            return_dict: False returns a tuple.

        Raises:
            ValueError: a wrong video shape, or lengths outside the assignment space.
        """
        return_loss = self.training if return_loss is None else return_loss
        video = self.check_video(pixel_values_videos)
        lengths = self._check_lengths(lengths, len(video))
        layout = TokenLayout.choose(lengths, self.config._attn_implementation, video.device)
        features, ids = self._features(video, layout)  # (tokens, d)
        quantized = self.quantizer(features, return_loss, ids)
        codes = layout.unpack(quantized.codes)
        reconstruction, *hidden = self._decode_batch(codes, layout, video.dtype, output_hidden_states)
        loss = l1 = None
        if return_loss:
            l1 = F.l1_loss(reconstruction.float(), video.float())
            loss = (
                l1
                + quantized.codebook_loss
                + self.config.commitment_weight * quantized.commitment_loss
                + self.config.entropy_weight * quantized.entropy_loss
            )
        output = EvatokOutput(
            loss=loss,
            reconstruction=reconstruction,
            reconstruction_loss=l1,
            codebook_loss=quantized.codebook_loss,
            commitment_loss=quantized.commitment_loss,
            entropy_loss=quantized.entropy_loss,
            ids=quantized.ids,
            lengths=lengths.to(video.device, non_blocking=True),
            decoder_hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return self._returned(output, return_dict)

    def _refine(self, features: torch.Tensor, frames: torch.Tensor, state: ClipState, steps: int) -> torch.Tensor:
        """The encoder's features (n, d) of a block, and its frames, to ids (n,); see `refined_ids`."""
        past = state.decoding = state.decoding or self.start_decoding()
        training = self.decoder.training

        def decode(codes: torch.Tensor) -> torch.Tensor:
            caches = [cache.branch() for cache in past.caches]  # which stay as they are
            return self._decode_next(codes, past, caches)[0]

        with torch.inference_mode(False):  # whose tensors, caches too, take part in no gradients
            self.decoder.eval()  # in training, gradient checkpointing would extend the caches once more
            try:
                with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
                    ids = refined_ids(self.quantizer, features.clone(), frames.clone().float(), decode, steps)
            finally:
                self.decoder.train(training)
            self.decode_block(ids, past)
        state.last = past.last
        return ids

    def start_decoding(self) -> ClipState:
        """The state before the first block of a clip, for `decode_block`."""
        return self._start(self.decoder)

    def _decode_next(
        self, codes: torch.Tensor, state: ClipState, caches: list[LayerCache]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the next block, whose codes are (n, d) fp32, the frames (1, F / T, C, H, W) and `ClipState.last`."""
        draft = last = None
        if self.codec is not None:
            draft = self.codec.decode(codes[None], state.last)
            draft, last = draft.to(self.dtype), draft[:, -1]
        return self.decoder.block(codes[None].to(self.dtype), state.block, caches, draft), last

    def _decode_batch(
        self, codes: torch.Tensor, layout: TokenLayout, dtype: torch.dtype, with_hidden: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """See `EvatokDecoder.forward`; codes are fp32, the transformer works in `dtype`."""
        draft = None if self.codec is None else self.codec.decode_clips(codes, layout).to(dtype)
        codes = codes.to(dtype)
        made = [
            self.decoder(codes[:, tokens], part, None if draft is None else draft[clips], with_hidden)
            for clips, tokens, part in layout.parts()
        ]
        return tuple(map(torch.cat, zip(*made, strict=True))) if len(made) > 1 else made[0]

    @torch.no_grad()
    def decode_block(self, ids: torch.Tensor, state: ClipState) -> torch.Tensor:
        """Decodes the ids (n,) of the next block of a clip to frames (1, F / T, C, H, W) in [-1, 1], as `decode` does.

        Raises:
            ValueError: a number of ids that is no candidate, or a clip that is complete.
        """
        self._check_block(len(ids), state)
        codes = self.quantizer.to_codes(ids.to(self.device))  # (n, d)
        frames, state.last = self._decode_next(codes, state, state.caches)
        state.block += 1
        return frames.clamp(-1, 1)

    @torch.no_grad()
    def decode(self, tokens: VideoTokens, exact: bool | None = None) -> torch.Tensor:
        """Decodes tokens to clips.

        Args:
            tokens: from `encode`, a file, or a generator.
            exact: whether a clip's frames are the same in any batch to the last bit; see `encode`.

        Returns:
            (B, F, C, H, W) in [-1, 1].

        Raises:
            ValueError: tokens of another checkpoint, ids outside the codebook, lengths outside the assignment space.
        """
        self.check_tokens(tokens)
        if len(tokens) and not self._exact(exact):
            layout = TokenLayout.choose(tokens.lengths.cpu(), self.config._attn_implementation, self.device)
            codes = self.quantizer.to_codes(tokens.ids.to(self.device))  # (N, d)
            return self._decode_batch(layout.unpack(codes), layout, self.dtype)[0].clamp(-1, 1)
        clips, start = [], 0
        for clip_lengths in tokens.lengths.tolist():
            state, blocks = self.start_decoding(), []
            for length in clip_lengths:
                blocks.append(self.decode_block(tokens.ids[start : start + length], state))
                start += length
            clips.append(torch.cat(blocks, dim=1))
        if not clips:
            c = self.config
            size = (0, c.num_frames, c.num_channels, c.image_size, c.image_size)
            return torch.empty(size, device=self.device, dtype=self.dtype)
        return torch.cat(clips)

    def reads(self, fingerprint: str | None) -> bool:
        """True if ids of the checkpoint of that fingerprint (None: unknown) mean here what they mean there."""
        return fingerprint in self.config.same_ids_as or fingerprint == self.fingerprint()

    def check_tokens(self, tokens: VideoTokens) -> None:
        """Raises ValueError unless this model can decode the tokens: who made them, their lengths, their ids."""
        self.check_origin(tokens)
        self._check_lengths(tokens.lengths, len(tokens))

    def check_origin(self, tokens: VideoTokens) -> None:
        """Raises ValueError for what is no tokens, tokens of another checkpoint, or ids outside the codebook."""
        check_is_tokens(tokens)
        if tokens.fingerprint is not None and not self.reads(tokens.fingerprint):
            own = f"{self.config._name_or_path or 'unnamed'} ({self.fingerprint() or 'not saved'})"
            raise ValueError(
                f"these tokens were made by checkpoint {tokens.checkpoint or 'unknown'} ({tokens.fingerprint}), but "
                f"this one is {own}; load the checkpoint that made them."
            )
        ids = tokens.ids
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.config.codebook_size):
            raise ValueError(
                f"ids run from {int(ids.min())} to {int(ids.max())}, but the codebook has "
                f"{self.config.codebook_size} entries; the tokens are damaged or of another checkpoint."
            )
