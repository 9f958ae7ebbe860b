"""The prefix tree against trying everything, on real clips."""

from __future__ import annotations

import pytest
import torch
from tokenizer_samples import make_tokenizer, real_clips

from evatok_hf import AssignmentSpace, EvatokModel
from evatok_hf.allocation.search import assignment_paths, brute_force, num_nodes, search_assignments
from evatok_hf.metrics import load_perceptual, psnr


@pytest.fixture(scope="module")
def model() -> EvatokModel:
    return make_tokenizer(position_embedding="pooled", block_lengths=(2, 8, 32))


def test_nodes_are_numbered_level_by_level():
    space = AssignmentSpace((2, 4, 8), 2)
    assert num_nodes(space) == 3 + 9 and num_nodes(AssignmentSpace((8, 16, 32, 64, 128), 4)) == 780
    assert assignment_paths(space).tolist() == [[i // 3, 3 + i] for i in range(9)]


def test_the_tree_gives_what_trying_everything_gives(model, monkeypatch):
    metric = load_perceptual("perceptual-effnet-lite0")
    clips = real_clips()[:2]
    monkeypatch.setattr(model.config, "return_dict", False)  # as users of tuples set it
    result = search_assignments(model, clips, metric)
    table = result.table()
    expected = brute_force(model, clips, metric)
    assert table.shape == expected.shape == (2, 81, 3)
    assert (table - expected).abs().max() < 1e-4
    assert table[0].std(0).min() > 1e-4  # assignments do differ
    # The figures of one assignment are those of its reconstruction.
    lengths = model.assignment_space.to_lengths(50)
    frames = model.decode(model.encode(clips, lengths, return_dict=True))
    assert torch.allclose(table[:, 50, 1].double(), psnr(clips, frames), atol=1e-4)
    # Figures of a block: the first block of every assignment that starts alike is one node.
    blocks = (clips - frames).square().unflatten(1, (4, 4)).mean((2, 3, 4, 5)) / 4
    assert torch.allclose(result.mse[:, assignment_paths(model.assignment_space)[50]], blocks, atol=1e-6)


def test_nodes_per_batch_only_bounds_memory(model):
    clips = real_clips()
    together, apart = (search_assignments(model, clips, nodes_per_batch=size) for size in (3, 1))
    assert torch.allclose(together.mse, apart.mse, atol=1e-5)
    assert together.distance is None and together.table()[..., 0].isnan().all()


def test_half_precision_changes_little(model):
    clips = real_clips()[:1]
    metric = load_perceptual("perceptual-effnet-lite0")
    full = search_assignments(model, clips, metric).table()
    half = search_assignments(model, clips, metric.to(torch.bfloat16), dtype=torch.bfloat16).table()
    assert half.dtype == torch.float32 and not half.equal(full)
    assert (half[..., 0] - full[..., 0]).abs().max() < 0.05 and (half[..., 1] - full[..., 1]).abs().max() < 0.2


def test_a_random_part_of_the_tree_has_the_figures_of_the_whole(model):
    clips = real_clips()
    whole = search_assignments(model, clips).table()[..., 2]
    part = search_assignments(model, clips, branches=2, generator=torch.Generator().manual_seed(0))
    measured = part.table()[..., 2].isfinite()
    assert measured.sum(1).tolist() == [2**4] * 3 and part.mse.isfinite().sum(1).tolist() == [2 + 4 + 8 + 16] * 3
    assert torch.allclose(part.table()[..., 2][measured], whole[measured], atol=1e-6)
    others = search_assignments(model, clips, branches=2, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(others.mse.isfinite(), part.mse.isfinite())


@pytest.mark.parametrize("fields", [{}, {"patch_basis": "cosine"}, {"token_patches": True}])
def test_the_folded_matrices_are_those_of_the_model(fields):
    model = make_tokenizer(position_embedding="pooled", block_lengths=(2, 8, 32), **fields)
    clips = real_clips()[:2]
    difference = search_assignments(model, clips).table() - brute_force(model, clips)
    assert difference[..., 1:].abs().max() < 1e-4  # without a metric the first figure is NaN


def test_mistakes_are_named(model):
    with pytest.raises(ValueError, match="shape"):
        search_assignments(model, torch.zeros(1, 8, 3, 32, 32))
    with pytest.raises(ValueError, match="at least 1"):
        search_assignments(model, real_clips(), nodes_per_batch=0)
    with pytest.raises(ValueError, match="branches must lie in 1..3"):
        search_assignments(model, real_clips(), branches=4)


@pytest.mark.slow
def test_the_full_space_of_real_clips():
    model = make_tokenizer(position_embedding="pooled")
    clips, metric = real_clips(), load_perceptual("perceptual-effnet-lite0")
    table = search_assignments(model, clips, metric).table()
    assert table.shape == (3, 625, 3)
    assert (table - brute_force(model, clips, metric)).abs().max() < 1e-4
