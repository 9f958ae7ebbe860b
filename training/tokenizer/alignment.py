"""Alignment of the decoder's features with those of a frozen video network (paper, L_align).

Shapes: B clips; D width and (T, G, G) grid of the decoder; C width and (T', h, w) grid of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from evatok_hf import EvatokModel, EvatokOutput
from evatok_hf.models.configuration_evatok import LengthsLike


class GridBridge(nn.Module):
    """Projects features on one 3D grid to another width on another grid, any sizes.

    Axis by axis: where the source has k cells for one of the target, their features are concatenated before the
    projection; where the target has k cells for one of the source, the projection gives k cells' features, which are
    then laid out, as a decoder lays out the pixels of a patch; where neither divides the other, the source is
    resampled linearly to the target's cells first (our choice).

    Args:
        source_width, source_grid: C and (T', h, w).
        target_width, target_grid: D and (T, g, g').
        hidden: width of two hidden layers with SiLU, None for a linear projection.
    """

    def __init__(
        self,
        source_width: int,
        source_grid: Sequence[int],
        target_width: int,
        target_grid: Sequence[int],
        hidden: int | None = None,
    ):
        super().__init__()
        self.source_grid, self.target_grid = tuple(source_grid), tuple(target_grid)
        pairs = list(zip(self.source_grid, self.target_grid, strict=True))
        self.resampled = tuple(a if a % b == 0 or b % a == 0 else b for a, b in pairs)
        self.merged = tuple(max(1, a // b) for a, b in zip(self.resampled, self.target_grid, strict=True))
        self.expanded = tuple(max(1, b // a) for a, b in zip(self.resampled, self.target_grid, strict=True))
        before, after = source_width * math.prod(self.merged), target_width * math.prod(self.expanded)
        if hidden is None:
            self.project = nn.Linear(before, after)
        else:
            layers = [nn.Linear(before, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
            self.project = nn.Sequential(*layers, nn.Linear(hidden, after))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, T', h, w, C) -> (B, T, g, g', D)."""
        if self.resampled != self.source_grid:
            x = features.movedim(-1, 1)  # (B, C, T', h, w)
            features = F.interpolate(x, self.resampled, mode="trilinear", align_corners=False).movedim(1, -1)
        kt, ky, kx = self.merged
        x = features.unflatten(3, (-1, kx)).unflatten(2, (-1, ky)).unflatten(1, (-1, kt))
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)  # (B, t, y, x, merged cells * C)
        x = self.project(x).unflatten(-1, (*self.expanded, -1))
        # (B, t, y, x, kt, ky, kx, D) -> every cell beside those that it was projected with
        return x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class AlignmentLoss(nn.Module):
    """Minus the mean cosine similarity, cell by cell, of the decoder's features and the teacher's; in [-1, 1].

    Which side is projected to the other is `direction`:

    - "teacher", what the paper says: a linear projection of the teacher's features to the decoder's width and grid.
      Both sides are learned then, so they can agree without the teacher: a projection that ignores its input (its bias
      alone) and decoder features that are the same everywhere reach -1. Only the tokenizer's other losses, which need
      the decoder's features to tell cells apart, work against that. The contrast measures it.
    - "decoder", as REPA (Yu et al. 2024) and GigaTok have it: the decoder's features go through a perceptron (two
      hidden layers of 4 D, SiLU) to the teacher's width and grid. The target is fixed, so that a constant answer gets
      no further than the similarity of the teacher's features to their mean.

    Args:
        decoder_width, decoder_grid: D and (T, G, G).
        teacher_width, teacher_grid: C and (T', h, w), `width` and `grid` of a teacher.
        direction: "teacher" or "decoder".
    """

    def __init__(
        self,
        decoder_width: int,
        decoder_grid: Sequence[int],
        teacher_width: int,
        teacher_grid: Sequence[int],
        direction: str = "teacher",
    ):
        super().__init__()
        self.direction, self.decoder_grid = direction, tuple(decoder_grid)
        if direction == "teacher":
            self.bridge = GridBridge(teacher_width, teacher_grid, decoder_width, decoder_grid)
        else:
            self.bridge = GridBridge(decoder_width, decoder_grid, teacher_width, teacher_grid, 4 * decoder_width)

    def forward(
        self, decoder_features: torch.Tensor, teacher_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the contrast without a gradient; scalars in float32.

        The contrast is how much more alike features of the same cell are than of cells half the clip's cells apart, in
        [-2, 2]. Near 0 with a loss near -1 means that the loss is met by features that say nothing.

        Args:
            decoder_features: (B, T, G * G, D), one of a model's `decoder_hidden_states`.
            teacher_features: (B, T', h, w, C), a teacher's `grid_features`; no gradient reaches them.
        """
        decoder, teacher = decoder_features.unflatten(2, self.decoder_grid[1:]), teacher_features.detach()
        if self.direction == "teacher":
            teacher = self.bridge(teacher)
        else:
            decoder = self.bridge(decoder)
        decoder, teacher = decoder.float(), teacher.float()
        loss = -F.cosine_similarity(decoder, teacher, dim=-1).mean()
        left, right = (side.detach().flatten(1, 3) for side in (decoder, teacher))  # (B, cells, width)
        apart = right.roll(right.shape[1] // 2, dims=1)
        contrast = F.cosine_similarity(left, right, dim=-1) - F.cosine_similarity(left, apart, dim=-1)
        return loss, contrast.mean()


@dataclass
class AlignedOutput(EvatokOutput):
    """Output of `AlignedTokenizer`.

    Attributes:
        alignment: the loss, with its gradient.
        alignment_contrast: see `AlignmentLoss`.
    """

    alignment: torch.Tensor | None = None
    alignment_contrast: torch.Tensor | None = None


class AlignedTokenizer(nn.Module):
    """A tokenizer with its alignment, in one module that is called once for a backward pass.

    They share an optimiser, which FSDP2 allows the parts of one module only. Without an alignment it is there for
    accelerate, which looks for the embeddings of words in a model of transformers that it shards.

    Args:
        tokenizer: also called through this module, since FSDP2 gathers weights when the outermost module is called.
        alignment: made for it, or None.
        layer: of the decoder, whose output is aligned, from 1.
    """

    def __init__(self, tokenizer: EvatokModel, alignment: AlignmentLoss | None, layer: int):
        super().__init__()
        self.tokenizer, self.alignment, self.layer = tokenizer, alignment, layer

    def forward(
        self,
        video: torch.Tensor,
        lengths: LengthsLike | None = None,
        target: torch.Tensor | None = None,
        return_dict: Literal[True] = True,
    ) -> EvatokOutput:
        """As `EvatokModel.forward`, with the alignment where there is something to align with.

        Args:
            target: (B, T', h, w, C), the teacher's `grid_features` of the clips; None: the tokenizer alone.
        """
        output = self.tokenizer(video, lengths, output_hidden_states=target is not None, return_dict=return_dict)
        if target is None:
            return output
        loss, contrast = self.alignment(output.decoder_hidden_states[self.layer], target)  # (B, T, G^2, D)
        kept = {name: value for name, value in output.items() if name != "decoder_hidden_states"}
        return AlignedOutput(**kept, alignment=loss, alignment_contrast=contrast)
