"""Sequences for generator training from videos, tokenized on the way: views without end, and no tokens on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from evatok_hf.data.packing import pack
from evatok_hf.data.streaming import ClipStream, collate, merge, to_float
from evatok_hf.models.modeling_evatok_generator import SequenceCodec
from evatok_hf.models.video_processing_evatok import hold_last_frame
from training.common.draws import Draws
from training.generator.rows import PackedRows, Tasks, make_sequence, sequence_lengths
from training.tokenize_dataset import join_labels

Encode = Callable[[torch.Tensor], list[dict[str, torch.Tensor]]]


class ClipRows:
    """Packed rows of a stream of clips: the same number of clips each time, in as many rows as they need.

    Args:
        stream: of this process's clips; its state goes into checkpoints by itself.
        encode: clips (B, F, C, H, W) in [-1, 1] -> "lengths" and "ids" of each (`ClipTokens`).
        classes: the names that labels become numbers of.
        codec: of the generator.
        row_length: places of a row.
        tasks: the mix of tasks.
        known_frames: of the conditions of frame prediction; None without.
        draws: of the tasks.
        batch_size: clips of this process at once.
        num_workers: loader processes of this process; each gives an equal part of every batch.
        device: of the tokenizer.

    Raises:
        ValueError: rows that some clips would not fit in, frame prediction without known frames.
    """

    def __init__(
        self,
        stream: ClipStream,
        encode: Encode,
        classes: list[str],
        codec: SequenceCodec,
        row_length: int,
        tasks: Tasks,
        known_frames: int | None,
        draws: Draws,
        batch_size: int,
        num_workers: int,
        device: torch.device,
    ):
        if tasks.prediction and known_frames is None:
            raise ValueError("--prediction needs --known_frames, how many frames of a clip are known.")
        longest = 3 + codec.space.max_tokens + codec.space.num_blocks
        if row_length < longest:
            raise ValueError(f"a clip may need {longest} places, --row_length is {row_length}; give it as much.")
        self.stream, self.encode, self.classes, self.codec = stream, encode, classes, codec
        self.row_length, self.tasks, self.known_frames, self.draws = row_length, tasks, known_frames, draws
        self.readers, self.device = max(1, num_workers), device
        self.loader = DataLoader(stream, batch_size // self.readers, num_workers=num_workers, collate_fn=collate)
        self._parts: Iterator[dict[str, Any]] | None = None
        self._taken = 0

    def take(self) -> PackedRows:
        """The next clips of this process, in rows."""
        if self._parts is None:  # after a checkpoint has been loaded
            self._parts = iter(self.loader)
        parts = [next(self._parts) for _ in range(self.readers)]
        batch = merge(parts)
        labels = join_labels(batch, self.stream.sources, self.classes).tolist()
        video = to_float(batch["pixel_values_videos"].to(self.device))
        generator, rows = self.draws.generator("tasks", self._taken), self.draws.rows(len(video))
        draws = torch.rand(3, self.draws.world_size * len(video), generator=generator)[:, rows].numpy()
        tokens = self.encode(video)
        wanted = (draws[0] < self.tasks.prediction).nonzero()[0]
        if len(wanted):
            held = hold_last_frame(video[wanted], self.known_frames)
            for index, condition in zip(wanted, self.encode(held), strict=True):
                tokens[index] |= {f"condition_{name}": value for name, value in condition.items()}
        counts = torch.tensor([[len(one["ids"]), len(one.get("condition_ids", ()))] for one in tokens]).numpy()
        plain, with_condition = sequence_lengths(counts[:, 0], counts[:, 1], self.codec.config.num_blocks)
        keeps_label, conditioned, too_long = self.tasks.draw(draws, with_condition <= self.row_length)
        sequences = [
            make_sequence(self.codec, label if keeps else -1, one, given)
            for label, keeps, one, given in zip(labels, keeps_label, tokens, conditioned, strict=True)
        ]
        packed = pack(map(len, sequences), self.row_length)
        for part in parts:
            self.stream.record(part)
        self._taken += 1
        return PackedRows([[sequences[index] for index in row] for row in packed], int(too_long.sum()))

    def state_dict(self) -> dict:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict) -> None:
        self._taken = state["taken"]
