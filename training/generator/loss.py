"""The loss of generator training and the figures that it is told in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from evatok_hf import EvatokForCausalLM
from evatok_hf.data.packing import IGNORED
from evatok_hf.models.modeling_evatok_generator import TokenKind
from training.generator import split_attention
from training.generator.rows import PackedRows

_KINDS = {"codes": TokenKind.CODE, "lengths": TokenKind.MARKER, "end": TokenKind.END}


class PackedLoss(nn.Module):
    """The generator with its loss, so that logits are only made where something is predicted."""

    def __init__(self, generator: EvatokForCausalLM):
        super().__init__()
        self.generator = generator

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed rows of `collate_rows`, (R, L) each, with P predicted places.

        Returns:
            (P,) float32 cross-entropy of each predicted place, row after row; (P,) bool, whether the label was the
            most likely token.
        """
        model, more = self.generator.model, {}
        if self.generator.config._attn_implementation == split_attention.NAME:
            more["packed_lengths"] = split_attention.packed_lengths(position_ids)
        hidden = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **more).last_hidden_state
        predicted = labels[:, 1:] != IGNORED
        logits = self.generator.lm_head(hidden[:, :-1][predicted])  # (P, V)
        targets = labels[:, 1:][predicted]
        return F.cross_entropy(logits.float(), targets, reduction="none"), logits.detach().argmax(-1) == targets


class Tally:
    """Sums over places, from which means follow: by kind of token, and of codes by block.

    Args:
        num_blocks: T.

    Attributes:
        sums: since the last `clear`: loss of each name, places of each name, then right lengths, filled places, all
            places, sequences, and those too long for frame prediction.
        places, sequences, too_long: predicted places and sequences since the beginning.
    """

    def __init__(self, num_blocks: int):
        self.names = [*_KINDS, *(f"block_{block + 1}" for block in range(num_blocks))]
        self.sums = torch.zeros(2 * len(self.names) + 5, dtype=torch.float64)
        self.places = self.sequences = self.too_long = 0

    def count(
        self, losses: torch.Tensor, hits: torch.Tensor, batch: Mapping[str, torch.Tensor], rows: PackedRows
    ) -> torch.Tensor:
        """The sums of one batch.

        Args:
            losses, hits: of `PackedLoss`.
            batch: of `collate_rows`, on their device.
            rows: what it was made of.
        """
        predicted = batch["labels"][:, 1:] != IGNORED
        kinds, blocks = batch["kinds"][:, 1:][predicted], batch["blocks"][:, 1:][predicted]
        groups = [kinds == kind for kind in _KINDS.values()]
        groups += [(kinds == TokenKind.CODE) & (blocks == block) for block in range(len(self.names) - len(_KINDS))]
        masks = torch.stack(groups).double()  # (names, P)
        right = (hits & groups[1]).sum().double()
        others = masks.new_tensor([rows.filled, batch["labels"].numel(), rows.sequences, rows.too_long])
        return torch.cat([masks @ losses.detach().double(), masks.sum(1), right[None], others])

    def add(self, sums: torch.Tensor) -> None:
        """Takes what `count` gave, summed over all processes."""
        sums = sums.cpu()
        self.sums += sums
        self.places += int(self._places(sums)[: len(_KINDS)].sum())
        self.sequences += int(sums[-2])
        self.too_long += int(sums[-1])

    def clear(self) -> None:
        self.sums.zero_()

    def values(self) -> dict[str, float]:
        """Mean loss over all predicted places ("total") and by name where there were any, in nats; the share of lengths
        that were the most likely token; the share of padding."""
        losses, places = self.sums[: len(self.names)], self._places(self.sums)
        total, count = losses[: len(_KINDS)].sum(), places[: len(_KINDS)].sum()
        by_name = zip(self.names, losses.tolist(), places.tolist(), strict=True)
        return {
            "total": float(total / count),
            **{name: loss / number for name, loss, number in by_name if number},
            "length_accuracy": float(self.sums[-5] / places[1]),
            "padding": float(1 - self.sums[-4] / self.sums[-3]),
        }

    def filled(self) -> int:
        """Places that were no padding, since the last `clear`."""
        return int(self.sums[-4])

    def state_dict(self) -> dict:
        return {"sums": self.sums, **{name: getattr(self, name) for name in ("places", "sequences", "too_long")}}

    def load_state_dict(self, state: dict) -> None:
        self.sums = state["sums"].clone()
        self.places, self.sequences, self.too_long = (state[name] for name in ("places", "sequences", "too_long"))

    def _places(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[len(self.names) : 2 * len(self.names)]
