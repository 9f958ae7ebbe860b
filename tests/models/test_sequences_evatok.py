"""Clips as sequences of the generator's vocabulary, and back."""

from __future__ import annotations

import pytest
import torch
from generator_samples import SMALL, random_ids

from evatok_hf import EvatokGeneratorConfig, VideoTokens
from evatok_hf.models.modeling_evatok_generator import Prompt, SequenceCodec, TokenKind

LAYOUTS = ["length-first", "end-of-block"]


def codec(layout: str = "length-first", **overrides) -> SequenceCodec:
    return SequenceCodec(EvatokGeneratorConfig(**{**SMALL, "layout": layout, **overrides}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_625_assignments_come_back_exactly(layout):
    made = codec(layout, block_lengths=[8, 16, 32, 64, 128], num_blocks=4, codebook_size=1024)
    for index, lengths in enumerate(made.space.all()):
        ids = random_ids(lengths, 1024, index)
        sequence = made.encode(lengths, ids, Prompt(label=index % 2))
        assert len(sequence) == 2 + len(ids) + 4 + 1
        again, codes = made.decode(sequence)
        assert torch.equal(again, lengths) and torch.equal(codes, ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_condition_comes_before_the_clip_and_is_not_part_of_it(layout):
    made, lengths, before = codec(layout), torch.tensor([2, 8, 4]), torch.tensor([4, 2, 2])
    ids, condition = random_ids(lengths), random_ids(before, seed=1)
    sequence = made.encode(lengths, ids, Prompt(1, before, condition))
    assert [x.tolist() for x in made.decode(sequence)] == [lengths.tolist(), ids.tolist()]
    prompt = made.prompt(Prompt(1, before, condition))
    assert torch.equal(sequence[: len(prompt)], prompt) and prompt[-1] == made.config.separator_token_id


def test_the_two_layouts_written_out():
    lengths, ids = [2, 2, 4], torch.tensor([10, 11, 20, 21, 28, 29, 30, 31])
    first, end = codec("length-first"), codec("end-of-block")
    c = first.config
    two, four = c.first_marker_id, c.first_marker_id + 1
    assert first.encode(lengths, ids, Prompt(0)).tolist() == [
        *(c.bos_token_id, c.class_id(0)),
        *(two, 10, 11, two, 20, 21, four, 28, 29, 30, 31, c.eos_token_id),
    ]
    c = end.config
    stop = c.first_marker_id
    assert end.encode(lengths, ids).tolist() == [
        *(c.bos_token_id, c.null_class_id),
        *(10, 11, stop, 20, 21, stop, 28, 29, 30, 31, stop, c.eos_token_id),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_describe_says_what_each_place_is(layout):
    made = codec(layout)
    lengths = torch.tensor([2, 4, 2])
    kinds, blocks = made.describe(made.encode(lengths, random_ids(lengths), Prompt(0, lengths, random_ids(lengths))))
    assert [int((kinds == kind).sum()) for kind in TokenKind] == [2 + 11 + 1, 3, 8, 1]
    codes = kinds == TokenKind.CODE
    assert blocks[codes].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert blocks[kinds == TokenKind.MARKER].tolist() == [0, 1, 2]
    assert set(blocks[(kinds == TokenKind.PROMPT) | (kinds == TokenKind.END)].tolist()) == {3}


def test_padding_on_either_side_is_ignored():
    made, lengths = codec(), torch.tensor([2, 2, 2])
    pad = torch.full((3,), made.config.pad_token_id)
    sequence = torch.cat([pad, made.encode(lengths, random_ids(lengths)), pad])
    assert torch.equal(made.decode(sequence)[1], random_ids(lengths))


def test_video_tokens_there_and_back():
    made = codec(tokenizer_fingerprint="0123456789abcdef")
    lengths = torch.tensor([[2, 4, 8], [8, 2, 2]])
    tokens = VideoTokens(ids=random_ids(lengths), lengths=lengths)
    sequences = made.from_tokens(tokens, [0, None])
    assert [int(sequence[1]) for sequence in sequences] == [made.config.class_id(0), made.config.null_class_id]
    again = made.to_tokens(sequences)
    assert torch.equal(again.ids, tokens.ids) and torch.equal(again.lengths, lengths)
    assert again.fingerprint == "0123456789abcdef"
    with pytest.raises(ValueError, match="2 clips but 1 labels"):
        made.from_tokens(tokens, [0])


def test_what_is_no_clip_is_refused():
    made = codec()
    for lengths, ids, message in (
        ([2, 3, 4], torch.zeros(9, dtype=torch.int64), "not among the candidates"),
        ([2, 2], torch.zeros(4, dtype=torch.int64), "3 temporal blocks"),
        ([2, 2, 2], torch.zeros(5, dtype=torch.int64), "one clip of 6 ids"),
        ([2, 2, 2], torch.full((6,), 32), "another codebook"),
        ([2, 2, 2], torch.full((6,), -1), "another codebook"),
    ):
        with pytest.raises(ValueError, match=message):
            made.encode(lengths, ids)
    with pytest.raises(ValueError, match="none of the 2 classes"):
        made.prompt(Prompt(2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_sequence_is_refused(layout):
    made, lengths = codec(layout), torch.tensor([2, 4, 2])
    whole = made.encode(lengths, random_ids(lengths), Prompt(0))
    broken = [whole[1:], whole[:-1], whole[:6], torch.cat([whole, whole[-1:]]), whole[whole != whole[3]]]
    condition = made.encode(lengths, random_ids(lengths), Prompt(0, lengths, random_ids(lengths)))
    broken.append(condition[condition != whole[3]])
    for sequence in [*broken, torch.empty(0, dtype=torch.int64)]:
        with pytest.raises(ValueError, match=r"sequence|block|place|condition"):
            made.decode(sequence)
