"""Sequences for generator training from videos, tokenized on the way: views without end, and no tokens on disk."""

from __future__ import annotations

from collections.abc import Callable

import torch

from evatok_hf.data.packing import pack
from evatok_hf.data.streaming import to_float
from evatok_hf.models.modeling_evatok_generator import SequenceCodec
from evatok_hf.models.video_processing_evatok import hold_last_frame
from evatok_hf.tokenize.ahead import to_device
from training.common.clip_batches import ClipBatches
from training.common.draws import Draws
from training.generator.rows import PackedRows, Tasks, make_sequence, sequence_lengths
from training.tokenize_dataset import join_labels

Encode = Callable[[torch.Tensor], list[dict[str, torch.Tensor]]]


class ClipRows:
    """Packed rows of a stream of clips: the same number of clips each time, in as many rows as they need.

    Args:
        encode: clips (B, F, C, H, W) in [-1, 1] -> "lengths" and "ids" of each (`ClipTokens`).
        classes: the names that labels become numbers of.
        codec: of the generator.
        row_length: places of a row.
        tasks: the mix of tasks.
        known_frames: of the conditions of frame prediction; None without.
        draws: of the tasks.
        batches: of this process's clips; the state of their stream goes into checkpoints by itself.
        device: of the tokenizer.

    Raises:
        ValueError: rows that some clips would not fit in, frame prediction without known frames.
    """

    def __init__(
        self,
        encode: Encode,
        classes: list[str],
        codec: SequenceCodec,
        row_length: int,
        tasks: Tasks,
        known_frames: int | None,
        draws: Draws,
        batches: ClipBatches,
        device: torch.device,
    ):
        if tasks.prediction and known_frames is None:
            raise ValueError("--prediction needs --known_frames, how many frames of a clip are known.")
        longest, _ = sequence_lengths(codec.config, codec.space.max_tokens)
        if row_length < longest:
            raise ValueError(f"a clip may need {longest} places, --row_length is {row_length}; give it as much.")
        self.encode, self.classes, self.codec, self.batches = encode, classes, codec, batches
        self.row_length, self.tasks, self.known_frames, self.draws = row_length, tasks, known_frames, draws
        self.device = device
        self._taken = 0

    def take(self) -> PackedRows:
        """The next clips of this process, in rows."""
        batch = self.batches.take()
        labels = join_labels(batch, self.batches.stream.sources, self.classes).tolist()
        video = to_float(to_device(batch["pixel_values_videos"], self.device))
        generator, rows = self.draws.generator("tasks", self._taken), self.draws.rows(len(video))
        draws = torch.rand(3, self.draws.world_size * len(video), generator=generator)[:, rows].numpy()
        tokens = self.encode(video)
        wanted = (draws[0] < self.tasks.prediction).nonzero()[0]
        if len(wanted):
            held = hold_last_frame(video[wanted], self.known_frames)
            for index, condition in zip(wanted, self.encode(held), strict=True):
                tokens[index] |= {f"condition_{name}": value for name, value in condition.items()}
        counts = torch.tensor([[len(one["ids"]), len(one.get("condition_ids", ()))] for one in tokens]).numpy()
        plain, with_condition = sequence_lengths(self.codec.config, counts[:, 0], counts[:, 1])
        keeps_label, conditioned, too_long = self.tasks.draw(draws, with_condition <= self.row_length)
        sequences = [
            make_sequence(self.codec, label if keeps else -1, one, given)
            for label, keeps, one, given in zip(labels, keeps_label, tokens, conditioned, strict=True)
        ]
        packed = pack(map(len, sequences), self.row_length)
        self.batches.record()
        self._taken += 1
        return PackedRows([[sequences[index] for index in row] for row in packed], int(too_long.sum()))

    def state_dict(self) -> dict:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict) -> None:
        self._taken = state["taken"]
