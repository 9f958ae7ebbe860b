"""AdapTok (arXiv 2505.17011; github.com/VisionXLab/AdapTok): a number of tokens for each temporal block of a clip.

LARP's two transformers with 2048 queries, 512 for each of four temporal blocks, and dense block-causal masks:

- Encoder: patches and queries of block t see those of blocks <= t. All 2048 tokens are computed, whatever a clip is
  going to keep; a shorter block is the first tokens of the full one.
- Decoder: tokens see tokens of blocks <= t, patch queries those and the patches of their own block. What is not kept
  is dropped, the clips of a batch are padded to the one with most tokens, and each clip gets a boolean mask of its
  own over the whole sequence.

How many tokens a block gets is chosen between encoder and decoder (`AdapTokScorer`). For each block in turn a third
transformer of 12 x 768 reads features and quantised features of all 2048 places (what was dropped earlier is zeroed and
masked) and gives a predicted distance for every 64th token; an integer program over the clips of the batch then picks
the lengths of that block. So an adaptive encode costs an encoder pass, four scorer passes and four integer programs.
Given lengths, as for a fixed budget, cost the encoder pass alone: `AdapTok.encode`.

In the peer's favour, beside what `larp.py` says: the integer programs (0.04 s for 64 clips by its solver) cost nothing
here; masks are made at the size that is needed rather than cut out of full ones, the encoder's once and for all.

Shapes: B clips, T blocks, M most tokens of a block, N = T * M, P patches, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from .larp import Larp, PeerSizes, transformer

PUBLISHED = PeerSizes(num_tokens=2048)


class AdapTok(Larp):
    """The tokenizer. Its ids are all N of a clip; lengths say how many of each block count."""

    def __init__(self, sizes: PeerSizes = PUBLISHED):
        super().__init__(sizes)
        s = self.sizes
        self.tokens_per_block = s.num_tokens // s.num_blocks
        blocks = torch.arange(s.num_blocks)
        patches, tokens = blocks.repeat_interleave(s.cells), blocks.repeat_interleave(self.tokens_per_block)
        places = torch.cat([patches, tokens])
        self.register_buffer("encoder_mask", places[:, None] >= places, persistent=False)  # (P + N, P + N)

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, C, H, W) in [-1, 1] -> ids (B, N) int64, of which `decode` takes the first of each block."""
        return self.quantize(self.features(video, self.encoder_mask))

    @torch.no_grad()
    def decode(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Ids (B, N), lengths (B, T) -> (B, F, C, H, W)."""
        s = self.sizes
        keep = kept_places(lengths, self.tokens_per_block)  # (B, N)
        longest = int(keep.sum(1).max())
        order = keep.int().argsort(dim=1, descending=True, stable=True)[:, :longest]  # (B, L), padding last
        valid = keep.gather(1, order)
        latents = self.latents(ids.gather(1, order)).masked_fill(~valid[..., None], 0)
        latents = latents + self.token_positions[order]
        return self.pixels(latents, self.decoder_mask(order // self.tokens_per_block, valid, s.cells))

    def decoder_mask(self, block: torch.Tensor, valid: torch.Tensor, cells: int) -> torch.Tensor:
        """Blocks of the tokens and which of them are no padding, (B, L) -> (B, 1, L + P, L + P)."""
        batch, longest = block.shape
        patch_block = torch.arange(self.sizes.num_blocks, device=block.device).repeat_interleave(cells)  # (P,)
        total = longest + len(patch_block)
        mask = torch.zeros(batch, total, total, dtype=torch.bool, device=block.device)
        sees = (block[:, :, None] >= block[:, None]) & valid[:, None]
        mask[:, :longest, :longest] = sees & valid[:, :, None]
        mask[:, longest:, :longest] = (patch_block[:, None] >= block[:, None]) & valid[:, None]
        mask[:, longest:, longest:] = patch_block[:, None] == patch_block
        mask.diagonal(dim1=1, dim2=2).fill_(True)  # a row without any key would be 0 / 0
        return mask[:, None]


class AdapTokScorer(nn.Module):
    """Predicted perceptual distance of every block for every 64th token; see the module docstring."""

    def __init__(self, sizes: PeerSizes = PUBLISHED, step: int = 64):
        super().__init__()
        self.sizes, self.step = sizes, step
        self.tokens_per_block = sizes.num_tokens // sizes.num_blocks
        width = sizes.width
        self.projection = nn.Linear(2 * width, width)
        self.positions = nn.Parameter(width**-0.5 * torch.randn(sizes.num_tokens, width))
        self.layers = transformer(sizes)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, 1))
        blocks = torch.arange(sizes.num_blocks).repeat_interleave(self.tokens_per_block)
        self.register_buffer("mask", blocks[:, None] >= blocks, persistent=False)  # (N, N)

    @torch.no_grad()
    def forward(self, features: torch.Tensor, quantized: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """One of the T passes, which all cost the same: `AdapTok.features` and `latents` (B, N, D), and the lengths
        (B, T) chosen so far, M for the block in question and 0 for later ones -> (B, N / step)."""
        keep = kept_places(lengths, self.tokens_per_block)  # (B, N)
        x = torch.cat([features, quantized], dim=-1).masked_fill(~keep[..., None], 0)
        mask = self.mask & keep[:, None] & keep[:, :, None]  # (B, N, N)
        mask.diagonal(dim1=1, dim2=2).fill_(True)
        x = self.projection(x) + self.positions
        for layer in self.layers:
            x = layer(x, mask[:, None])
        return self.head(self.norm(x))[:, self.step - 1 :: self.step, 0]


def kept_places(lengths: torch.Tensor, tokens_per_block: int) -> torch.Tensor:
    """Lengths (B, T) -> (B, T * M), True for the first tokens of each block."""
    slots = torch.arange(tokens_per_block, device=lengths.device)
    return (slots < lengths[..., None]).flatten(1)
