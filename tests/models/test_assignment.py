"""The assignment space: numbering, limits, and what it says about lengths that are none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from evatok_hf import AssignmentSpace

CANDIDATES = (32, 64, 128, 256, 512)


@pytest.fixture(scope="module")
def space() -> AssignmentSpace:
    return AssignmentSpace(CANDIDATES, 4)


def test_all_625_assignments_are_numbered_in_lexicographic_order(space):
    expected = torch.tensor(list(itertools.product(CANDIDATES, repeat=4)))
    assert len(space) == 625
    assert torch.equal(space.all(), expected)
    assert torch.equal(space.to_index(expected), torch.arange(625))
    assert torch.equal(space.to_lengths(torch.arange(625)), expected)


def test_one_index_and_one_assignment_round_trip_without_a_batch(space):
    for index in (0, 1, 5, 124, 312, 624):
        lengths = space.to_lengths(index)
        assert lengths.shape == (4,) and lengths.dtype == torch.int64
        assert space.to_index(lengths).shape == () and int(space.to_index(lengths)) == index
    assert space.to_lengths(1).tolist() == [32, 32, 32, 64]  # the last block is the least significant digit
    assert int(space.to_index([512, 32, 32, 32])) == 500


def test_other_sizes_round_trip():
    for candidates, blocks in (((3,), 2), ((1, 7), 1), ((2, 4, 8), 5)):
        space = AssignmentSpace(candidates, blocks)
        assert len(space) == len(candidates) ** blocks == len(space.all())
        assert torch.equal(space.to_index(space.all()), torch.arange(len(space)))


def test_totals(space):
    assert (space.min_tokens, space.max_tokens) == (128, 2048)
    totals = space.all().sum(-1)
    assert (int(totals.min()), int(totals.max())) == (128, 2048)


def test_limits_keep_exactly_the_assignments_within_them(space):
    totals = space.all().sum(-1)
    for low, high in ((None, 256), (1024, None), (500, 600), (128, 128)):
        kept = space.all(min_tokens=low, max_tokens=high)
        inside = (totals >= (low or 0)) & (totals <= (high or 10**6))
        assert torch.equal(kept, space.all()[inside])


def test_limits_that_nothing_meets_are_refused_with_the_range(space):
    with pytest.raises(ValueError, match="128 to 2048"):
        space.all(max_tokens=100)
    with pytest.raises(ValueError, match="no assignment has between 600 and 500"):
        space.random(3, min_tokens=600, max_tokens=500)


def test_random_draws_every_assignment_and_keeps_limits(space):
    drawn = space.random(20_000, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 4) and drawn.dtype == torch.int64
    counts = torch.bincount(space.to_index(drawn), minlength=625)
    assert int(counts.min()) > 0  # 32 are expected of each
    assert int(counts.max()) < 4 * 32
    limited = space.random(500, torch.Generator().manual_seed(0), min_tokens=300, max_tokens=700).sum(-1)
    assert int(limited.min()) >= 300 and int(limited.max()) <= 700


def test_random_repeats_with_its_generator(space):
    first, again = (space.random(50, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, space.random(50, torch.Generator().manual_seed(8)))


def test_uniform(space):
    assert space.uniform(64).tolist() == [64] * 4
    assert space.uniform(64, batch_size=3).tolist() == [[64] * 4] * 3
    with pytest.raises(ValueError, match=r"\[100\].*\[32, 64, 128, 256, 512\]"):
        space.uniform(100)


@pytest.mark.parametrize(
    "lengths",
    [256, torch.tensor(256), [256] * 4, (256,) * 4, [[256] * 4] * 2, np.full((2, 4), 256), torch.full((2, 4), 256)],
    ids=["int", "0d", "list", "tuple", "rows", "numpy", "tensor"],
)
def test_validate_takes_every_form_of_the_same_lengths(space, lengths):
    valid = space.validate(lengths, batch_size=2)
    assert valid.tolist() == [[256] * 4] * 2 and valid.dtype == torch.int64 and valid.device.type == "cpu"


def test_validate_returns_a_copy(space):
    given = torch.full((2, 4), 64)
    space.validate(given).fill_(1)
    space.validate(given, batch_size=2).fill_(1)
    assert given.unique().tolist() == [64]


@pytest.mark.parametrize(
    "lengths",
    [100, 0, -32, [32, 64, 128, 100], [[32] * 4, [32, 32, 32, 48]], [32] * 3, [32] * 5, [[[32] * 4]]],
)
def test_lengths_outside_the_space_are_refused_with_the_candidates(space, lengths):
    with pytest.raises(ValueError) as caught:
        space.validate(lengths)
    assert "[32, 64, 128, 256, 512]" in str(caught.value) and "\n" not in str(caught.value)


def test_the_message_names_each_wrong_length_once(space):
    with pytest.raises(ValueError, match=r"block lengths \[7, 100\] are not"):
        space.validate([[100, 7, 32, 100]])


@pytest.mark.parametrize(
    "lengths",
    [32.0, True, "32", ["32"] * 4, [[32] * 4, [32]], [], [None] * 4, {}, 10**30, torch.full((4,), 32.0)],
    ids=["float", "bool", "text", "texts", "ragged", "empty", "none", "dict", "huge", "float tensor"],
)
def test_what_is_not_integers_is_refused(space, lengths):
    with pytest.raises(ValueError, match="lengths must be integers") as caught:
        space.validate(lengths)
    assert "\n" not in str(caught.value)


def test_a_wrong_number_of_rows_is_refused(space):
    with pytest.raises(ValueError, match="2 rows for 3 clips"):
        space.validate([[32] * 4] * 2, batch_size=3)


@pytest.mark.parametrize("index", [-1, 625, torch.tensor([0, 700])])
def test_indices_outside_the_space_are_refused(space, index):
    with pytest.raises(ValueError, match="run from 0 to 624"):
        space.to_lengths(index)


@pytest.mark.parametrize("candidates", [(), (0, 2), (-2, 2), (4, 2), (2, 2)])
def test_candidates_must_be_positive_and_ascending(candidates):
    with pytest.raises(ValueError, match="strictly ascending"):
        AssignmentSpace(candidates, 4)


def test_a_clip_has_at_least_one_block():
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        AssignmentSpace((2, 4), 0)


def test_repr_names_the_space(space):
    assert repr(space) == "AssignmentSpace(block_lengths=(32, 64, 128, 256, 512), num_blocks=4)"
