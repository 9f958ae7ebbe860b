"""A generator with 8-bit weights: loads through transformers, stays near the original, draws clips, keeps its files."""

from __future__ import annotations

import pytest
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig

from evatok_hf import EvatokForCausalLM, EvatokPipeline, default_checkpoint
from evatok_hf.models.generation_evatok import sample
from evatok_hf.models.modeling_evatok_generator import Prompt


def load(config=None) -> EvatokForCausalLM:
    options = {} if config is None else {"quantization_config": TorchAoConfig(config)}
    return EvatokForCausalLM.from_pretrained(
        default_checkpoint("generator"), subfolder="generator", dtype=torch.float32, **options
    )


@pytest.fixture(scope="module")
def original():
    return load()


@pytest.fixture(scope="module")
def int8():
    return load(Int8WeightOnlyConfig())


@torch.no_grad()
def moved(model, original, sequences) -> tuple[float, float]:
    """How far logits move against their spread, and how often the likeliest id stays the same."""
    parts = []
    for ids in sequences:
        mine, other = model(ids[None]).logits[0], original(ids[None]).logits[0]
        parts.append(
            ((mine - other).square().mean(), other.var(), (mine.argmax(-1) == other.argmax(-1)).float().mean())
        )
    error, spread, same = (float(torch.stack(column).mean()) for column in zip(*parts, strict=True))
    return (error / spread) ** 0.5, same


@pytest.fixture(scope="module")
def sequences(original):
    labels = [0, 5, 9]
    tokens = sample(original, [Prompt(label) for label in labels], range(3), lengths=[16, 8, 32, 16])
    return original.codec.from_tokens(tokens, labels)


def test_int8_logits_move_little(int8, original, sequences):
    error, same = moved(int8, original, sequences)
    assert 0 < error < 0.02 and same > 0.95


def test_fp8_logits_move_more(original, sequences):
    error, same = moved(load(Float8WeightOnlyConfig()), original, sequences)
    assert 0 < error < 0.08 and same > 0.85


def test_it_draws_clips_by_either_loop_and_says_that_its_weights_are_others(int8, original):
    prompts = [Prompt(index) for index in range(3)]
    options = {"lengths": [8, 8, 0, 8], "budget": 48, "guidance_scale": 1.25}
    plain, fast = (sample(int8, prompts, range(3), implementation=name, **options) for name in ("eager", "static"))
    assert torch.equal(plain.ids, fast.ids) and (fast.lengths.sum(-1) <= 48).all()
    assert int8.fingerprint() == int8.fingerprint() != original.fingerprint()
    whole = EvatokPipeline.from_pretrained()
    pipe = EvatokPipeline(whole.tokenizer, whole.processor, whole.router, int8)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("take_cover", 1, seeds=[0], **options).frames.shape == (1, 16, 64, 64, 3)


def test_it_is_saved_small_and_loads_equal(int8, original, tmp_path):
    int8.save_pretrained(tmp_path / "int8")
    original.save_pretrained(tmp_path / "plain")
    size, plain = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "plain"))
    assert size < 0.5 * plain
    again = EvatokForCausalLM.from_pretrained(tmp_path / "int8")
    assert again.fingerprint() == int8.fingerprint()
    ids = torch.tensor([[original.config.bos_token_id, original.config.null_class_id]])
    assert torch.equal(again(ids).logits, int8(ids).logits)
