"""Sequences for generator training from videos, tokenized on the way: views without end, and no tokens on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from evatok_hf.data.packing import pack
from evatok_hf.data.streaming import to_float
from evatok_hf.models.modeling_evatok_generator import SequenceCodec
from evatok_hf.models.video_processing_evatok import hold_last_frame
from evatok_hf.tokenize.ahead import to_device
from training.common.clip_batches import ClipBatches
from training.common.draws import Draws
from training.generator.arguments import GeneratorArguments
from training.generator.rows import PackedRows, Tasks, make_sequence, sequence_lengths
from training.tokenize_dataset import join_labels

if TYPE_CHECKING:
    from training.generator.data import VideoData


class ClipRows:
    """Packed rows of a stream of clips: the same number of clips each time, in as many rows as they need.

    Args:
        data: the videos, with what makes tokens of them.
        codec: of the generator.
        row_length: places of a row.
        tasks: the mix of tasks.
        args: of the run.
        accelerator: of the run, whose processes take clips of their own.

    Raises:
        ValueError: rows that some clips would not fit in, frame prediction without known frames.
    """

    def __init__(
        self,
        data: VideoData,
        codec: SequenceCodec,
        row_length: int,
        tasks: Tasks,
        args: GeneratorArguments,
        accelerator: Accelerator,
    ):
        if tasks.prediction and args.known_frames is None:
            raise ValueError("--prediction needs --known_frames, how many frames of a clip are known.")
        longest, _ = sequence_lengths(codec.config, codec.space.max_tokens)
        if row_length < longest:
            raise ValueError(f"a clip may need {longest} places, --row_length is {row_length}; give it as much.")
        self.data, self.codec, self.row_length, self.tasks = data, codec, row_length, tasks
        self.known_frames, self.device = args.known_frames, accelerator.device
        self.draws = Draws(args.seed, accelerator.process_index, accelerator.num_processes)
        self.batches = ClipBatches(data.stream, args.batch_size, args.num_workers)
        self._taken = 0

    def take(self) -> PackedRows:
        """The next clips of this process, in rows."""
        batch = self.batches.take()
        labels = join_labels(batch, self.data.stream.sources, self.data.classes).tolist()
        video = to_float(to_device(batch["pixel_values_videos"], self.device))
        generator, rows = self.draws.generator("tasks", self._taken), self.draws.rows(len(video))
        draws = torch.rand(3, self.draws.world_size * len(video), generator=generator)[:, rows].numpy()
        tokens = self.data.encode(video)
        wanted = (draws[0] < self.tasks.prediction).nonzero()[0]
        if len(wanted):
            held = hold_last_frame(video[wanted], self.known_frames)
            for index, condition in zip(wanted, self.data.encode(held), strict=True):
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
