"""Training the tokenizer: its loss, and that gradients reach everything."""

from __future__ import annotations

import pytest
import torch
from tokenizer_samples import MIXED, make_tokenizer, real_clips
from torch.nn import functional as F

from evatok_hf import EvatokConfig, EvatokModel


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return real_clips()


@pytest.fixture(scope="module", params=["learned", "pooled"])
def position(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, position) -> EvatokModel:
    return make_tokenizer(position_embedding=position, attn_implementation=request.param)


@pytest.fixture(scope="module")
def plain() -> EvatokModel:
    return make_tokenizer(position_embedding="pooled")


def test_the_loss_is_the_weighted_sum_of_its_parts(plain, clips):
    out = plain(clips, MIXED, return_loss=True)
    expected = out.reconstruction_loss + out.codebook_loss + 0.25 * out.commitment_loss + 0.02 * out.entropy_loss
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.reconstruction_loss.item() == pytest.approx(F.l1_loss(out.reconstruction, clips).item(), rel=1e-6)
    heavier = make_tokenizer(position_embedding="pooled", commitment_weight=2.0, entropy_weight=0.5)(
        clips, MIXED, return_loss=True
    )
    expected = out.reconstruction_loss + out.codebook_loss + 2 * out.commitment_loss + 0.5 * out.entropy_loss
    assert heavier.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def gradients(model: EvatokModel, clips: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(clips[:2], [[2, 4, 8, 16], [32] * 4], return_loss=True).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_reaches_every_parameter(model, clips):
    grads = gradients(model, clips)
    assert not [name for name, grad in grads.items() if grad is None or not torch.isfinite(grad).all()]
    # A bias of the keys adds the same to all scores of a query, so that softmax takes it away again.
    assert not [name for name, grad in grads.items() if not grad.any() and not name.endswith("k_proj.bias")]
    for name, grad in grads.items():
        if name.endswith(("token_table", "cell_table", "index_embedding")):
            assert grad.flatten(0, -2).abs().sum(-1).min() > 0, f"a row of {name} gets no gradient"


def test_gradient_checkpointing_changes_no_gradient_and_no_ids(position, clips):
    model = make_tokenizer(position_embedding=position).train()
    expected, ids = gradients(model, clips), model.encode(clips, MIXED).ids
    expected = {name: grad.clone() for name, grad in expected.items()}
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in (*model.encoder.layers, *model.decoder.layers))
    for name, grad in gradients(model, clips).items():
        assert torch.allclose(grad, expected[name], rtol=1e-4, atol=1e-6), name
    assert torch.equal(model.encode(clips, MIXED).ids, ids)


def test_training_learns_a_clip(clips):
    model = make_tokenizer(position_embedding="pooled", initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        out = model(clips[:1], 8)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.reconstruction_loss.item())
    assert losses[-1] < 0.85 * losses[0]


def test_autocast_trains_with_the_same_codes_arithmetic(plain, clips):
    with torch.autocast("cpu", torch.bfloat16):
        out = plain(clips, MIXED, return_loss=True)
    assert torch.isfinite(out.loss) and out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(plain(clips, MIXED, return_loss=True).loss.item(), rel=0.1)


def test_the_linear_codec_is_exact_under_autocast(clips):
    model = make_tokenizer(position_embedding="pooled", token_patches=True)
    expected = model(clips, MIXED).ids, model.encode(clips, MIXED, exact=True).ids
    with torch.autocast("cpu", torch.bfloat16):
        found = model.train()(clips, MIXED).ids, model.encode(clips, MIXED, exact=True).ids
    assert all(map(torch.equal, found, expected))


def test_the_loss_is_computed_in_training_or_where_it_is_asked_for(clips):
    model = make_tokenizer(encoder_num_layers=1, decoder_num_layers=1)
    losses = {"loss", "reconstruction_loss", "codebook_loss", "commitment_loss", "entropy_loss"}
    assert not losses & model(clips).keys() and losses <= model(clips, return_loss=True).keys()
    assert torch.equal(model(clips).reconstruction, model(clips, return_loss=True).reconstruction)
    model.train()
    assert losses <= model(clips).keys() and not losses & model(clips, return_loss=False).keys()


def test_a_tuple_on_request(plain, clips):
    named = plain(clips, MIXED, return_loss=True)
    values = plain(clips, MIXED, return_loss=True, return_dict=False)
    assert isinstance(values, tuple) and len(values) == len(named.keys()) == 8
    for name, value in zip(named.keys(), values, strict=True):
        assert torch.equal(named[name], value), name


def test_the_decoders_hidden_states(plain, clips):
    assert plain(clips, MIXED).decoder_hidden_states is None
    out = plain(clips, MIXED, output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in out.decoder_hidden_states] == [(3, 4, 16, 48)] * 3
    frames = plain.decoder.head(out.decoder_hidden_states[-1])
    assert torch.equal(frames, out.reconstruction)


def test_more_than_65536_tokens_in_one_step():
    sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("num_layers", "num_heads")}
    widths = {"encoder_hidden_size": 16, "decoder_hidden_size": 16, "embed_dim": 8, "mlp_ratio": 1, "codebook_size": 8}
    model = EvatokModel(EvatokConfig(image_size=32, num_frames=4, block_lengths=(32,), **sizes, **widths)).eval()
    video = torch.rand(513, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    out = model(video, return_loss=True)
    out.loss.backward()
    assert out.ids.numel() == 513 * 128 > 65_536
    assert torch.isfinite(model.quantizer.weight.grad).all() and model.quantizer.weight.grad.any()
    assert torch.equal(model.encode(video[-1:]).ids, out.ids[-128:])
