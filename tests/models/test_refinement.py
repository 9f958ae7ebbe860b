"""Refinement: better ids for the same numbers of tokens, by descent through the decoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizer_samples import make_tokenizer, real_clips
from typer.testing import CliRunner

from evatok_hf import EvatokEncoderModel, EvatokModel, VideoTokenizer, VideoTokens
from evatok_hf.cli.commands import app
from evatok_hf.metrics import psnr
from evatok_hf.models.modeling_evatok import VectorQuantizer, refined_ids
from evatok_hf.video.read import open_video

STEPS = 3


@pytest.fixture(scope="module")
def model(checkpoint) -> EvatokModel:
    return EvatokModel.from_pretrained(checkpoint / "tokenizer").eval()


@pytest.fixture(scope="module")
def clips(checkpoint, sample_clip) -> torch.Tensor:
    """Two real clips, (2, 16, 3, 64, 64)."""
    found = VideoTokenizer.from_pretrained(checkpoint).clips(sample_clip, max_clips=2)
    return torch.cat([clip.pixel_values_videos for clip in found])


def test_real_frames_come_back_sharper(sample_clip):
    tokenizer = VideoTokenizer.from_pretrained("evatok-tiny")
    plain, refined = (
        next(tokenizer.reconstruct(sample_clip, 32, max_clips=1, refinement_steps=steps)) for steps in (0, STEPS)
    )
    assert refined.lengths == plain.lengths
    assert refined.psnr > plain.psnr + 0.3
    before, after = (
        psnr(*(torch.from_numpy(frames[None, :4]) for frames in (clip.original, clip.reconstruction)))
        for clip in (plain, refined)
    )
    assert before < after  # later blocks, which stand on others than they did, gain together


def test_no_steps_are_the_encoders_ids_and_steps_are_repeatable(model, clips):
    assert torch.equal(model.encode(clips, 16, 0).ids, model.encode(clips, 16).ids)
    refined = model.encode(clips, 16, STEPS)
    assert not torch.equal(refined.ids, model.encode(clips, 16).ids)
    assert torch.equal(refined.ids, model.encode(clips, 16, STEPS).ids)
    assert refined.fingerprint == model.fingerprint()


def test_a_clip_is_refined_alike_alone_in_a_batch_and_in_inference_mode(model, clips):
    lengths = torch.tensor([[16, 8, 8, 32], [8, 32, 16, 8]])
    together = model.encode(clips, lengths, STEPS)
    with torch.inference_mode():
        alone = model.encode(clips[1:], lengths[1:], STEPS)
    assert torch.equal(together.clip(1).ids, alone.ids)


def test_later_frames_change_no_earlier_ids(model, clips):
    changed = clips[:1].clone()
    changed[:, 8:] = clips[1:, 8:]
    before, after = (model.encode(video, 16, STEPS).ids for video in (clips[:1], changed))
    assert torch.equal(before[:32], after[:32])
    assert not torch.equal(before[32:], after[32:])


def test_the_best_ids_on_the_way_are_kept():
    generator = torch.Generator().manual_seed(0)
    quantizer = VectorQuantizer(64, 4, 0.01)
    quantizer.weight.data = torch.randn(64, 4, generator=generator)
    features, wanted = (torch.randn(8, 4, generator=generator) for _ in range(2))
    frames = torch.nn.functional.normalize(wanted, dim=-1)[None]  # what the codes themselves shall be
    errors = []
    for steps in (0, 1, 5, 100):
        ids = refined_ids(quantizer, features, frames, lambda codes: codes[None], steps)
        errors.append((quantizer.to_codes(ids) - frames[0]).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2
    # with a code of its own for every token, a long search comes near the nearest codes
    nearest = (quantizer.to_codes(quantizer.to_ids(frames[0])) - frames[0]).square().mean().item()
    assert errors[-1] < 1.5 * nearest


def test_the_model_is_left_as_it_was(checkpoint, clips):
    model = EvatokModel.from_pretrained(checkpoint / "tokenizer").train()
    model.gradient_checkpointing_enable()
    expected = EvatokModel.from_pretrained(checkpoint / "tokenizer").eval().encode(clips[:1], 16, STEPS).ids
    assert torch.equal(model.encode(clips[:1], 16, STEPS).ids, expected)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_in_bfloat16(checkpoint, clips):
    model = EvatokModel.from_pretrained(checkpoint / "tokenizer", dtype=torch.bfloat16).eval()
    tokens = model.encode(clips[:1].bfloat16(), 16, STEPS)
    assert model.decode(tokens).dtype == torch.bfloat16


def test_blocks_come_out_as_those_of_the_clip(checkpoint, sample_clip):
    tokenizer = VideoTokenizer.from_pretrained(checkpoint)
    with open_video(sample_clip) as video:
        frames = np.concatenate(list(video.iter_chunks(16)))[:20]
    whole = tokenizer.encode(sample_clip, 16, max_clips=1, refinement_steps=STEPS)
    with tokenizer.streaming(16, part="block", refinement_steps=STEPS) as stream:
        parts = [tokens for row in np.split(frames, 4) for tokens in stream.push(row)]
    assert torch.equal(torch.cat([part.ids for part in parts[:4]]), whole.ids)


def test_the_command_refines_and_files_decode_as_shown(checkpoint, sample_clip, tmp_path):
    options = ["--model", str(checkpoint), "--uniform", "16", "--max-clips", "1", "--refine", str(STEPS), "--json"]

    def run(*arguments: str) -> dict:
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    run("encode", str(sample_clip), str(tmp_path / "t.safetensors"))
    report = run("reconstruct", str(sample_clip))
    assert report["refinement_steps"] == STEPS
    tokenizer = VideoTokenizer.from_pretrained(checkpoint)
    tokens = VideoTokens.load(tmp_path / "t.safetensors")
    [clip] = tokenizer.reconstruct(sample_clip, 16, max_clips=1, refinement_steps=STEPS)
    assert np.array_equal(np.concatenate(list(tokenizer.decode(tokens))), clip.reconstruction)
    assert report["clips"][0]["psnr"] == pytest.approx(clip.psnr)


def test_what_cannot_be_refined_is_refused(checkpoint, model, clips, sample_clip, tmp_path):
    with pytest.raises(ValueError, match="refinement_steps is -1; give a whole number"):
        model.encode(clips, 16, -1)
    with pytest.raises(ValueError, match=r"refinement_steps is 2\.5"):
        VideoTokenizer.from_pretrained(checkpoint).reconstruct(sample_clip, 16, refinement_steps=2.5)
    light = EvatokEncoderModel.from_pretrained(checkpoint / "tokenizer")
    with pytest.raises(ValueError, match="without its decoder and cannot refine"):
        light.encode(clips, 16, 1)
    state = model.start_encoding()
    model.encode_block(clips[:1, :4], 16, state)
    with pytest.raises(ValueError, match="refine all blocks of a clip or none"):
        model.encode_block(clips[:1, 4:8], 16, state, 1)
    state = model.start_encoding()
    model.encode_block(clips[:1, :4], 16, state, 1)
    with pytest.raises(ValueError, match="refine all blocks of a clip or none"):
        model.encode_block(clips[:1, 4:8], 16, state)
    arguments = [str(sample_clip), str(tmp_path / "t.safetensors"), "--refine", "2", "--tokens-only"]
    result = CliRunner().invoke(app, ["encode", *arguments])
    assert result.exit_code != 0 and "--refine reconstructs clips" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [0, 2])
def test_tokens_that_are_residuals_predict_from_the_frames_that_a_decoder_has(steps):
    model = make_tokenizer(position_embedding="pooled", token_patches=True)
    encoding, decoding = model.start_encoding(), model.start_decoding()
    for frames in real_clips()[:1].split(model.config.frames_per_block, dim=1):
        model.decode_block(model.encode_block(frames, 8, encoding, steps), decoding)
        if encoding.block < model.config.num_blocks:  # no block looks at the clip's last frame
            torch.testing.assert_close(encoding.last, decoding.last, rtol=1e-4, atol=1e-4)
