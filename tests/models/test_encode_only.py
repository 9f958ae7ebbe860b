"""Without the decoder: the same tokens under the same fingerprint, none of its weights, and a clear no to decoding."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import refused, run, run_json
from tokenizer_samples import MIXED, make_tokenizer, real_clips
from transformers import AutoModel
from video_samples import make_video, moving_frames

import evatok_hf.models.modeling_evatok as modeling
from evatok_hf import EvatokEncoderModel, EvatokModel, VideoTokenizer, VideoTokens
from evatok_hf.allocation import Allocation


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
    """From here on, a decoder is an error."""

    def refuse(self, config):
        raise AssertionError("a decoder was made")

    monkeypatch.setattr(modeling.EvatokDecoder, "__init__", refuse)


# --- models -----------------------------------------------------------------------------------------------------------


def test_the_same_tokens_without_a_decoder(saved, whole, no_decoder):
    model = EvatokEncoderModel.from_pretrained(saved)
    assert not any(name.startswith("decoder") for name, _ in model.named_parameters())
    expected = whole.encode(real_clips(), MIXED)
    for tokens in (model.encode(real_clips(), MIXED), model(real_clips(), MIXED)):
        assert torch.equal(tokens.ids, expected.ids) and tokens.fingerprint == expected.fingerprint
    half = EvatokEncoderModel.from_pretrained(saved, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.fingerprint() == whole.fingerprint()


def test_it_is_saved_by_itself_and_its_tokens_are_still_those_of_the_whole(saved, whole, tmp_path):
    EvatokEncoderModel.from_pretrained(saved).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.7 * (saved / "model.safetensors").stat().st_size
    again = EvatokEncoderModel.from_pretrained(tmp_path)
    tokens = again.encode(real_clips(), MIXED)
    assert torch.equal(whole.decode(tokens), whole.decode(whole.encode(real_clips(), MIXED)))
    with pytest.raises(ValueError, match="lacks tensors: decoder"):
        EvatokModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("load", [EvatokModel.from_pretrained, AutoModel.from_pretrained], ids=["EvatokModel", "Auto"])
def test_the_argument_of_before_still_works(saved, load):
    with pytest.warns(FutureWarning, match="EvatokEncoderModel"):
        assert type(load(saved, decoder=False)) is EvatokEncoderModel


def test_an_encoder_that_is_not_whole_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "broken")
    weights = load_file(saved / "model.safetensors")
    weights.pop("encoder.norm.bias")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks tensors: encoder.norm.bias"):
        EvatokEncoderModel.from_pretrained(tmp_path / "broken")


def test_gradient_reaches_its_parameters(saved):
    model = EvatokEncoderModel.from_pretrained(saved)
    layout = modeling.PaddedLayout(torch.tensor(MIXED))
    model.features(real_clips(), layout).sum().backward()
    assert not [name for name, p in model.encoder.named_parameters() if p.grad is None]


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
        with pytest.raises(ValueError, match="without its decoder"):
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
