"""training/common/flops.py: the formula against what torch counts."""

from __future__ import annotations

import pytest
import torch
from tokenizer_samples import make_tokenizer, real_clips
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from training.common.flops import counted, search_flops, tokenizer_flops


@pytest.mark.parametrize(
    ("lengths", "fields"),
    [
        ([2, 4, 8, 16], {}),
        ([16, 2, 2, 2], {}),
        ([16, 2, 2, 2], {"position_embedding": "pooled", "token_patches": True}),
    ],
)
def test_the_formula_is_what_torch_counts(lengths, fields):
    model, video = make_tokenizer(**fields), real_clips()[:1]
    model.set_attn_implementation("eager")  # fused kernels are not counted on every machine
    with FlopCounterMode(display=False) as counter:
        model(video, torch.tensor(lengths))
    # torch also counts the pooling of queries and the entropy term, which are left out.
    assert sum(tokenizer_flops(model.config, lengths)) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_modules_are_counted_without_being_made():
    assert counted(lambda: nn.Linear(2**20, 2**20), (3, 2**20)) == 2 * 3 * 2**40


def test_the_tree_costs_each_block_once_after_every_prefix():
    config = make_tokenizer().config
    tree, one_by_one = search_flops(config)
    assert one_by_one == sum(sum(tokenizer_flops(config, row)) for row in config.assignment_space.all().tolist())
    first = sum(sum(tokenizer_flops(config, [length])) for length in config.block_lengths)
    assert first < tree < one_by_one
    nodes = sum(len(config.block_lengths) ** t for t in range(1, config.num_blocks + 1))
    shorter = nodes / (config.num_blocks * len(config.assignment_space))
    assert tree / one_by_one == pytest.approx(shorter, rel=0.3)  # a block costs more the more comes before it
