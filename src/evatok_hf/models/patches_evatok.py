"""Patches of frames: cut, resized to any number of tokens, and coded linearly (`token_patches`).

Shapes as in `modeling_evatok`; P values of a patch, n blocks of one length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_evatok import EvatokConfig

if TYPE_CHECKING:
    from .modeling_evatok import TokenLayout, VectorQuantizer

# Of a patch, as a linear map, what the filters of `LinearCodec` look at (our choice; 48 gain nothing more).
FILTER_INPUTS = 32
# Of their weights, the deviation before anything is learned: they do next to nothing.
_FILTER_START = 0.02


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


@dataclass
class LinearTokens:
    """What the linear codec says of tokens, for the encoder.

    Attributes:
        patches: of the resized frames, (.., P).
        features: what the maps make of these or of their residuals, (.., codebook dim).
    """

    patches: torch.Tensor
    features: torch.Tensor

    def part(self, tokens: slice) -> LinearTokens:
        """Some of the tokens of rows."""
        return LinearTokens(self.patches[:, tokens], self.features[:, tokens])


class LinearCodec(nn.Module):
    """Linear maps to codes, back and over seams, which the transformers add to under `token_patches` (our choice).

    A token codes its patch, or what the last frame before the block lacks of it: the residual, whichever comes nearer.
    Its code says which by the sign of its last dimension, negative for a residual. The last frame before is what the
    maps back make of the codes so far (grey before the first block), so that a decoder has it too; here the codes are
    the nearest ones of the linear features, as the transformers have not spoken yet. Thus a block of a still scene
    costs few tokens, and refines what came before.

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
        init.normal_(self.filters.weight, std=_FILTER_START)
        init.zeros_(self.filters.bias)
        for projection, sign in ((self.patch_to_code, 1.0), (self.residual_to_code, -1.0)):
            init.copy_(projection.bias, F.pad(torch.zeros(self.config.codebook_dim - 1), (0, 1), value=sign))

    def grey(self, clips: int) -> torch.Tensor:
        """The frames before the first blocks of clips, (clips, C, H, W)."""
        c, weight = self.config, self.code_to_patch.weight
        return weight.new_zeros(clips, c.num_channels, c.image_size, c.image_size, dtype=torch.float32)

    def cut(self, frames: torch.Tensor, length: int) -> torch.Tensor:
        """The patches of a block's frames (n, f, C, H, W), one for each of its tokens, (n, length, P)."""
        return frames_to_token_patches(frames.float(), length, self.config.patch_size)

    def residuals(self, patches: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """What a frame (n, C, H, W), held, lacks of the patches (n, length, P) of the block after it."""
        c = self.config
        held = self.cut(before[:, None], patches.shape[1]).unflatten(-1, (c.num_channels, 1, -1))
        return patches - held.expand(-1, -1, -1, c.frames_per_block, -1).flatten(-3)

    def encode(
        self, patches: torch.Tensor, before: torch.Tensor, quantizer: VectorQuantizer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a block the features of its tokens (n, length, codebook dim), and the last frame that their codes make.

        Args:
            patches: see `cut`.
            before: the last frame of the block before, (n, C, H, W).
            quantizer: whose codes are used.
        """
        features, codes = self.choose(patches, before, quantizer)
        with torch.no_grad():
            return features, self.decode(codes, before)[:, -1]

    def choose(
        self, patches: torch.Tensor, before: torch.Tensor, quantizer: VectorQuantizer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `encode`: the features of the tokens, and their nearest codes, both (n, length, codebook dim)."""
        with torch.autocast(patches.device.type, enabled=False):
            features, codes, errors = [], [], []
            for values, inward, outward in (
                (patches, self.patch_to_code, self.code_to_patch),
                (self.residuals(patches, before), self.residual_to_code, self.code_to_residual),
            ):
                features.append(_in_fp32(inward, values / values.shape[-1]))
                with torch.no_grad():
                    codes.append(quantizer.to_codes(quantizer.to_ids(features[-1].flatten(0, 1))).view_as(features[-1]))
                    errors.append((values - _in_fp32(outward, codes[-1])).square().sum(-1, keepdim=True))
            is_residual = errors[1] < errors[0]
            return torch.where(is_residual, *features[::-1]), torch.where(is_residual, *codes[::-1])

    def decode(self, codes: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The frames (n, F / T, C, H, W) of a block that its codes (n, length, codebook dim) make after a frame."""
        with torch.autocast(codes.device.type, enabled=False):
            frames = self.unfiltered(codes.float(), before)
            weight, bias = (part.float() for part in self.filter_of(codes.shape[1]))
            patches = F.conv2d(self.seams(frames), weight, bias, padding=1).flatten(2).mT[:, None]
            c = self.config
            return frames + unpatchify(patches, c.frames_per_block, c.patch_size, c.num_channels)

    def filter_of(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (P, inputs, 3, 3) and bias (P,) of the filter for blocks of so many tokens."""
        number, count = self.config.block_lengths.index(length), len(self.config.block_lengths)
        return self.filters.weight.chunk(count)[number], self.filters.bias.chunk(count)[number]

    def unfiltered(self, codes: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """`decode` before its filter; codes in fp32."""
        c, residual = self.config, codes[..., -1:] < 0
        patches = torch.where(residual, _in_fp32(self.code_to_residual, codes), _in_fp32(self.code_to_patch, codes))
        share = residual.float().expand(-1, -1, c.patch_size**2)
        frames = token_patches_to_frames(patches, c.patch_size, c.num_channels, c.image_size)
        return frames + token_patches_to_frames(share, c.patch_size, 1, c.image_size) * before[:, None]

    def seams(self, frames: torch.Tensor) -> torch.Tensor:
        """What the filters look at of a block's frames (n, F / T, C, H, W), (n, inputs, G, G)."""
        cells = _in_fp32(self.filter_inputs, patchify(frames, 1, self.config.patch_size)[:, 0])
        return cells.mT.unflatten(-1, (self.config.grid_size, -1))

    def encode_clips(self, video: torch.Tensor, layout: TokenLayout, quantizer: VectorQuantizer) -> LinearTokens:
        """`encode` of clips (B, F, C, H, W): of the layout's tokens, (rows, N, ..), in the dtype of the clips."""
        c, (clips, num_blocks) = self.config, layout.lengths.shape
        blocks, longest = video.unflatten(1, (num_blocks, -1)), int(layout.lengths.max())
        patches = self.grey(clips).new_zeros(clips, num_blocks, longest, math.prod(c.patch_shape))
        features = patches.new_zeros(clips, num_blocks, longest, c.codebook_dim)
        last = self.grey(clips)
        for t, lengths in enumerate(layout.by_length()):
            for length, clip in lengths:
                patches[clip, t, :length] = cut = self.cut(blocks[clip, t], length)
                features[clip, t, :length], last[clip] = self.encode(cut, last[clip], quantizer)
        return LinearTokens(layout.gather(patches).to(video.dtype), layout.gather(features).to(video.dtype))

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


def _in_fp32(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear.weight.float(), linear.bias.float())
