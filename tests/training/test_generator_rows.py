"""training/generator/rows.py and generator_loss.py: which sequences come of clips, in which rows, and their losses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from generator_samples import SIZES, SPACE, write_tokens

from evatok_hf import EvatokForCausalLM, EvatokGeneratorConfig
from evatok_hf.data.token_dataset import TokenDataset
from evatok_hf.models.modeling_evatok_generator import SequenceCodec
from training.generator.loss import PackedLoss, to_batch
from training.generator.rows import PackedRows, Tasks, TokenRows


def all_sequences(rows: TokenRows, count: int) -> list[torch.Tensor]:
    return [sequence for _ in range(count) for row in rows.take().rows for sequence in row]


def describe(sequence: torch.Tensor, codec) -> tuple[int | None, bool]:
    """The class of a sequence and whether it has a condition."""
    label = int(sequence[1]) - codec.config.null_class_id - 1
    return (None if label < 0 else label), bool((sequence == codec.config.separator_token_id).any())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train", "00ff")


@pytest.fixture(scope="module")
def codec() -> SequenceCodec:
    return SequenceCodec(EvatokGeneratorConfig(codebook_size=64, class_names=["cat", "dog"], **SPACE, **SIZES))


def test_every_clip_comes_once_before_any_comes_again(tokens, codec):
    data = TokenDataset.load(tokens)
    rows = TokenRows(data, codec, 48, Tasks(label_dropout=0), 0, 1)
    sequences = all_sequences(rows, 200)
    clips = [tuple(codec.decode(sequence)[1].tolist()) for sequence in sequences]
    assert max(Counter(clips).values()) - min(Counter(clips).values()) <= 4 and len(Counter(clips)) == 20
    labels = {tuple(row.ids.tolist()): row.label for row in data}
    for sequence, clip in zip(sequences, clips, strict=True):
        assert describe(sequence, codec) == (None if labels[clip] < 0 else labels[clip], False)


def test_tasks_are_as_frequent_as_asked_for(tokens, codec):
    data = TokenDataset.load(tokens)

    def shares(**tasks: float) -> tuple[float, float]:
        """How many of the sequences of clips with a class have it, and how many of all have conditions."""
        rows, found = TokenRows(data, codec, 48, Tasks(**tasks), 0, 8), []
        labels = {tuple(row.ids.tolist()): row.label for row in data}
        for sequence in all_sequences(rows, 60):
            found.append((labels[tuple(codec.decode(sequence)[1].tolist())], *describe(sequence, codec)))
        labelled = [label is not None for known, label, _ in found if known >= 0]
        return np.mean(labelled), np.mean([conditioned for _, _, conditioned in found])

    assert shares(label_dropout=0.25) == pytest.approx((0.75, 0), abs=0.05)
    # Of frame prediction half lose the class, and a fifth all that they are given.
    mixed = shares(label_dropout=0, prediction=0.5, prediction_label_dropout=0.5, condition_dropout=0.2)
    assert mixed == pytest.approx((0.5 + 0.5 * 0.8 * 0.5, 0.5 * 0.8), abs=0.05)
    assert shares(prediction=1, prediction_label_dropout=1, condition_dropout=0) == (0, 1)
    assert shares(prediction=1, condition_dropout=1) == (0, 0)


def test_conditions_that_do_not_fit_are_left_out_and_counted(tokens, codec):
    data = TokenDataset.load(tokens)
    rows = TokenRows(data, codec, 24, Tasks(0, 1.0, 1.0, 0.0), 0, 500)
    taken = rows.take()
    lengths = data.counts() + data.condition_counts() + 3 + 2 + 2 + 1
    too_long = {tuple(data[int(i)].ids.tolist()) for i in np.flatnonzero(lengths > 24)}
    assert 0 < len(too_long) < 20
    without = 0
    for row in taken.rows:
        assert sum(map(len, row)) <= 24
        for sequence in row:
            label, conditioned = describe(sequence, codec)
            assert conditioned != (tuple(codec.decode(sequence)[1].tolist()) in too_long)
            without += not conditioned
    assert taken.too_long == without


def test_processes_share_the_rows_of_one(tokens, codec):
    data = TokenDataset.load(tokens)

    def make(count: int, rank: int, world_size: int) -> TokenRows:
        return TokenRows(data, codec, 48, Tasks(prediction=0.5), 0, count, rank, world_size)

    alone, two = make(4, 0, 1), [make(2, rank, 2) for rank in (0, 1)]
    for _ in range(3):
        expected = alone.take().rows
        shared = [row for rows in two for row in rows.take().rows]
        assert all(torch.equal(a, b) for x, y in zip(expected, shared, strict=True) for a, b in zip(x, y, strict=True))
    # A state of one process is that of two.
    two[1].load_state_dict(alone.state_dict())
    expected = alone.take().rows[2:]
    again = two[1].take().rows
    assert all(torch.equal(a, b) for x, y in zip(expected, again, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "split"])
def test_losses_are_those_of_each_sequence_by_itself(tokens, codec, implementation):
    torch.manual_seed(0)
    model = EvatokForCausalLM(codec.config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # so that attention is sharp and every leak shows
    taken = TokenRows(TokenDataset.load(tokens), codec, 48, Tasks(prediction=0.5), 0, 5).take()

    def losses(rows: list[list[torch.Tensor]], length: int, kind: str) -> torch.Tensor:
        model.set_attn_implementation(kind)
        return PackedLoss(model)(to_batch(PackedRows(rows), model.config, length, torch.device("cpu")))[0]

    packed = losses(taken.rows, 48, implementation)
    packed.mean().backward()
    gradient = model.lm_head.weight.grad.clone(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    alone = torch.cat([losses([[one]], len(one), "eager") for row in taken.rows for one in row])
    alone.mean().backward()
    assert torch.allclose(packed, alone, atol=1e-4) and torch.allclose(packed.mean(), alone.mean(), rtol=0, atol=1e-5)
    for made, expected in zip(gradient, (model.lm_head, model.model.layers[0].self_attn.k_proj), strict=True):
        assert torch.allclose(made, expected.weight.grad, atol=1e-5)
