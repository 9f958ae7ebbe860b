"""The block grammar: only what can become a video may be generated."""

from __future__ import annotations

import pytest
import torch
from generator_samples import SMALL

from evatok_hf import EvatokGeneratorConfig
from evatok_hf.models.modeling_evatok_generator import BlockGrammar, SequenceCodec


def config(layout: str = "length-first") -> EvatokGeneratorConfig:
    return EvatokGeneratorConfig(**{**SMALL, "layout": layout})


def allowed_after(c: EvatokGeneratorConfig, sequence: list[int], **options) -> list[set[int]]:
    """What may follow each token of a sequence, for one row that begins at its prompt."""
    grammar, found = BlockGrammar(c, 1, **options), []
    ids = torch.tensor([[c.bos_token_id, c.null_class_id]])
    for token in [None, *sequence]:
        ids = ids if token is None else torch.cat([ids, torch.tensor([[token]])], dim=1)
        found.append(set(grammar.advance(ids)[0].nonzero()[:, 0].tolist()))
    return found


def test_lengths_first_step_by_step():
    c = config()
    codes, lengths = set(range(32)), {32, 33, 34}
    two = c.first_marker_id
    steps = allowed_after(c, [two, 0, 1, two, 5, 5, two, 9, 9, c.eos_token_id])
    expected = [lengths, codes, codes, lengths, codes, codes, lengths, codes, codes, {c.eos_token_id}, {c.pad_token_id}]
    assert steps == expected


def test_end_of_block_may_come_only_at_a_candidate_and_must_at_the_longest():
    c = config("end-of-block")
    codes, stop = set(range(32)), {c.first_marker_id}
    steps = allowed_after(c, [0] * 8)
    # after 2 and 4 codes the block may end, after 8 it must
    assert steps == [codes, codes, codes | stop, codes, codes | stop, codes, codes, codes, stop]
    whole = ([0, 0, c.first_marker_id] * 3)[:9]
    assert allowed_after(c, [*whole, c.eos_token_id])[-2:] == [{c.eos_token_id}, {c.pad_token_id}]


@pytest.mark.parametrize("layout", ["length-first", "end-of-block"])
@pytest.mark.parametrize("budget", [6, 7, 8, 10, 13, 24])
def test_a_budget_is_never_passed_and_leaves_room_for_later_blocks(layout, budget):
    c = config(layout)
    totals = set()
    for seed in range(30):
        rng = torch.Generator().manual_seed(seed)
        grammar, ids = BlockGrammar(c, 1, budget=budget), torch.tensor([[c.bos_token_id, c.null_class_id]])
        while ids[0, -1] != c.eos_token_id:
            choices = grammar.advance(ids)[0].nonzero()[:, 0]
            assert len(choices)
            ids = torch.cat([ids, choices[torch.randint(len(choices), (1,), generator=rng)][None]], dim=1)
        totals.add(int(SequenceCodec(c).decode(ids[0])[0].sum()))
    assert max(totals) <= budget
    if layout == "length-first" and budget in (6, 8, 10):  # the budget is used up where chance allows
        assert max(totals) == budget


def test_rows_are_independent():
    c = config()
    both = torch.tensor([[c.bos_token_id, c.null_class_id]] * 2)
    grammar = BlockGrammar(c, 2, lengths=[[2, 2, 2], [8, 2, 2]])
    first = grammar.advance(both)
    assert [row.nonzero()[:, 0].tolist() for row in first] == [[32], [34]]


def test_a_block_may_be_left_free_with_0():
    c = config()
    steps = allowed_after(c, [33, 1, 1, 1, 1], lengths=[4, 0, 2])
    assert steps[0] == {33} and steps[5] == {32, 33, 34}


def test_what_cannot_be_kept_to_is_refused():
    c = config()
    for options, message in (
        ({"lengths": [2, 3, 4]}, "not among the candidates"),
        ({"lengths": [2, 2]}, "3 temporal blocks"),
        ({"budget": 5}, "at least 6"),
        ({"budget": -1}, "at least 6"),
        ({"budget": 11, "lengths": [8, 0, 2]}, "at least 12"),
        ({"max_block_length": 1}, "shortest block has 2"),
        ({"max_block_length": 4, "lengths": [8, 2, 2]}, "contradict"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockGrammar(c, 1, **options)
    grammar = BlockGrammar(c, 1)
    grammar.advance(torch.tensor([[35, 39]]))
    with pytest.raises(ValueError, match="token by token"):
        grammar.advance(torch.tensor([[35, 39]]))
