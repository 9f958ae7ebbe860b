"""LARP-L (arXiv 2410.21264; github.com/hywang66/LARP): a fixed number of tokens for every clip.

3D patches of 4 x 8 x 8 and learned queries go, one after another in one sequence, through a pre-norm transformer with
full self-attention; the queries' outputs are projected to 16 dimensions and take the nearest of 8192 unit codes by
cosine. The decoder is a second such transformer over the codes (plus fixed positions) and fixed patch queries; a
linear layer makes the pixels. Both have 12 layers of 768 channels, 12 heads, GELU perceptrons of four times the
width, no bias on queries, keys and values. A clip of 16 x 128 x 128 has 1024 patches and 1024 tokens, so each
transformer has 2048 places.

In the peer's favour: patches are cut by a reshape and a matrix product rather than a 3D convolution; ids are the
largest cosines, without the softmax; no code is projected while encoding. The prior that helps to train LARP does not
run when it encodes or decodes, and is not here.

Shapes: B clips, P patches, N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from evatok_hf.models.modeling_evatok import patchify, sincos_positions, unpatchify


@dataclass(frozen=True)
class PeerSizes:
    """Sizes of a peer; the defaults are those published for LARP-L."""

    image_size: int = 128
    num_frames: int = 16
    num_blocks: int = 4
    patch_size: int = 8
    num_channels: int = 3
    num_tokens: int = 1024  # queries of the encoder, the most tokens that a clip can have
    width: int = 768  # of the encoder, and of the decoder
    num_layers: int = 12
    num_heads: int = 12
    codebook_size: int = 8192
    codebook_dim: int = 16

    @property
    def cells(self) -> int:
        """Patches of a temporal block."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        return self.num_channels * self.num_frames // self.num_blocks * self.patch_size**2


PUBLISHED = PeerSizes()


class Layer(nn.Module):
    """A pre-norm transformer layer, as in timm's vision transformers."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, L, D), mask True where attention is allowed, (L, L) or (B, 1, L, L) -> (B, L, D)."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


def transformer(sizes: PeerSizes) -> nn.ModuleList:
    return nn.ModuleList(Layer(sizes.width, sizes.num_heads) for _ in range(sizes.num_layers))


def sincos_sequence(length: int, width: int) -> torch.Tensor:
    """Fixed positions along a sequence, (length, width)."""
    frequencies = 10000 ** -torch.linspace(0, 1, width // 2)
    angle = torch.arange(length)[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Larp(nn.Module):
    """The tokenizer. `encode` and `decode` are what its users call; see the module docstring."""

    def __init__(self, sizes: PeerSizes = PUBLISHED):
        super().__init__()
        self.sizes = sizes
        side = sizes.image_size // sizes.patch_size
        self.patch_embedding = nn.Linear(sizes.patch_dim, sizes.width)
        self.queries = nn.Parameter(0.02 * torch.randn(sizes.num_tokens, sizes.width))
        self.encoder = transformer(sizes)
        self.to_codebook = nn.Linear(sizes.width, sizes.codebook_dim)
        self.codebook = nn.Embedding(sizes.codebook_size, sizes.codebook_dim)
        self.from_codebook = nn.Linear(sizes.codebook_dim, sizes.width)
        self.patch_query = nn.Parameter(0.02 * torch.randn(sizes.width))  # one for all, beside the fixed positions
        self.decoder = transformer(sizes)
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.to_patch = nn.Linear(sizes.width, sizes.patch_dim)
        # On the CPU first: once transformers has loaded a model, torch.linspace makes CPU tensors on the meta device.
        with torch.device("cpu"):
            places = sincos_positions(sizes.num_blocks, side, sizes.width).flatten(0, 1)
            sequence = sincos_sequence(sizes.num_tokens, sizes.width)
        self.register_buffer("patch_positions", places.to(self.queries.device), persistent=False)  # (P, D)
        self.register_buffer("token_positions", sequence.to(self.queries.device), persistent=False)  # (N, D)

    def features(self, video: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, F, C, H, W) -> what the encoder makes of the queries, (B, N, D)."""
        patches = patchify(video, self.sizes.num_blocks, self.sizes.patch_size).flatten(1, 2)
        x = self.patch_embedding(patches) + self.patch_positions  # (B, P, D)
        x = torch.cat([x, self.queries.expand(len(video), -1, -1)], dim=1)  # (B, P + N, D)
        for layer in self.encoder:
            x = layer(x, mask)
        return x[:, -self.sizes.num_tokens :]

    def quantize(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> ids (B, N) int64. In float32, as published."""
        x = F.normalize(self.to_codebook(features).float(), dim=-1)
        return (x @ F.normalize(self.codebook.weight.float(), dim=-1).T).argmax(-1)

    def latents(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, N) -> (B, N, D)."""
        codes = F.normalize(self.codebook(ids).float(), dim=-1)
        return self.from_codebook(codes.to(self.from_codebook.weight.dtype))

    def pixels(self, latents: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Latents with their positions, (B, N, D) -> (B, F, C, H, W)."""
        s = self.sizes
        queries = (self.patch_positions + self.patch_query).expand(len(latents), -1, -1)
        x = torch.cat([latents, queries], dim=1)  # (B, N + P, D)
        for layer in self.decoder:
            x = layer(x, mask)
        patches = self.to_patch(self.norm(x[:, latents.shape[1] :]))  # (B, P, patch)
        patches = patches.unflatten(1, (s.num_blocks, s.cells))
        return unpatchify(patches, s.num_frames // s.num_blocks, s.patch_size, s.num_channels)

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) in [-1, 1] -> ids (B, N) int64."""
        return self.quantize(self.features(video))

    @torch.no_grad()
    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, N) -> (B, F, C, H, W)."""
        return self.pixels(self.latents(ids) + self.token_positions)
