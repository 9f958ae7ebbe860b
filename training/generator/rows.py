"""The sequences that a generator is trained on: which clip comes as which task, and in which row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from evatok_hf.data.packing import pack
from evatok_hf.data.token_dataset import TokenDataset
from evatok_hf.models.configuration_evatok import EvatokGeneratorConfig
from evatok_hf.models.modeling_evatok_generator import Prompt, SequenceCodec

_CHUNK = 4096  # sequences that are drawn and packed together


@dataclass(frozen=True)
class Tasks:
    """The mix of tasks that clips become sequences of.

    A clip is class-to-video, `BOS class clip EOS`, or with probability `prediction` frame prediction, `BOS class
    condition SEP clip EOS`. The first loses its class with probability `label_dropout`, the second with
    `prediction_label_dropout`. With probability `condition_dropout` the second loses condition and class both, since
    guidance compares with neither.
    """

    label_dropout: float = 0.1
    prediction: float = 0.0
    prediction_label_dropout: float = 0.5
    condition_dropout: float = 0.1

    def draw(self, draws: np.ndarray, fits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws the task of each clip.

        Args:
            draws: (3, n), uniform in [0, 1).
            fits: (n,) bool, whether the clip fits in a row with its condition; if not, it is class-to-video.

        Returns:
            (n,) bool each: whether it keeps its class; whether it has its condition; whether it was to be frame
            prediction and does not fit.
        """
        task, label, condition = draws
        wanted = task < self.prediction
        predicted = wanted & fits
        dropped = predicted & (condition < self.condition_dropout)
        keeps = label >= np.where(predicted, self.prediction_label_dropout, self.label_dropout)
        return keeps & ~dropped, predicted & ~dropped, wanted & ~fits


def sequence_lengths(
    config: EvatokGeneratorConfig, counts: np.ndarray | int, condition_counts: np.ndarray | None = None
) -> tuple[np.ndarray | int, np.ndarray | None]:
    """Places of the sequences of clips with so many codes: without and with conditions (None where there are none)."""
    plain = 2 + config.clip_places(counts)  # BOS and class come before
    return plain, None if condition_counts is None else plain + config.clip_places(condition_counts)


class PackedRows(NamedTuple):
    """Rows of whole sequences, as `collate_rows` takes them.

    Attributes:
        rows: the sequences of each.
        too_long: how many of them were to be frame prediction and did not fit in a row.
    """

    rows: list[list[torch.Tensor]]
    too_long: int = 0


class TokenRows:
    """Packed rows of a token data set without end, functions of (seed, number of the row).

    All clips come once before any comes again, each epoch in another order. Each process takes its own rows of those
    that are next for all, so that what is trained on depends only on how many rows a step has in all.

    Args:
        data: the tokens.
        codec: of the generator.
        row_length: places of a row.
        tasks: the mix of tasks.
        seed: of order and tasks.
        count: rows that a process takes at once.
        rank, world_size: which of how many processes this is.

    Raises:
        ValueError: an empty data set, a clip that does not fit in a row, frame prediction without conditions.
    """

    def __init__(
        self,
        data: TokenDataset,
        codec: SequenceCodec,
        row_length: int,
        tasks: Tasks,
        seed: int,
        count: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        if len(data) == 0:
            raise ValueError(f"{data.folder} holds no clips to train on.")
        if tasks.prediction:
            check_conditions(data)
        self.data, self.codec, self.row_length, self.tasks, self.seed = data, codec, row_length, tasks, seed
        self.count, self.rank, self.world_size = count, rank, world_size
        self._plain, self._with_condition = sequence_lengths(codec.config, data.counts(), data.condition_counts())
        if self._plain.max() > row_length:
            raise ValueError(
                f"the longest clip needs {self._plain.max()} places, --row_length is {row_length}; give it as much."
            )
        self._number, self._row = 0, 0  # where the next row comes from: chunk, row of it
        self._chunk: list[list[tuple[int, bool, bool, bool]]] | None = None

    def take(self) -> PackedRows:
        """The next rows of this process; those of the others are passed over."""
        rows = [self._next() for _ in range(self.count * self.world_size)]
        mine = rows[self.rank * self.count : (self.rank + 1) * self.count]
        too_long = sum(missed for row in mine for *_, missed in row)
        return PackedRows([[self._sequence(*drawn) for *drawn, _ in row] for row in mine], too_long)

    def state_dict(self) -> dict:
        return {"settings": self._settings(), "chunk": self._number, "row": self._row}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where the state was taken. Raises ValueError for one of other tokens, seed, tasks or rows."""
        if state["settings"] != self._settings():
            raise ValueError(
                f"the checkpoint was trained on rows of {state['settings']}, this run has {self._settings()}; resume "
                "with the settings it was made with."
            )
        self._number, self._row, self._chunk = state["chunk"], state["row"], None

    def _settings(self) -> dict:
        return {"clips": len(self.data), "row_length": self.row_length, "seed": self.seed, "tasks": vars(self.tasks)}

    def _next(self) -> list[tuple[int, bool, bool, bool]]:
        if self._chunk is None:
            self._chunk = self._draw(self._number)
        if self._row == len(self._chunk):
            self._number, self._row = self._number + 1, 0
            self._chunk = self._draw(self._number)
        self._row += 1
        return self._chunk[self._row - 1]

    def _draw(self, number: int) -> list[list[tuple[int, bool, bool, bool]]]:
        """Rows of clips: of each its index, whether it keeps its class, has its condition, or was too long for one."""
        clips = np.concatenate(list(self._order(number * _CHUNK, (number + 1) * _CHUNK)))
        with_condition = self._plain if self._with_condition is None else self._with_condition
        draws = np.random.default_rng([self.seed, 1, number]).random((3, _CHUNK))
        keeps_label, conditioned, too_long = self.tasks.draw(draws, with_condition[clips] <= self.row_length)
        lengths = np.where(conditioned, with_condition[clips], self._plain[clips])
        columns = (clips, keeps_label, conditioned, too_long)
        drawn = list(zip(*(column.tolist() for column in columns), strict=True))
        return [[drawn[index] for index in row] for row in pack(lengths.tolist(), self.row_length)]

    def _order(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Clips number `first` to `last` of all epochs one after the other."""
        count = len(self.data)
        for epoch in range(first // count, (last - 1) // count + 1):
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(count)
            yield order[max(0, first - epoch * count) : last - epoch * count]

    def _sequence(self, clip: int, keeps_label: bool, conditioned: bool) -> torch.Tensor:
        row = self.data[clip]
        return make_sequence(self.codec, row.label if keeps_label else -1, vars(row), conditioned)


def check_conditions(data: TokenDataset) -> None:
    """Raises ValueError for tokens without conditions."""
    if data.condition_counts() is None:
        raise ValueError(f"{data.folder} has no conditions, which --prediction needs; make tokens with --known_frames.")


def make_sequence(
    codec: SequenceCodec, label: int, tokens: Mapping[str, torch.Tensor | None], conditioned: bool
) -> torch.Tensor:
    """The sequence of a clip.

    Args:
        codec: of the generator.
        label: of its class, -1 for none.
        tokens: "lengths" and "ids", "condition_lengths" and "condition_ids".
        conditioned: whether it is given its condition.
    """
    prompt = Prompt(None if label < 0 else label)
    if conditioned:
        prompt.condition_lengths, prompt.condition_ids = tokens["condition_lengths"], tokens["condition_ids"]
    return codec.encode(tokens["lengths"], tokens["ids"], prompt)
