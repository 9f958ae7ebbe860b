"""The two Q-Former transformers of the tokenizer: `EvatokEncoder`, video to features of 1D tokens, and `EvatokDecoder`.

Each has a path of a whole batch without computing padding (`forward`) and one of a single clip block by block with
cached keys and values (`block`); see `modeling_evatok` for both.

Shapes: B clips, T blocks, G x G cells of a block, M longest candidate, N tokens of a clip, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from .blocks_evatok import CausalBlocks, TokenLayout
from .configuration_evatok import EvatokConfig
from .layers_evatok import (
    EvatokLayer,
    EvatokPositions,
    LayerCache,
    PatchTransform,
    patchify,
    pooling_matrix,
    unpatchify,
)


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
        patches = patchify(video, num_blocks, self.config.patch_size)
        if self.config.patch_basis == "cosine":
            patches = self.transform.analysis(patches)
        return self.memory_projection(self.patch_norm(self.patch_embedding(patches)))

    def queries(self, memory: torch.Tensor, length: int) -> torch.Tensor:
        """Memory (.., G^2, D) -> the first `length` queries, (.., length, D)."""
        return self.query_projection(self.pooling[:length] @ memory)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(.., D) -> (.., codebook dim)."""
        return self.to_codebook(self.out_projection(self.norm(x)))

    def forward(self, video: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """The path of a whole batch. -> (rows, N, codebook dim), meaningless where padded."""
        made = [self._together(video[clips], part) for clips, _, part in layout.parts()]
        return torch.cat(made, dim=1) if len(made) > 1 else made[0]

    def _together(self, video: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        memory = self.memory(video)  # (B, T, G^2, D)
        position = self.positions.tokens()[layout.block, layout.slot]  # (N, D)
        pooled = layout.gather(self.pooling[: int(layout.lengths.max())] @ memory)
        x = self.query_projection(pooled) + position  # (rows, N, D)
        self_blocks, cross_blocks = layout.over_tokens(), layout.over_cells(memory.shape[2])
        cells = self.positions.cells().flatten(0, 1)
        memory = memory.flatten(1, 2)
        for layer in self.layers:
            x = layer(x, position, memory, cells, self_blocks, cross_blocks)
        return self.head(x)

    def block(self, video: torch.Tensor, t: int, length: int, caches: list[LayerCache]) -> torch.Tensor:
        """The cached path: frames (B, F/T, C, H, W) of block t after blocks < t -> (B, length, codebook dim)."""
        memory = self.memory(video)[:, 0]  # (B, G^2, D)
        position, cells = self.positions.tokens()[t, :length], self.positions.cells()[t]
        x = self.queries(memory, length) + position
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
        if config.patch_basis == "cosine":
            self.transform = PatchTransform(config.patch_shape)

    def memory(self, codes: torch.Tensor) -> torch.Tensor:
        """(.., codebook dim) -> (.., D)."""
        return self.memory_projection(self.from_codebook(codes))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, G^2, D) -> frames (B, T * F/T, C, H, W)."""
        patches = self.to_patch(self.out_projection(self.norm(x)))
        if self.config.patch_basis == "cosine":
            patches = self.transform.synthesis(patches)
        return unpatchify(patches, self.config.frames_per_block, self.config.patch_size, self.config.num_channels)

    def forward(self, codes: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, ...]:
        """The path of a batch: codes (rows, N, codebook dim) -> (B, F, C, H, W), then by layer (B, T, G^2, D)."""
        made = [self._together(codes[:, tokens], part) for _, tokens, part in layout.parts()]
        return tuple(map(torch.cat, zip(*made, strict=True))) if len(made) > 1 else made[0]

    def _together(self, codes: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, ...]:
        t, cells = self.config.num_blocks, self.config.embeddings_per_block
        memory = self.memory(codes)  # (rows, N, D)
        memory_position = self.positions.tokens()[layout.block, layout.slot]  # (N, D)
        position = self.positions.cells().flatten(0, 1)
        x = layout.first(memory).repeat_interleave(cells, dim=1) + position  # (B, T * G^2, D)
        self_blocks, cross_blocks = CausalBlocks([cells] * t, [cells] * t), layout.from_cells(cells)
        hidden = [x]
        for layer in self.layers:
            x = layer(x, position, memory, memory_position, self_blocks, cross_blocks)
            hidden.append(x)
        return self.head(x.unflatten(1, (t, cells))), *(h.unflatten(1, (t, cells)) for h in hidden)

    def block(self, codes: torch.Tensor, t: int, caches: list[LayerCache]) -> torch.Tensor:
        """The cached path: codes (B, length, codebook dim) of block t after blocks < t -> (B, F/T, C, H, W)."""
        memory = self.memory(codes)  # (B, length, D)
        position, memory_position = self.positions.cells()[t], self.positions.tokens()[t, : codes.shape[1]]
        x = memory[:, :1] + position  # (B, G^2, D)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, position, memory, memory_position, cache=cache)
        return self.head(x[:, None])
