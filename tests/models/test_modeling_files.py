"""The tokenizer's files load equal in every way that transformers offers, and its fingerprint follows the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_samples import MIXED, make_tokenizer, real_clips

from evatok_hf import EvatokEncoderModel, EvatokModel


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return real_clips()


@pytest.fixture(scope="module", params=["learned", "pooled"])
def position(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain() -> EvatokModel:
    return make_tokenizer(position_embedding="pooled")


def test_the_fingerprint_is_that_of_the_weights_that_were_loaded_or_saved(clips, tmp_path):
    model = make_tokenizer(encoder_num_layers=1, decoder_num_layers=1)
    assert model.fingerprint() is None and model.encode(clips[:1]).fingerprint is None
    model.save_pretrained(tmp_path)
    first = model.fingerprint()
    assert json.loads((tmp_path / "config.json").read_text())["fingerprint"] == first
    assert EvatokModel(model.config).fingerprint() is None  # other weights of the same sizes
    model = EvatokModel.from_pretrained(tmp_path)
    assert model.fingerprint() == model.encode(clips[:1]).fingerprint == first
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.1)
    model(clips[:1]).loss.backward()
    optimizer.step()
    assert model.eval().fingerprint() is None and model.encode(clips[:1]).fingerprint is None
    model.save_pretrained(tmp_path)
    assert len(model.fingerprint()) == 16 and model.fingerprint() != first
    other = EvatokModel.from_pretrained(tmp_path)
    other.load_state_dict(make_tokenizer(seed=1, encoder_num_layers=1, decoder_num_layers=1).state_dict())
    assert other.fingerprint() is None


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_a_checkpoint_of_before_has_the_fingerprint_of_its_files(plain, tmp_path, shards):
    plain.save_pretrained(tmp_path, **shards)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["fingerprint"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for kind in (EvatokModel, EvatokEncoderModel):
        assert kind.from_pretrained(tmp_path).fingerprint() == plain.fingerprint()


def test_a_fingerprint_that_is_none_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "fingerprint": 7}))
    with pytest.raises(ValueError, match="fingerprint must be a text"):
        EvatokModel.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def folder(position, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_tokenizer(position_embedding=position).save_pretrained(path)
    return path


def assert_same_model(a: EvatokModel, b: EvatokModel, clips: torch.Tensor) -> None:
    mine, other = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (a, b))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    tokens = a.encode(clips, MIXED)
    assert torch.equal(tokens.ids, b.encode(clips, MIXED).ids)
    assert torch.equal(a.decode(tokens), b.decode(tokens))


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_a_saved_model_loads_equal(position, folder, clips, device_map):
    loaded = EvatokModel.from_pretrained(folder, device_map=device_map)
    assert not loaded.training
    assert_same_model(make_tokenizer(position_embedding=position), loaded.to("cpu"), clips)


def test_a_checkpoint_holds_no_buffers_that_can_be_computed(folder):
    assert not [name for name in load_file(folder / "model.safetensors") if "pool" in name or "cell" in name] or (
        "learned" in (folder / "config.json").read_text()
    )


def test_a_sharded_checkpoint_loads_equal(plain, clips, tmp_path):
    plain.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_model(plain, EvatokModel.from_pretrained(tmp_path), clips)


def test_saving_again_leaves_nothing_of_the_model_before(plain, clips, tmp_path):
    other = make_tokenizer(seed=1, position_embedding="pooled")
    for options in ({}, {"max_shard_size": "60KB"}, {"max_shard_size": "90KB"}, {}):
        for model in (other, plain):
            model.save_pretrained(tmp_path, **options)
        assert_same_model(plain, EvatokModel.from_pretrained(tmp_path), clips)
    (tmp_path / "usual").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "usual").stat().st_mode}
    with pytest.raises(TypeError):
        other.save_pretrained(tmp_path, max_shard_size=object())
    assert_same_model(plain, EvatokModel.from_pretrained(tmp_path), clips)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_attention_can_be_chosen_on_loading(folder, clips):
    eager, sdpa = (EvatokModel.from_pretrained(folder, attn_implementation=name) for name in ("eager", "sdpa"))
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    tokens = eager.encode(clips, MIXED)
    assert torch.equal(tokens.ids, sdpa.encode(clips, MIXED).ids)
    assert torch.allclose(eager.decode(tokens), sdpa.decode(tokens), atol=2e-4)


def test_a_bfloat16_checkpoint_has_one_fingerprint_in_either_precision(position, folder, clips, tmp_path):
    EvatokModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    own = EvatokModel.from_pretrained(tmp_path)
    wide = EvatokModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert (own.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert own.fingerprint() == wide.fingerprint() == EvatokModel.from_pretrained(folder).fingerprint()
    # What the file does not hold is filled in either precision.
    for name, buffer in make_tokenizer(position_embedding=position).named_buffers():
        assert torch.equal(own.get_buffer(name), buffer.bfloat16()), name
        assert torch.equal(wide.get_buffer(name), buffer), name
    tokens = wide.encode(clips, MIXED)
    narrow = own.encode(clips, MIXED)
    assert (narrow.ids == tokens.ids).float().mean() > 0.5
    assert (own.decode(tokens).float() - wide.decode(tokens)).abs().mean() < 0.05


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_checkpoint_with_other_weights_than_the_model_is_refused_by_name(folder, tmp_path, change):
    weights = load_file(folder / "model.safetensors")
    name = "decoder.layers.1.cross_attention.v_proj.weight"
    weights["surprise.weight"] = weights.pop(name)
    if change == "unexpected":
        weights[name] = weights["surprise.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="surprise.weight" if change == "unexpected" else name) as caught:
        EvatokModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_loading_info_can_still_be_had(folder):
    loaded, info = EvatokModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, EvatokModel) and not info["missing_keys"] and not info["unexpected_keys"]


def test_a_checkpoint_of_other_sizes_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "codebook_size": 65}))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors does not fit .*: quantizer.weight .* \(65, 8\) is asked"):
        EvatokModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_can_be_made_anew(folder, clips, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights.pop("decoder.to_patch.bias")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    options = {"strict": False, "codebook_size": 65, "ignore_mismatched_sizes": True}
    model, info = EvatokModel.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert set(info["missing_keys"]) == {"decoder.to_patch.bias"} and len(info["mismatched_keys"]) == 1
    assert model.quantizer.weight.shape == (65, 8) and model.fingerprint() is None
    assert torch.equal(model.encoder.norm.bias, weights["encoder.norm.bias"])
    assert int(model.encode(clips).ids.max()) < 65
