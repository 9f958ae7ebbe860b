"""Layouts of tokens and attention over them: every fast way against the masked reference, and what is compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizer_samples import MIXED, TINY, make_tokenizer, real_clips

from evatok_hf import EvatokConfig
from evatok_hf.models import modeling_evatok
from evatok_hf.models.modeling_evatok import (
    CausalBlocks,
    EvatokAttention,
    PackedBlocks,
    PackedLayout,
    PaddedLayout,
    TokenLayout,
    eager_attention_forward,
)

RAGGED = torch.tensor([[1, 2, 4], [3, 1, 2]])
CELLS = 5


def test_padded_layout():
    layout = PaddedLayout(torch.tensor([[1, 2], [3, 1]]))
    assert layout.sizes.tolist() == [3, 2]
    assert layout.block.tolist() == [0, 0, 0, 1, 1]
    assert layout.slot.tolist() == [0, 1, 2, 0, 1]
    assert layout.starts.tolist() == [0, 3]
    assert layout.valid.tolist() == [[True, False, False, True, True], [True, True, True, True, False]]


def test_packed_layout():
    layout = PackedLayout(torch.tensor([[1, 2], [3, 1]]))
    assert layout.clip.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert layout.block.tolist() == [0, 1, 1, 0, 0, 0, 1]
    assert layout.slot.tolist() == [0, 0, 1, 0, 1, 2, 0]
    assert layout.starts.tolist() == [[0, 1], [3, 6]]


def test_both_layouts_hold_the_same_tokens():
    padded, packed = PaddedLayout(RAGGED), PackedLayout(RAGGED)
    slots = torch.arange(2 * 3 * 4 * 2.0).view(2, 3, 4, 2)  # (B, T, M, D)
    tokens = packed.pack(packed.gather(slots))
    assert len(tokens) == RAGGED.sum() and torch.equal(tokens, padded.pack(padded.gather(slots)))
    for layout in (padded, packed):
        assert torch.equal(layout.pack(layout.unpack(tokens)), tokens)
        assert torch.equal(layout.first(layout.unpack(tokens)), slots[:, :, 0])


def test_the_layout_follows_lengths_and_implementation():
    assert isinstance(TokenLayout.choose(RAGGED, "sdpa"), PackedLayout)
    assert isinstance(TokenLayout.choose(RAGGED, "eager"), PaddedLayout)
    assert isinstance(TokenLayout.choose(RAGGED[:1].repeat(3, 1), "sdpa"), PaddedLayout)  # nothing to pad
    assert TokenLayout.choose(RAGGED, "flex_attention").flex


def attention(implementation: str) -> EvatokAttention:
    torch.manual_seed(0)
    return EvatokAttention(EvatokConfig(**TINY, attn_implementation=implementation), 32, 2, "self")


def dense(module, query, memory, mask):
    """(B, Q, D), (B, K, D), mask (B, Q, K) -> (B, Q, D) by one masked softmax."""
    q, k, v = (
        projection(x).unflatten(-1, (2, 16)).transpose(1, 2)
        for projection, x in ((module.q_proj, query), (module.k_proj, memory), (module.v_proj, memory))
    )
    return module.o_proj(eager_attention_forward(module, q, k, v, mask[:, None], module.scaling)[0].flatten(2))


def owners(kind: str, layout) -> torch.Tensor:
    """Blocks of the places of a row of a padded layout, or of cells."""
    return layout.block if kind == "tokens" else torch.arange(3).repeat_interleave(CELLS)


@pytest.mark.parametrize("name", ["over_tokens", "over_cells", "from_cells"])
@pytest.mark.parametrize(
    ("layout_class", "together"), [(PaddedLayout, None), (PackedLayout, False), (PackedLayout, True)]
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_of_a_layout_is_attention_under_a_mask(implementation, layout_class, together, name):
    layout, padded = layout_class(RAGGED), PaddedLayout(RAGGED)
    kinds = {"over_tokens": ("tokens", "tokens"), "over_cells": ("tokens", "cells"), "from_cells": ("cells", "tokens")}
    query_kind, key_kind = kinds[name]
    module = attention(implementation)

    def values(kind: str) -> torch.Tensor:
        """Rows of the padded layout."""
        return torch.randn(2, len(owners(kind, padded)), 32)

    query, memory = values(query_kind), values(key_kind).requires_grad_()
    query_block, key_block = owners(query_kind, padded), owners(key_kind, padded)
    mask = (key_block <= query_block[:, None]).expand(2, -1, -1)
    if key_kind == "tokens":
        mask = mask & padded.valid[:, None]
    reference = dense(module, query, memory, mask)
    reference = padded.pack(reference) if query_kind == "tokens" else reference

    def laid_out(x: torch.Tensor, kind: str) -> torch.Tensor:
        return layout.unpack(padded.pack(x)) if kind == "tokens" else x

    blocks = getattr(layout, name)(*([] if name == "over_tokens" else [CELLS]))
    if isinstance(blocks, PackedBlocks):
        blocks = replace(blocks, together=together)
    key = laid_out(memory, key_kind)
    out = module(laid_out(query, query_kind), key, key, blocks)
    out = layout.pack(out) if query_kind == "tokens" else out
    assert torch.allclose(out, reference, atol=1e-5)
    direction = torch.randn_like(reference)
    gradients = [torch.autograd.grad(x, memory, direction, retain_graph=True)[0] for x in (out, reference)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_calls_of_equal_sizes_are_one_call():
    sizes = []

    def attend(q, k, v, mask):
        sizes.append((len(q), q.shape[2], k.shape[2]))
        return q.transpose(1, 2)

    lengths = [[2, 4], [2, 4], [4, 2]]
    x = torch.arange(18.0).view(1, 1, 18, 1)
    out = PackedBlocks(lengths, lengths, together=True).attend(attend, x, x, x)
    assert sorted(sizes) == [(1, 2, 6), (1, 4, 4), (2, 2, 2), (2, 4, 6)]
    assert torch.equal(out.flatten(), torch.arange(18.0))
    assert torch.equal(PackedBlocks(lengths, lengths, together=False).attend(attend, x, x, x), out)
    assert len(sizes) == 4 + 6
    assert CausalBlocks([1, 2], [1, 2]).attend(attend, x[:, :, :3], x[:, :, :3], x[:, :, :3]).shape == (1, 3, 1, 1)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["learned", "pooled"])
def models(request):
    return {
        name: make_tokenizer(position_embedding=request.param, attn_implementation=name) for name in ("eager", "sdpa")
    }


def test_a_long_batch_is_packed_in_parts(monkeypatch):
    monkeypatch.setattr(modeling_evatok, "_TOKENS_TOGETHER", 8)
    lengths = torch.tensor([[1, 2, 4], [1, 0, 0], [9, 9, 9], [3, 1, 2], [1, 1, 1]])
    parts = PackedLayout(lengths).parts()
    assert [(clips.start, clips.stop) for clips, _, _ in parts] == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert [(places.start, places.stop) for _, places, _ in parts] == [(0, 8), (8, 35), (35, 41), (41, 44)]
    for clips, _, layout in parts:
        assert torch.equal(layout.lengths, lengths[clips])
    (only,) = PaddedLayout(lengths).parts()
    assert only[2].lengths is lengths


@pytest.mark.parametrize("together", [10, 60, 10_000])
def test_a_packed_step_is_the_padded_step(models, together, monkeypatch):
    """In parts of a clip, of several and as a whole."""
    monkeypatch.setattr(modeling_evatok, "_TOKENS_TOGETHER", together)
    results = {}
    for name, model in models.items():
        model.zero_grad()
        out = model(real_clips(), MIXED, output_hidden_states=True, return_loss=True)
        out.loss.backward()
        results[name] = out, {key: parameter.grad for key, parameter in model.named_parameters()}
    (reference, expected), (packed, gradients) = results["eager"], results["sdpa"]
    assert torch.equal(packed.ids, reference.ids)
    assert torch.allclose(packed.reconstruction, reference.reconstruction, atol=1e-5)
    for hidden, same in zip(packed.decoder_hidden_states, reference.decoder_hidden_states, strict=True):
        assert torch.allclose(hidden, same, atol=1e-4)
    assert packed.loss.item() == pytest.approx(reference.loss.item(), rel=1e-5)
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, expected[key], rtol=1e-3, atol=1e-6), key


def test_flex_attention_gives_the_same(models):
    """Forwards: flex attention has no gradients on a CPU."""
    model = make_tokenizer(position_embedding="pooled", attn_implementation="flex_attention")
    reference = make_tokenizer(position_embedding="pooled", attn_implementation="eager")
    with torch.no_grad():
        for lengths in (MIXED, 8):
            out, expected = model(real_clips(), lengths), reference(real_clips(), lengths)
            assert torch.equal(out.ids, expected.ids)
            assert torch.allclose(out.reconstruction, expected.reconstruction, atol=1e-5)
    assert torch.equal(model.encode(real_clips(), MIXED).ids, reference.encode(real_clips(), MIXED).ids)


def test_layers_are_compiled_once_for_all_assignments():
    model = make_tokenizer(attn_implementation="sdpa", encoder_num_layers=1, decoder_num_layers=1).train()
    counter = torch._dynamo.testing.CompileCounter()
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer.compile(backend=counter, dynamic=True)
    space, generator = model.assignment_space, torch.Generator().manual_seed(0)

    def step(lengths) -> None:
        model(real_clips()[:2], lengths).loss.backward()

    step(space.random(2, generator))
    step(torch.full((2, 4), 8))
    compiled = counter.frame_count
    for _ in range(8):
        step(space.random(2, generator))
    step(torch.full((2, 4), 32))
    assert compiled and counter.frame_count == compiled


def test_a_convolution_by_product_is_the_convolution():
    x, weight, bias = torch.randn(2, 5, 6, 4), torch.randn(7, 5, 3, 3), torch.randn(7)
    expected = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    assert torch.allclose(modeling_evatok._convolve_by_product(x, weight, bias), expected, atol=1e-5)
