"""packing.py: rows of several sequences, and that the generator sees none of them from another."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from evatok_hf import EvatokForCausalLM, EvatokGeneratorConfig
from evatok_hf.data.packing import collate_rows, pack
from evatok_hf.models.modeling_evatok_generator import Prompt, TokenKind

SMALL = {
    "codebook_size": 32,
    "block_lengths": [1, 2, 4, 8],
    "num_blocks": 3,
    "num_classes": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,  # so that attention is sharp and every leak shows
}
CLIPS = [([1, 2, 4], None), ([8, 1, 1], 3), ([4, 4, 2], 0), ([2, 8, 8], 1), ([1, 1, 1], 2)]


def make_config(**fields) -> EvatokGeneratorConfig:
    return EvatokGeneratorConfig(**{**SMALL, **fields})


def make_sequences(config: EvatokGeneratorConfig) -> list[torch.Tensor]:
    """Of clips of several lengths; the third has a condition."""
    generator, codec = torch.Generator().manual_seed(0), EvatokForCausalLM(config).codec

    def codes(lengths: list[int]) -> torch.Tensor:
        return torch.randint(32, (sum(lengths),), generator=generator)

    made = []
    for number, (lengths, label) in enumerate(CLIPS):
        prompt = Prompt(label)
        if number == 2:
            prompt.condition_lengths, prompt.condition_ids = torch.tensor([2, 1, 1]), codes([2, 1, 1])
        made.append(codec.encode(lengths, codes(lengths), prompt))
    return made


def test_rows_that_sequences_go_into():
    # 5 does not fit beside 6, where 4 fits without a gap; 2 and 3 are left for the other.
    assert pack([6, 5, 4, 2, 3, 10], 10) == [[0, 2], [1, 3, 4], [5]]
    # The fullest row in which it fits, not the first.
    assert pack([5, 7, 3], 10) == [[0], [1, 2]]
    # Of more open rows than the window, the fullest is closed: with 6, so that 4 comes beside 5.
    assert pack([5, 6, 4, 5], 10, window=1) == [[0, 2], [1], [3]]
    assert pack([], 10) == []


def test_every_sequence_is_in_one_row_and_rows_are_full():
    lengths = torch.randint(60, 140, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack(lengths, 520)
    assert sorted(index for row in rows for index in row) == list(range(2000))
    assert all(sum(lengths[index] for index in row) <= 520 and row == sorted(row) for row in rows)
    assert sum(lengths) > 0.9 * 520 * len(rows)
    assert rows == pack(lengths, 520)
    # Order is kept roughly: nothing comes much later than what was behind it.
    begun = [row[0] for row in rows]
    assert begun == sorted(begun) and max(max(row) - min(row) for row in rows) < 400


@pytest.mark.parametrize(("lengths", "message"), [([3, 11], "sequence 1 has 11 places, a row has 10"), ([0], "has 0")])
def test_sequences_that_fit_in_no_row(lengths, message):
    with pytest.raises(ValueError, match=message):
        pack(lengths, 10)
    config = make_config()
    with pytest.raises(ValueError, match="row 0 holds .* a row has 20"):
        collate_rows([make_sequences(config)], config, 20)


def test_a_batch():
    config = make_config()
    one, two, three = make_sequences(config)[:3]
    batch = collate_rows([[one, three], [two]], config, 40)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels", "kinds", "blocks"), (2, 40)
    )
    first, end = len(one), len(one) + len(three)
    assert torch.equal(batch["input_ids"][0, :first], one) and torch.equal(batch["input_ids"][0, first:end], three)
    assert (batch["input_ids"][0, end:] == config.pad_token_id).all()
    positions = [*range(len(one)), *range(len(three)), *range(40 - end)]
    assert batch["position_ids"][0].tolist() == positions
    # Predicted are lengths, codes and the end; neither prompt nor condition nor padding.
    predicted = batch["labels"] != -100
    assert predicted.sum() == sum(sum(lengths) + 3 + 1 for lengths, _ in CLIPS[:3])
    assert torch.equal(batch["labels"][predicted], batch["input_ids"][predicted])
    assert torch.equal(predicted, batch["kinds"] != TokenKind.PROMPT)
    assert not predicted[0, first] and not predicted[0, 0] and not predicted[0, end:].any()
    codes = batch["kinds"] == TokenKind.CODE
    counts = [((batch["blocks"] == block) & codes).sum(1).tolist() for block in range(3)]
    assert counts == [[1 + 4, 8], [2 + 4, 1], [4 + 2, 1]]
    assert (batch["blocks"][~predicted] == 3).all() and (batch["blocks"][batch["kinds"] == TokenKind.END] == 3).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4]], [[3]], [[2], [3]], [[0], [1, 4]]])
def test_packed_sequences_do_not_see_each_other(implementation, rows):
    config = make_config()
    sequences = make_sequences(config)
    torch.manual_seed(0)
    model = EvatokForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    batch = collate_rows([[sequences[index] for index in row] for row in rows], config, 64)
    with torch.no_grad():
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        losses = []
        for number, row in enumerate(rows):
            at = 0
            for index in row:
                sequence = sequences[index]
                alone = model(sequence[None], use_cache=False).logits[0]
                assert torch.allclose(logits[number, at : at + len(sequence)], alone, atol=1e-4)
                at += len(sequence)
                kinds, _ = model.codec.describe(sequence)
                places = (kinds[1:] != TokenKind.PROMPT).nonzero().flatten()
                losses.append(F.cross_entropy(alone[places], sequence[places + 1], reduction="none"))
        loss = model(
            batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"], use_cache=False
        ).loss
    assert float(loss) == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


def test_a_change_of_one_sequence_changes_no_other():
    config = make_config()
    sequences = make_sequences(config)
    model = EvatokForCausalLM(config).eval()
    batch = collate_rows([sequences], config, 90)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    first = len(sequences[0])
    changed["input_ids"][0, :first] = config.eos_token_id
    with torch.no_grad():
        before, after = (
            model(one["input_ids"], position_ids=one["position_ids"], use_cache=False).logits
            for one in (batch, changed)
        )
    assert torch.equal(before[0, first:], after[0, first:]) and not torch.equal(before[0, :first], after[0, :first])
