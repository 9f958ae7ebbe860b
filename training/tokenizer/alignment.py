"""Alignment of the decoder's features with those of a frozen video network (paper, L_align).

Shapes: B clips; D width and (T, G, G) grid of the decoder; C width and (T', h, w) grid of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from evatok_hf import EvatokModel, EvatokOutput
from evatok_hf.models.configuration_evatok import LengthsLike

DIRECTIONS = ("teacher", "decoder")
Grid = tuple[int, int, int]


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
        if len(self.source_grid) != 3 or len(self.target_grid) != 3 or min(*self.source_grid, *self.target_grid) < 1:
            raise ValueError(f"grids must be three sizes of at least 1, got {self.source_grid}, {self.target_grid}.")
        pairs = list(zip(self.source_grid, self.target_grid, strict=True))
        self.resampled = tuple(a if a % b == 0 or b % a == 0 else b for a, b in pairs)
        self.merged = tuple(max(1, a // b) for a, b in zip(self.resampled, self.target_grid, strict=True))
        self.expanded = tuple(max(1, b // a) for a, b in zip(self.resampled, self.target_grid, strict=True))
        widths = [source_width * math.prod(self.merged), target_width * math.prod(self.expanded)]
        if hidden is None:
            self.project = nn.Linear(*widths)
        else:
            self.project = nn.Sequential(
                nn.Linear(widths[0], hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, widths[1]),
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, T', h, w, C) -> (B, T, g, g', D)."""
        if self.resampled != self.source_grid:
            x = features.movedim(-1, 1)  # (B, C, T', h, w)
            features = F.interpolate(x, self.resampled, mode="trilinear", align_corners=False).movedim(1, -1)
        cells = [size // k for size, k in zip(self.resampled, self.merged, strict=True)]
        x = features.unflatten(3, (cells[2], -1)).unflatten(2, (cells[1], -1)).unflatten(1, (cells[0], -1))
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
      the decoder's features to tell cells apart, work against that. `contrast` measures it.
    - "decoder", as REPA (Yu et al. 2024) and GigaTok have it: the decoder's features go through a perceptron (two
      hidden layers of 4 D, SiLU) to the teacher's width and grid. The target is fixed, so that a constant answer gets
      no further than the similarity of the teacher's features to their mean.

    Args:
        decoder_width, decoder_grid: D and (T, G, G).
        teacher_width, teacher_grid: C and (T', h, w), `width` and `grid` of a teacher.
        direction: "teacher" or "decoder".

    Raises:
        ValueError: grids that are none.
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
        self.direction = direction
        self.decoder_grid: Grid = tuple(decoder_grid)
        self.teacher_grid: Grid = tuple(teacher_grid)
        if direction == "teacher":
            self.bridge = GridBridge(teacher_width, teacher_grid, decoder_width, decoder_grid)
        else:
            self.bridge = GridBridge(decoder_width, decoder_grid, teacher_width, teacher_grid, 4 * decoder_width)

    def forward(self, decoder_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar in float32.

        Args:
            decoder_features: (B, T, G * G, D), one of a model's `decoder_hidden_states`.
            teacher_features: (B, T', h, w, C), a teacher's `grid_features`; no gradient reaches them.

        Raises:
            ValueError: features on other grids.
        """
        left, right = self._sides(decoder_features, teacher_features)
        return -F.cosine_similarity(left, right, dim=-1).mean()

    @torch.no_grad()
    def contrast(self, decoder_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
        """How much more alike features of the same cell are than of cells half the clip's cells apart; in [-2, 2].

        Near 0 with a loss near -1 means that the loss is met by features that say nothing.
        """
        left, right = self._sides(decoder_features, teacher_features)
        left, right = left.flatten(1, 3), right.flatten(1, 3)  # (B, cells, width)
        apart = right.roll(right.shape[1] // 2, dims=1)
        return (F.cosine_similarity(left, right, dim=-1) - F.cosine_similarity(left, apart, dim=-1)).mean()

    def _sides(self, decoder_features: torch.Tensor, teacher_features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        frames, height, width = self.decoder_grid
        if decoder_features.shape[1:3] != (frames, height * width):
            shape = tuple(decoder_features.shape)
            raise ValueError(f"the decoder's features must be (B, {frames}, {height * width}, D), got {shape}.")
        if teacher_features.shape[1:4] != self.teacher_grid:
            raise ValueError(
                f"the teacher's features must be on a grid {self.teacher_grid}, got {tuple(teacher_features.shape)}."
            )
        decoder = decoder_features.unflatten(2, (height, width))
        teacher = teacher_features.detach()
        if self.direction == "teacher":
            teacher = self.bridge(teacher)
        else:
            decoder = self.bridge(decoder)
        return decoder.float(), teacher.float()


@dataclass
class AlignedOutput(EvatokOutput):
    """Output of `AlignedTokenizer`.

    Attributes:
        alignment: the loss, with its gradient.
        alignment_contrast: see `AlignmentLoss.contrast`.
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
        self, video: torch.Tensor, lengths: LengthsLike | None = None, target: torch.Tensor | None = None
    ) -> EvatokOutput:
        """As `EvatokModel.forward`, with the alignment where there is something to align with.

        Args:
            target: (B, T', h, w, C), the teacher's `grid_features` of the clips; None: the tokenizer alone.
        """
        output = self.tokenizer(video, lengths, output_hidden_states=target is not None)
        if target is None:
            return output
        hidden = output.decoder_hidden_states[self.layer]  # (B, T, G^2, D)
        return AlignedOutput(
            **{name: value for name, value in output.items() if name != "decoder_hidden_states"},
            alignment=self.alignment(hidden, target),
            alignment_contrast=self.alignment.contrast(hidden, target),
        )
