"""The loss of generator training and the figures that it is told in."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from evatok_hf import EvatokForCausalLM, EvatokGeneratorConfig
from evatok_hf.data.packing import IGNORED, collate_rows
from evatok_hf.models.modeling_evatok_generator import TokenKind
from evatok_hf.tokenize.ahead import to_device
from training.generator import split_attention
from training.generator.rows import PackedRows

_KINDS = {"codes": TokenKind.CODE, "lengths": TokenKind.MARKER, "end": TokenKind.END}
_EVER = ("places", "sequences", "too_long")
Batch = dict[str, torch.Tensor | list[int] | None]


def to_batch(rows: PackedRows, config: EvatokGeneratorConfig, row_length: int, device: torch.device) -> Batch:
    """Packed rows as `PackedLoss` and `Tally` take them, on a device that nobody waits for.

    Returns:
        "input_ids" and "position_ids" (R, L); of the P predicted places, row after row, "places" in the flat rows from
        which each is predicted, and "targets", "kinds" and "blocks" of each; "counts" (4,): filled places, all places,
        sequences, and those too long for frame prediction; "packed_lengths" of split attention, else None.
    """
    batch = collate_rows(rows.rows, config, row_length)
    labels = batch.pop("labels").roll(-1, 1)
    labels[:, -1] = IGNORED
    places = (labels.flatten() != IGNORED).nonzero()[:, 0]
    kinds, blocks = (batch.pop(name).roll(-1, 1).flatten()[places] for name in ("kinds", "blocks"))
    batch |= {"places": places, "targets": labels.flatten()[places], "kinds": kinds, "blocks": blocks}
    lengths = [len(sequence) for row in rows.rows for sequence in row]
    counts = [sum(lengths), labels.numel(), len(lengths), rows.too_long]
    batch["counts"] = torch.tensor(counts, dtype=torch.float64)
    split = config._attn_implementation == split_attention.NAME
    return {
        **{name: to_device(tensor, device) for name, tensor in batch.items()},
        "packed_lengths": split_attention.packed_lengths(batch["position_ids"]) if split else None,
    }


class PackedLoss(nn.Module):
    """The generator with its loss, so that logits are only made where something is predicted."""

    def __init__(self, generator: EvatokForCausalLM):
        super().__init__()
        self.generator = generator

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of a batch of `to_batch` that has P predicted places.

        Returns:
            (P,) float32 cross-entropy of each predicted place, row after row; (P,) bool, whether the label was the
            most likely token.
        """
        split, position_ids, targets = batch["packed_lengths"], batch["position_ids"], batch["targets"]
        hidden = self.generator.model(
            input_ids=batch["input_ids"],
            attention_mask=self._mask(position_ids) if split is None else None,
            position_ids=position_ids,
            use_cache=False,
            packed_lengths=split,
            return_dict=True,
        ).last_hidden_state
        logits = self.generator.lm_head(hidden.flatten(0, 1)[batch["places"]])  # (P, V)
        return F.cross_entropy(logits.float(), targets, reduction="none"), logits.detach().argmax(-1) == targets

    def _mask(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(R, 1, L, L), what each place sees; transformers would wait for the device to find out whether rows are
        packed."""
        sequence = (position_ids == 0).cumsum(1)
        seen = (sequence[:, :, None] == sequence[:, None]).tril()[:, None]
        if self.generator.config._attn_implementation == "eager":  # adds it to the scores
            return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)
        return seen


class Tally:
    """Sums over places, from which means follow: by kind of token, and of codes by block.

    Args:
        num_blocks: T.
        device: of what is counted.

    Attributes:
        sums: since the last `clear`: loss of each name, places of each name, then right lengths, and the "counts" of
            batches.
    """

    def __init__(self, num_blocks: int, device: torch.device | str = "cpu"):
        self.names = [*_KINDS, *(f"block_{block + 1}" for block in range(num_blocks))]
        self.sums = torch.zeros(2 * len(self.names) + 5, dtype=torch.float64, device=device)
        self._ever = self.sums.new_zeros(len(_EVER))

    def count(self, losses: torch.Tensor, hits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The sums of one batch of `to_batch`, of which `PackedLoss` gave losses and hits."""
        kinds, blocks = batch["kinds"], batch["blocks"]
        groups = [kinds == kind for kind in _KINDS.values()]
        groups += [(kinds == TokenKind.CODE) & (blocks == block) for block in range(len(self.names) - len(_KINDS))]
        masks = torch.stack(groups).double()  # (names, P)
        right = (hits & groups[1]).sum().double()
        return torch.cat([masks @ losses.detach().double(), masks.sum(1), right[None], batch["counts"]])

    def add(self, sums: torch.Tensor) -> None:
        """Takes what `count` gave, summed over all processes."""
        self.sums += sums
        self._ever += torch.stack([self._places(sums)[: len(_KINDS)].sum(), sums[-2], sums[-1]])

    def ever(self) -> dict[str, int]:
        """Predicted places, sequences, and those that were too long for frame prediction, since the beginning."""
        return dict(zip(_EVER, map(int, self._ever), strict=True))

    def clear(self) -> None:
        self.sums.zero_()

    def values(self) -> dict[str, float]:
        """Mean loss over all predicted places ("total") and by name where there were any, in nats; the share of lengths
        that were the most likely token; the share of padding."""
        sums = self.sums.cpu()
        losses, places = sums[: len(self.names)], self._places(sums)
        total, count = losses[: len(_KINDS)].sum(), places[: len(_KINDS)].sum()
        by_name = zip(self.names, losses.tolist(), places.tolist(), strict=True)
        return {
            "total": float(total / count),
            **{name: loss / number for name, loss, number in by_name if number},
            "length_accuracy": float(sums[-5] / places[1]),
            "padding": float(1 - sums[-4] / sums[-3]),
        }

    def filled(self) -> tuple[int, int]:
        """Places that were no padding, and the sequences in them, since the last `clear`."""
        return int(self.sums[-4]), int(self.sums[-2])

    def state_dict(self) -> dict:
        return {"sums": self.sums, **self.ever()}

    def load_state_dict(self, state: dict) -> None:
        self.sums.copy_(state["sums"])
        self._ever = self.sums.new_tensor([state[name] for name in _EVER])

    def _places(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[len(self.names) : 2 * len(self.names)]
