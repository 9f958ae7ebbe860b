"""Without the decoder: the same tokens under the same fingerprint, none of its weights, and a clear no to decoding."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import refused, run, run_json
from tokenizer_samples import MIXED, make_tokenizer, real_clips
from transformers import AutoModel
from video_samples import make_video, moving_frames

import evatok_hf.models.modeling_evatok as modeling
from evatok_hf import EvatokModel, VideoTokenizer, VideoTokens
from evatok_hf.allocation import Allocation
from evatok_hf.models.base_evatok import AbsentWeights


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(saved):
    return EvatokModel.from_pretrained(saved)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """21 frames: one full clip and a tail of 5."""
    return make_video(tmp_path_factory.mktemp("video"), frames=moving_frames(21))


@pytest.fixture
def no_decoder(monkeypatch):
    """From here on, a decoder with memory of its own is an error; one on the meta device only names its weights."""
    real = modeling.EvatokDecoder.__init__

    def refuse(self, config):
        assert torch.empty(0).is_meta
        real(self, config)

    monkeypatch.setattr(modeling.EvatokDecoder, "__init__", refuse)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [EvatokModel.from_pretrained, AutoModel.from_pretrained], ids=["EvatokModel", "Auto"])
def test_the_same_tokens_without_a_decoder(saved, whole, no_decoder, load):
    model = load(saved, decoder=False)
    assert model.decoder is None and not any(name.startswith("decoder") for name, _ in model.named_parameters())
    tokens, expected = model.encode(real_clips(), MIXED), whole.encode(real_clips(), MIXED)
    assert torch.equal(tokens.ids, expected.ids) and tokens.fingerprint == expected.fingerprint
    assert torch.equal(whole.decode(tokens), whole.decode(expected))


def test_nothing_of_the_decoder_is_read_before_a_fingerprint_is_asked_for(saved, whole, monkeypatch):
    @contextmanager
    def opened(self):
        raise AssertionError("read")
        yield

    monkeypatch.setattr(AbsentWeights, "opened", opened)
    model = EvatokModel.from_pretrained(saved, decoder=False)
    ids = model.encode_block(real_clips()[:1, :4], 8, model.start_encoding())
    assert torch.equal(ids, whole.encode_block(real_clips()[:1, :4], 8, whole.start_encoding()))
    with pytest.raises(AssertionError, match="read"):
        model.fingerprint()


def test_the_fingerprint_is_of_all_weights(saved, whole, tmp_path):
    assert EvatokModel.from_pretrained(saved, decoder=False).fingerprint() == whole.fingerprint()
    half = EvatokModel.from_pretrained(saved, decoder=False, dtype=torch.bfloat16)
    assert half.fingerprint() == whole.fingerprint() == half.float().fingerprint()
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert EvatokModel.from_pretrained(tmp_path / "shards", decoder=False).fingerprint() == whole.fingerprint()

    other = copy.deepcopy(whole)
    with torch.no_grad():
        other.decoder.to_patch.bias.add_(1)
    other.save_pretrained(tmp_path / "other")
    without = EvatokModel.from_pretrained(tmp_path / "other", decoder=False)
    assert without.fingerprint() == other.fingerprint() != whole.fingerprint()
    with torch.no_grad():
        for model in (other, without):
            model.encoder.norm.bias.add_(1)
    assert without.fingerprint() == other.fingerprint()
    assert pickle.loads(pickle.dumps(without)).fingerprint() == copy.deepcopy(without).fingerprint()


def test_files_that_changed_since_give_no_fingerprint(saved, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(saved, folder)
    model = EvatokModel.from_pretrained(folder, decoder=False)
    make_tokenizer(seed=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="changed since"):
        model.encode(real_clips(), 2)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="changed since"):
        model.fingerprint()


def test_a_checkpoint_with_a_broken_decoder_is_refused(saved, tmp_path):
    def broken(name, change):
        shutil.copytree(saved, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    lacking = broken("lacking", lambda weights: weights.pop("decoder.to_patch.weight"))
    with pytest.raises(ValueError, match="lacks tensors: decoder.to_patch.weight"):
        EvatokModel.from_pretrained(lacking, decoder=False)
    with pytest.raises(ValueError, match="has unknown tensors: decoder.more"):
        EvatokModel.from_pretrained(broken("more", lambda w: w.update({"decoder.more": torch.ones(1)})), decoder=False)
    with pytest.raises(ValueError, match="encoder.norm.bias"):
        EvatokModel.from_pretrained(broken("encoder", lambda w: w.pop("encoder.norm.bias")), decoder=False)


def test_what_needs_the_decoder_is_refused(saved, whole, tmp_path):
    model = EvatokModel.from_pretrained(saved, decoder=False)
    tokens = whole.encode(real_clips()[:1], 2)
    for call in (
        lambda: model.decode(tokens),
        lambda: model.check_tokens(tokens),
        lambda: model.start_decoding(),
        lambda: model(real_clips()),
        lambda: model.save_pretrained(tmp_path / "none"),
    ):
        with pytest.raises(ValueError, match="decoder=False"):
            call()
    assert not (tmp_path / "none").exists()


# --- whole videos -----------------------------------------------------------------------------------------------------


def test_a_video_is_encoded_here_and_decoded_elsewhere(checkpoint, video, no_decoder, monkeypatch, tmp_path):
    tokenizer = VideoTokenizer.from_pretrained(checkpoint, decoder=False)
    tokenizer.encode(video, 8).save(tmp_path / "tokens")
    assert [clip.lengths for clip in tokenizer.route(video, 8)] == [[8] * 4] * 2
    tokens = VideoTokens.load(tmp_path / "tokens")
    for call in (
        lambda: tokenizer.decode(tokens),
        lambda: tokenizer.reconstruct(video, 8),
        lambda: tokenizer.streaming_decode(),
        lambda: tokenizer.encode(video, Allocation(threshold=1.0, metric="perceptual-effnet-lite0")),
        lambda: tokenizer.save_pretrained(tmp_path / "none"),
    ):
        with pytest.raises(ValueError, match="decoder=False"):
            call()
    assert not (tmp_path / "none" / "tokenizer").exists()
    monkeypatch.undo()
    shown = np.concatenate(list(VideoTokenizer.from_pretrained(checkpoint).decode(tokens)))
    assert shown.shape == (21, 64, 64, 3)


@pytest.mark.parametrize("options", [[], ["--tokens-only"]])
def test_the_encode_command_has_no_decoder(checkpoint, video, no_decoder, tmp_path, options):
    report = run_json("encode", video, tmp_path / "t.safetensors", "--model", checkpoint, *options)
    assert report["frames"] == 21 and report["fingerprint"] and "psnr" not in report
    routed = run_json("route", video, "--model", checkpoint)
    assert routed["fingerprint"] == report["fingerprint"]


def test_tokens_only_and_a_search_contradict_each_other(checkpoint, video, tmp_path):
    options = ["--threshold", 0.5, "--metric", "perceptual-effnet-lite0", "--tokens-only", "--model", checkpoint]
    assert "--tokens-only" in refused(run("encode", video, tmp_path / "t.safetensors", *options), code=2)
    assert not list(tmp_path.iterdir())


# --- overlap on the command line --------------------------------------------------------------------------------------


def test_clips_overlap_on_the_command_line(checkpoint, video, tmp_path):
    model, path = ["--model", checkpoint], tmp_path / "t.safetensors"
    encoded = run_json("encode", video, path, "--uniform", 8, "--overlap", 4, *model)
    assert (encoded["overlap"], encoded["frames"], len(encoded["clips"])) == (4, 21, 2)
    assert run_json("info", path)["overlap"] == 4
    decoded = run_json("decode", path, tmp_path / "o.mp4", "--blend", "carry", *model)
    shown = run_json("reconstruct", video, "--uniform", 8, "--overlap", 4, "--blend", "carry", *model)
    assert decoded["frames"] == shown["frames"] == 21 and json.dumps(shown["psnr"]) != "null"
    assert "0 to 8" in refused(run("encode", video, path, "--overlap", 9, *model))
    assert "fade, cut, carry" in refused(run("decode", path, tmp_path / "p.mp4", "--blend", "mix", *model), code=2)
    assert not (tmp_path / "p.mp4").exists()
