"""Parts of the tokenizer's transformers: patches and pooling, positions, attention under temporal causality, layers.

Shapes: B clips, T blocks, G x G cells of a block, M longest candidate, N tokens of a clip, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks_evatok import Blocks
from .configuration_evatok import EvatokConfig

# Where the heads of "shifted" attention look at the start, from the query, in (blocks, rows, columns); further heads
# begin anew. Tokens gather the cells that they pool, cells the tokens around them, and both what was there before.
_QUARTERS = ((0, -0.5, -0.5), (0, -0.5, 0.5), (0, 0.5, -0.5), (0, 0.5, 0.5))
HEAD_OFFSETS = {
    "encoder_self": ((0, 0, 0), (0, 0, 1.5), (0, 0, -1.5), (0, 1.5, 0), (0, -1.5, 0), (-1, 0, 0)),
    "encoder_cross": (*_QUARTERS, (0, 0, 0), (-1, 0, 0)),
    "decoder_self": ((0, 0, 0), (0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (-1, 0, 0), (-1, 0, 0), (-2, 0, 0)),
    "decoder_cross": ((0, 0, 0), *_QUARTERS, (-1, 0, 0), (-2, 0, 0), (-3, 0, 0)),
}

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


def sincos_positions(num_blocks: int, grid_size: int, dim: int) -> torch.Tensor:
    """Fixed positions of the 3D grid, (T, G^2, dim): a quarter of the channels for time, the rest for rows and columns.

    Wavelengths are geometric from 2 cells to 4 times the axis, since the axes are short (our choice).
    """

    def axis(length: int, channels: int) -> torch.Tensor:
        angle = torch.arange(length)[:, None] * _angular_frequencies(length, channels)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (length, channels)

    time, space = axis(num_blocks, dim // 4), axis(grid_size, 3 * dim // 8)
    t, g = num_blocks, grid_size
    parts = [
        time[:, None, None].expand(t, g, g, -1),
        space[None, :, None].expand(t, g, g, -1),
        space[None, None, :].expand(t, g, g, -1),
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
    """What "cosine" patches go in as: their transform, scaled half-way to equal variances at the same total, (P, P).

    All the way, the noise of fine detail would drown the rest.
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


def unpatchify(patches: torch.Tensor, frames_per_block: int, patch_size: int, channels: int) -> torch.Tensor:
    """(B, T, G^2, C * F/T * p * p) -> (B, F, C, H, W); undoes `patchify`."""
    b, t, cells, _ = patches.shape
    g, p = math.isqrt(cells), patch_size
    x = patches.reshape(b, t, g, g, channels, frames_per_block, p, p)
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(b, t * frames_per_block, channels, g * p, g * p)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The readable reference: softmax(q k^T / sqrt(d)) v with a boolean mask. (B, heads, N, d) -> (B, N, heads, d)."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# --- blocks -----------------------------------------------------------------------------------------------------------


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
        """What a decoder gives out (.., P), frequencies before they are scaled as in video -> pixels (.., P)."""
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
            self.index_embedding = nn.Parameter(torch.empty(longest, dim))
            self.register_buffer("cell_table", torch.empty(t, cells, dim), persistent=False)
            self.register_buffer("pooled_table", torch.empty(t, longest, dim), persistent=False)

    def reset_tables(self) -> None:
        """Fills what no checkpoint holds."""
        if self.config.position_embedding == "pooled":
            cells = sincos_positions(self.config.num_blocks, self.config.grid_size, self.dim)
            cells = self.config.position_scale * cells
            grid, longest = self.config.grid_size, max(self.config.block_lengths)
            if self.config.interlaced_positions:
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
        """(T, M, D)."""
        if self.config.position_embedding == "learned":
            return self.token_table
        return self.pooled_table + self.index_embedding
