"""What transformers' `ModelTesterMixin` asks of every model, of ours; its file is not part of the installed package.

- forward signature: the main input comes first, and `return_dict` is taken.
- determinism: two passes over the same input are equal to the last bit.
- save and load: a saved model gives the same outputs, from safetensors, and from `torch.save` of the model.
- dtype: `dtype` on loading is that of every weight, and what a checkpoint was saved as is what `dtype="auto"` gives.
- outputs: `return_dict=False` gives the same values in a tuple, as does the configuration's `return_dict`.
- initialisation: no weight is left as it came from memory, and `from_config` gives finite weights of every dtype.
- attention: eager and sdpa agree.
- training: every parameter has a gradient, with gradient checkpointing the same one.
- mismatched shapes: refused, or made anew with `ignore_mismatched_sizes`.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from tokenizer_samples import TINY, real_clips
from transformers import PreTrainedModel

from evatok_hf import (
    EvatokConfig,
    EvatokEncoderModel,
    EvatokForCausalLM,
    EvatokGeneratorConfig,
    EvatokModel,
    EvatokRouter,
    EvatokRouterConfig,
)

ROUTER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
GENERATOR = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    EvatokModel: EvatokConfig(**TINY),
    EvatokEncoderModel: EvatokConfig(**TINY),
    EvatokRouter: EvatokRouterConfig(image_size=32, block_lengths=[2, 32], **ROUTER),
    EvatokForCausalLM: EvatokGeneratorConfig(codebook_size=64, block_lengths=[2, 4], num_classes=2, **GENERATOR),
}
# A field that changes the shape of a weight, and that weight.
MISMATCH = {
    EvatokModel: ({"codebook_size": 77}, "quantizer.weight"),
    EvatokEncoderModel: ({"codebook_size": 77}, "quantizer.weight"),
    EvatokRouter: ({"block_lengths": [2, 8, 32]}, "head.weight"),
    EvatokForCausalLM: ({"intermediate_size": 64}, "model.layers.0.mlp.down_proj.weight"),
}


@pytest.fixture(params=list(CONFIGS), ids=lambda kind: kind.__name__)
def kind(request) -> type[PreTrainedModel]:
    return request.param


def make(kind: type[PreTrainedModel], **options) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(kind.config_class.from_dict({**CONFIGS[kind].to_dict(), **options})).eval()


def inputs(kind: type[PreTrainedModel]) -> dict[str, torch.Tensor]:
    if kind is EvatokForCausalLM:
        return {"input_ids": torch.arange(12)[None] * torch.tensor([[1], [2]])}
    return {"pixel_values_videos": real_clips()[:2]}


def loss_inputs(kind: type[PreTrainedModel]) -> dict:
    if kind is EvatokForCausalLM:
        return {**inputs(kind), "labels": inputs(kind)["input_ids"]}
    return {**inputs(kind), **({"labels": torch.tensor([1, 3])} if kind is EvatokRouter else {"lengths": 32})}


def tensors(output) -> list[torch.Tensor]:
    values = output if isinstance(output, tuple) else output.to_tuple()
    return [value for value in values if isinstance(value, torch.Tensor)]


def assert_same(a, b, **tolerance) -> None:
    a, b = tensors(a), tensors(b)
    assert len(a) == len(b) >= 1
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, **({"rtol": 0, "atol": 0} | tolerance))


def test_forward_signature(kind):
    names = list(inspect.signature(kind.forward).parameters)
    assert names[1] == kind.main_input_name and ("return_dict" in names or "kwargs" in names)


@torch.no_grad()
def test_determinism(kind):
    model = make(kind)
    assert_same(model(**inputs(kind)), model(**inputs(kind)))


@torch.no_grad()
def test_save_and_load(kind, tmp_path):
    model = make(kind)
    expected = model(**inputs(kind))
    model.save_pretrained(tmp_path)
    expected = model(**inputs(kind))  # whose tokens now say whose they are
    again = kind.from_pretrained(tmp_path)
    assert not again.training and again.state_dict().keys() == model.state_dict().keys()
    assert_same(again(**inputs(kind)), expected)
    torch.save(model, tmp_path / "whole.pt")
    assert_same(torch.load(tmp_path / "whole.pt", weights_only=False)(**inputs(kind)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(kind, tmp_path, dtype):
    make(kind).to(dtype).save_pretrained(tmp_path)
    for options, expected in (({}, dtype), ({"dtype": "auto"}, dtype), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        model = kind.from_pretrained(tmp_path, **options)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
    with torch.no_grad():
        assert all(torch.isfinite(value.float()).all() for value in tensors(model(**inputs(kind))))


@torch.no_grad()
def test_outputs_as_a_tuple(kind):
    model = make(kind)
    expected = model(**inputs(kind))
    assert isinstance(model(**inputs(kind), return_dict=False), tuple)
    assert_same(model(**inputs(kind), return_dict=False), expected)
    if kind is EvatokForCausalLM:  # transformers' Llama does not follow the configuration
        return
    model.config.return_dict = False
    assert isinstance(model(**inputs(kind)), tuple)
    assert_same(model(**inputs(kind), return_dict=True), expected)


def test_initialisation(kind):
    for dtype in (torch.float32, torch.bfloat16):
        model = kind._from_config(CONFIGS[kind], dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    fresh = kind.from_pretrained(None, config=CONFIGS[kind], state_dict={}, strict=False)
    assert all(torch.isfinite(parameter).all() for parameter in fresh.parameters())


@torch.no_grad()
def test_eager_and_sdpa_attention_agree(kind):
    eager, sdpa = (make(kind, attn_implementation=name) for name in ("eager", "sdpa"))
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    assert_same(eager(**inputs(kind)), sdpa(**inputs(kind)), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", [EvatokModel, EvatokRouter, EvatokForCausalLM], indirect=True)
def test_training_with_and_without_gradient_checkpointing(kind):
    model = make(kind).train()
    found = []
    for _ in range(2):
        model.zero_grad()
        model(**loss_inputs(kind)).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert found[0].keys() == found[1].keys() == dict(model.named_parameters()).keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_mismatched_shapes(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    fields, name = MISMATCH[kind]
    with pytest.raises(ValueError, match="weight"):
        kind.from_pretrained(tmp_path, **fields)
    other = kind.from_pretrained(tmp_path, **fields, strict=False, ignore_mismatched_sizes=True)
    kept = [key for key, value in other.state_dict().items() if value.shape == model.state_dict()[key].shape]
    assert name not in kept and torch.isfinite(other.state_dict()[name]).all() and other.state_dict()[name].any()
    assert all(torch.equal(other.state_dict()[key], model.state_dict()[key]) for key in kept)
