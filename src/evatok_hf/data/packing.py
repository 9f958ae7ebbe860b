"""Several sequences in a row of fixed length, without attention from one to another.

Their position ids begin anew at 0. Without an attention mask transformers takes that as packed rows and builds the
block-causal mask itself, for its implementations "sdpa" and "eager".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..models.configuration_evatok import EvatokGeneratorConfig
from ..models.modeling_evatok_generator import SequenceCodec, TokenKind

IGNORED = -100  # the label of places that are not predicted


def pack(lengths: Iterable[int], row_length: int, window: int = 32) -> list[list[int]]:
    """Puts each sequence, in order, into the fullest open row in which it fits, or else into a new one.

    Args:
        lengths: of the sequences.
        row_length: of the rows.
        window: rows that are open at once. When there is one more, the fullest is closed; so a sequence comes near its
            place in the order.

    Returns:
        The rows, in the order in which they were begun: indices of their sequences, ascending.

    Raises:
        ValueError: a sequence that is empty, or longer than a row.
    """
    rows: list[list[int]] = []
    room: dict[int, int] = {}  # free places of the open rows
    for index, length in enumerate(lengths):
        if not 1 <= length <= row_length:
            raise ValueError(f"sequence {index} has {length} places, a row has {row_length}.")
        fitting = [row for row, free in room.items() if free >= length]
        if fitting:
            row = min(fitting, key=room.__getitem__)
            rows[row].append(index)
            room[row] -= length
        else:
            row = len(rows)
            rows.append([index])
            room[row] = row_length - length
        if not room[row]:
            del room[row]
        elif len(room) > window:
            del room[min(room, key=room.__getitem__)]
    return rows


def collate_rows(
    rows: Sequence[Sequence[torch.Tensor]], config: EvatokGeneratorConfig, row_length: int
) -> dict[str, torch.Tensor]:
    """A batch of packed rows.

    Args:
        rows: R rows of whole sequences (`SequenceCodec.encode`).
        config: of the generator.
        row_length: L.

    Returns:
        Five (R, L) int64: "input_ids"; "position_ids", from 0 in each sequence and in the padding after the last;
        "labels", the ids of places that are predicted (lengths, codes, EOS) and -100 elsewhere, to be shifted by the
        model; "kinds" (`TokenKind`) and "blocks" (T outside blocks) of all places.

    Raises:
        ValueError: a row that holds more than `row_length` places, or something else than whole sequences.
    """
    codec, shape = SequenceCodec(config), (len(rows), row_length)
    batch = {
        "input_ids": torch.full(shape, config.pad_token_id),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED),
        "kinds": torch.full(shape, int(TokenKind.PROMPT)),
        "blocks": torch.full(shape, config.num_blocks),
    }
    for number, row in enumerate(rows):
        at = 0
        for sequence in row:
            places = slice(at, at + len(sequence))
            at += len(sequence)
            if at > row_length:
                raise ValueError(f"row {number} holds {at} places or more, a row has {row_length}.")
            kinds, blocks = codec.describe(sequence)
            batch["input_ids"][number, places] = sequence
            batch["position_ids"][number, places] = torch.arange(len(sequence))
            batch["labels"][number, places] = sequence.where(kinds != TokenKind.PROMPT, IGNORED)
            batch["kinds"][number, places] = kinds
            batch["blocks"][number, places] = blocks
        batch["position_ids"][number, at:] = torch.arange(row_length - at)
    return batch
