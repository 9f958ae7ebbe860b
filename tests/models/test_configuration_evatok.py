"""The tokenizer's configuration: presets, files, and sizes that cannot work."""

from __future__ import annotations

import json

import pytest
import torch

from evatok_hf import EvatokConfig, EvatokModel


def count_parameters(config: EvatokConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in EvatokModel(config).parameters())


def test_the_paper_preset_has_the_papers_145_million_parameters():
    config = EvatokConfig.from_preset("paper")
    assert count_parameters(config) == pytest.approx(145e6, rel=0.01)
    assert (config.image_size, config.num_frames, config.num_blocks) == (128, 16, 4)
    assert config.block_lengths == [32, 64, 128, 256, 512] and config.codebook_size == 16384
    assert config.embeddings_per_block == 256 and len(config.assignment_space) == 625


def test_the_smaller_presets_are_smaller():
    presets = ("tiny", "small", "base", "paper")
    tiny, small, base, paper = (count_parameters(EvatokConfig.from_preset(name)) for name in presets)
    assert small < tiny < 10e6 < base < 30e6 < paper


def test_the_defaults_are_the_paper_preset():
    assert EvatokConfig().to_dict() == EvatokConfig.from_preset("paper").to_dict()


def test_overrides_replace_single_fields():
    config = EvatokConfig.from_preset("tiny", codebook_size=77, num_frames=8)
    assert (config.codebook_size, config.num_frames, config.frames_per_block) == (77, 8, 2)
    assert config.encoder_hidden_size == EvatokConfig.from_preset("tiny").encoder_hidden_size


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'huge'.*\['base', 'paper', 'small', 'tiny'\]"):
        EvatokConfig.from_preset("huge")


def test_what_follows_from_the_sizes():
    config = EvatokConfig(image_size=64, patch_size=4, num_frames=8, num_blocks=2, block_lengths=(8, 512))
    assert (config.grid_size, config.embeddings_per_block, config.frames_per_block) == (16, 256, 4)
    assert (config.assignment_space.min_tokens, config.assignment_space.max_tokens) == (16, 1024)


def test_a_saved_configuration_loads_equal(tmp_path):
    config = EvatokConfig.from_preset("tiny", entropy_weight=0.5, block_lengths=(8, 24, 128))
    config.save_pretrained(tmp_path)
    loaded = EvatokConfig.from_pretrained(tmp_path)
    assert loaded.block_lengths == [8, 24, 128] and loaded.entropy_weight == 0.5
    before, after = config.to_dict(), loaded.to_dict()
    for volatile in ("_name_or_path", "auto_map", "transformers_version"):
        before.pop(volatile, None), after.pop(volatile, None)
    assert before == after


def test_the_file_names_the_type_and_the_code_for_the_auto_classes(tmp_path):
    EvatokConfig.from_preset("tiny").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "evatok"
    assert written["auto_map"]["AutoConfig"] == "configuration_evatok.EvatokConfig"
    assert (tmp_path / "configuration_evatok.py").exists() and (tmp_path / "files_evatok.py").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 15}, "num_frames 15 is not a multiple of num_blocks 4"),
        ({"image_size": 100}, "image_size 100 is not a multiple of patch_size 8"),
        ({"image_size": 96}, "power of two"),
        ({"image_size": 32, "block_lengths": (32, 64)}, "largest candidate 64 exceeds 32"),
        ({"block_lengths": (64, 32)}, "strictly ascending"),
        ({"block_lengths": ()}, "block_lengths"),
        ({"encoder_hidden_size": 500}, "encoder_hidden_size 500 is not a multiple of encoder_num_heads 8"),
        ({"decoder_hidden_size": 24, "decoder_num_heads": 2}, "decoder_hidden_size 24 is not a multiple of 16"),
        ({"position_embedding": "rotary"}, "position_embedding.*'learned'.*'pooled'.*'rotary'"),
        ({"attention_init": "random"}, "attention_init.*'independent'.*'shifted'.*'random'"),
        ({"attention_init": "shifted"}, '"shifted" needs position_embedding "pooled", not \'learned\''),
        ({"interlaced_positions": True}, "interlaced_positions needs position_embedding \"pooled\", not 'learned'"),
        ({"token_patches": True}, "token_patches needs position_embedding \"pooled\", not 'learned'"),
        (
            {"token_patches": True, "position_embedding": "pooled", "interlaced_positions": True},
            "token_patches places the queries itself; set interlaced_positions to false",
        ),
        (
            {"token_patches": True, "position_embedding": "pooled", "block_lengths": (24, 32)},
            r"token_patches needs block_lengths that are powers of two, not \[24, 32\]",
        ),
        ({"patch_basis": "wavelets"}, "patch_basis.*'pixels'.*'cosine'.*'wavelets'"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        EvatokConfig(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "image_size",
        "num_frames",
        "num_blocks",
        "patch_size",
        "num_channels",
        "codebook_size",
        "codebook_dim",
        "embed_dim",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_num_heads",
        "decoder_hidden_size",
        "decoder_num_layers",
        "decoder_num_heads",
        "mlp_ratio",
    ],
)
@pytest.mark.parametrize("value", [0, -16])
def test_a_size_that_is_not_positive_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        EvatokConfig(**{name: value})


def test_a_folder_without_a_configuration_is_no_default_one(tmp_path):
    with pytest.raises(ValueError, match="there is no .*config.json; name the folder of one model"):
        EvatokConfig.from_pretrained(tmp_path)
