"""Sources of a generator's training sequences: tokens on disk, or videos that are tokenized on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from evatok_hf import EvatokModel, VideoTokenizer
from evatok_hf.data.packing import pack
from evatok_hf.data.streaming import ClipStream, to_float
from evatok_hf.data.token_dataset import TokenDataset
from evatok_hf.models.modeling_evatok_generator import SequenceCodec
from evatok_hf.models.video_processing_evatok import check_known_frames, hold_last_frame
from evatok_hf.tokenize.ahead import to_device
from evatok_hf.tokenize.clip_tokens import ClipTokens
from training.common.clip_batches import ClipBatches
from training.common.draws import Draws
from training.generator.arguments import GeneratorArguments
from training.generator.rows import PackedRows, Tasks, TokenRows, check_conditions, make_sequence, sequence_lengths
from training.tokenize_dataset import join_classes, join_labels

# What tokens must have in common with other tokens, or with a generator.
VOCABULARY = ("codebook_size", "block_lengths", "num_blocks", "tokenizer_fingerprint")


class TokenData:
    """A data set of tokens.

    Args:
        name: its folder, or id on the Hub.
        args: of the run.
        accelerator: of the run, whose processes take rows of their own.

    Attributes:
        data: the tokens.
        facts: what a generator's configuration takes over.
        summary: what is noted of them beside the generator.
        stream, tokenizer: None; of videos there are some.

    Raises:
        ValueError: as `TokenDataset.load`.
    """

    stream: ClipStream | None = None
    tokenizer: EvatokModel | None = None

    def __init__(self, name: str, args: GeneratorArguments, accelerator: Accelerator):
        self.data = data = TokenDataset.load(name)
        self.args, self.accelerator, self.summary = args, accelerator, data.summary
        strides = data.summary.get("strides", [])
        rates = {round(data[int(i)].fps, 3) for i in np.linspace(0, len(data) - 1, min(64, len(data)))}
        self.facts: dict[str, Any] = {
            **{name: data.summary[name] for name in (*VOCABULARY, "known_frames")},
            "fps": round(rates.pop() / strides[0], 3) if len(rates) == len(strides) == 1 else None,
            "class_names": data.classes or None,
            "num_classes": len(data.classes) or int(data.labels().max()) + 1,
        }

    def check_alike(self, facts: dict[str, Any]) -> None:
        """Raises ValueError unless the tokens are of the tokenizer and classes that a generator is trained with, and
        have conditions where the run predicts frames."""
        for name in (*VOCABULARY, "class_names"):
            if facts[name] != self.facts[name]:
                raise ValueError(
                    f"{self.data.folder} has {name} {self.facts[name]}, training has {facts[name]}; make both with the "
                    "same tokenizer, from folders with the same classes."
                )
        if self.args.prediction:
            check_conditions(self.data)

    def rows(self, codec: SequenceCodec, row_length: int, tasks: Tasks) -> TokenRows:
        """Raises ValueError as `TokenRows`."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        return TokenRows(self.data, codec, row_length, tasks, self.args.seed, self.args.rows, rank, world_size)

    def epochs(self, sequences: int) -> float:
        """The passes over all clips that so many sequences make."""
        return sequences / len(self.data)


class ClipRows:
    """Packed rows of a stream of clips: the same number of clips each time, in as many rows as they need.

    Args:
        data: the videos, with what makes tokens of them.
        codec: of the generator.
        row_length: places of a row.
        tasks: the mix of tasks.

    Raises:
        ValueError: rows that some clips would not fit in, frame prediction without known frames.
    """

    def __init__(self, data: VideoData, codec: SequenceCodec, row_length: int, tasks: Tasks):
        args, accelerator = data.args, data.accelerator
        if tasks.prediction and args.known_frames is None:
            raise ValueError("--prediction needs --known_frames, how many frames of a clip are known.")
        longest, _ = sequence_lengths(codec.config, codec.space.max_tokens)
        if row_length < longest:
            raise ValueError(f"a clip may need {longest} places, --row_length is {row_length}; give it as much.")
        self.data, self.codec, self.row_length, self.tasks = data, codec, row_length, tasks
        self.draws = Draws(args.seed, accelerator.process_index, accelerator.num_processes)
        self.batches = ClipBatches(data.stream, args.batch_size, args.num_workers)
        self._taken = 0

    def take(self) -> PackedRows:
        """The next clips of this process, in rows."""
        batch = self.batches.take()
        labels = join_labels(batch, self.data.stream.sources, self.data.classes).tolist()
        video = to_float(to_device(batch["pixel_values_videos"], self.data.accelerator.device))
        generator, rows = self.draws.generator("tasks", self._taken), self.draws.rows(len(video))
        draws = torch.rand(3, self.draws.world_size * len(video), generator=generator)[:, rows].numpy()
        tokens = self.data.encode(video)
        wanted = (draws[0] < self.tasks.prediction).nonzero()[0]
        if len(wanted):
            held = hold_last_frame(video[wanted], self.data.args.known_frames)
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


class VideoData:
    """Videos with the tokenizer that makes tokens of them; attributes and methods as of `TokenData`.

    Raises:
        ValueError: as `VideoTokenizer`, `ClipStream` and `ClipTokens`; known frames out of range.
    """

    def __init__(self, args: GeneratorArguments, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        tokenizer = VideoTokenizer.from_pretrained(args.tokenizer, device=str(accelerator.device))
        self.tokenizer, config = tokenizer.model, tokenizer.model.config
        if args.known_frames is not None:
            check_known_frames(args.known_frames, config.num_frames)
        allocation = args.allocation().bind(self.tokenizer, tokenizer.router)
        self.encode = ClipTokens(allocation)
        self.stream = args.stream(args.clip_config(config), accelerator)
        self.classes = join_classes(self.stream.sources)
        self.facts: dict[str, Any] = {
            "codebook_size": config.codebook_size,
            "block_lengths": list(config.block_lengths),
            "num_blocks": config.num_blocks,
            "tokenizer_fingerprint": self.tokenizer.fingerprint(),
            "known_frames": args.known_frames,
            "fps": None,
            "class_names": self.classes or None,
            "num_classes": len(self.classes),
        }
        self.summary = {**self.facts, "sources": args.train_data, **allocation.describe()}

    def rows(self, codec: SequenceCodec, row_length: int, tasks: Tasks) -> ClipRows:
        """Raises ValueError as `ClipRows`."""
        return ClipRows(self, codec, row_length, tasks)

    def epochs(self, sequences: int) -> float:
        return float(self.stream.epoch)
