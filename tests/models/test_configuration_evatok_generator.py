"""EvatokGeneratorConfig: presets and their sizes, ids that follow from its fields, saving, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from evatok_hf import EvatokForCausalLM, EvatokGeneratorConfig


def size(config: EvatokGeneratorConfig) -> int:
    with torch.device("meta"):
        return EvatokForCausalLM(config).num_parameters()


@pytest.mark.parametrize(("preset", "parameters"), [("327m", 327e6), ("633m", 633e6)])
def test_sizes_of_the_paper(preset, parameters):
    config = EvatokGeneratorConfig.from_preset(preset)
    assert (config.codebook_size, config.num_classes, config.num_blocks) == (8192, 101, 4)
    assert config.block_lengths == [32, 64, 128, 256, 512] and config.layout == "length-first"
    assert size(config) == pytest.approx(parameters, rel=0.02)


def test_small_sizes():
    assert size(EvatokGeneratorConfig.from_preset("tiny")) == pytest.approx(5.3e6, rel=0.02)
    assert size(EvatokGeneratorConfig.from_preset("small")) == pytest.approx(55.3e6, rel=0.02)


def test_ids_follow_each_other():
    config = EvatokGeneratorConfig.from_preset("tiny", class_names=["cat", "dog"])
    assert (config.num_classes, config.first_marker_id) == (2, 1024)
    ids = [config.bos_token_id, config.eos_token_id, config.pad_token_id, config.separator_token_id]
    assert ids == [1029, 1030, 1031, 1032] and config.null_class_id == 1033
    assert [config.class_id(label) for label in (None, 0, 1)] == [1033, 1034, 1035] and config.vocab_size == 1036
    # BOS, class, separator, EOS; two clips of 4 markers and 512 codes.
    assert config.max_position_embeddings == 4 + 2 * (4 + 4 * 128)
    # One marker instead of five.
    other = EvatokGeneratorConfig.from_preset("tiny", layout="end-of-block")
    assert (other.bos_token_id, other.vocab_size, other.num_classes) == (1025, 1030, 0)


def test_names_replace_the_number_of_classes_of_a_preset():
    assert EvatokGeneratorConfig.from_preset("327m", class_names=["cat"]).num_classes == 1
    assert EvatokGeneratorConfig.from_preset("327m", num_classes=7).num_classes == 7


def test_saved_and_loaded(tmp_path):
    config = EvatokGeneratorConfig.from_preset(
        "tiny", class_names=["cat", "dog"], layout="end-of-block", known_frames=3, tokenizer_fingerprint="0" * 16
    )
    config.save_pretrained(tmp_path)
    for loaded in (EvatokGeneratorConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EvatokGeneratorConfig
        fields = (
            "class_names",
            "block_lengths",
            "layout",
            "known_frames",
            "tokenizer_fingerprint",
            "vocab_size",
            "eos_token_id",
        )
        assert all(getattr(loaded, name) == getattr(config, name) for name in fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "prefix"}, "layout must be one of .*'prefix'"),
        ({"codebook_size": 0}, "codebook_size must be a whole number from 1 to .*, got 0"),
        ({"known_frames": 0}, "known_frames must be a whole number from 1 to .*, got 0"),
        ({"num_classes": -1}, "num_classes must be a whole number from 0 to .*, got -1"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "num_classes is 3, but class_names holds 2"),
        ({"num_attention_heads": 3}, "hidden_size 256 is not a multiple of num_attention_heads 3"),
        ({"vocab_size": 5}, "vocab_size follows from codes, blocks and classes: 1034, not 5"),
        ({"eos_token_id": 0}, "eos_token_id follows from"),
        ({"block_lengths": [8, 4]}, "block_lengths"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EvatokGeneratorConfig.from_preset("tiny", **fields)
    with pytest.raises(ValueError, match="unknown preset 'huge'; choose one of .*327m"):
        EvatokGeneratorConfig.from_preset("huge", **fields)


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_that_are_no_class(label):
    config = EvatokGeneratorConfig.from_preset("tiny", class_names=["cat", "dog"])
    with pytest.raises(ValueError, match=f"label {label} is none of the 2 classes 0 to 1"):
        config.class_id(label)
