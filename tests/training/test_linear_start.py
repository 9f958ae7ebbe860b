"""training/tokenizer/linear_start.py: a tokenizer that codes real clips before its first step."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizer_samples import TINY, make_tokenizer, real_clips, real_frames
from training_samples import MODEL, make_videos, options, read_log, train

from evatok_hf import EvatokConfig, EvatokModel
from evatok_hf.data.streaming import to_float
from evatok_hf.metrics import psnr
from training.tokenizer.linear_start import start_linear

FIELDS = {
    "position_embedding": "pooled",
    "interlaced_positions": False,
    "codebook_size": 64,
    "token_patches": True,
    "initialization": "scaled",
}


def test_more_tokens_say_more_of_a_clip_before_the_first_step():
    model, clips = EvatokModel(EvatokConfig(**TINY | FIELDS)).eval(), real_clips()
    start_linear(model, clips, torch.Generator().manual_seed(0))
    values = [psnr(clips, model.decode(model.encode(clips, length))).mean() for length in (2, 8, 32)]
    assert values[0] + 0.5 < values[1] < values[2] - 0.5


def test_the_filters_in_the_loop_take_error_away_on_clips_that_they_have_not_seen():
    frames = to_float(real_frames().permute(0, 1, 4, 2, 3))  # (3, 16, 3, H, W)
    crops = [frames[..., y : y + 32, x : x + 32] for y in range(0, 112, 8) for x in range(0, 160, 8)]
    clips = torch.cat(crops)
    seen, others = clips[::2], clips[1::2][::10]
    model = EvatokModel(EvatokConfig(**TINY | FIELDS | {"block_lengths": (4, 16)})).eval()
    start_linear(model, seen, torch.Generator().manual_seed(0))
    assert all(conv.weight.abs().sum() > 0 for conv in model.codec.filters)
    values = [psnr(others, model.decode(model.encode(others, length))).mean() for length in (4, 16)]
    with torch.no_grad():
        for conv in model.codec.filters:
            conv.weight.zero_()
            conv.bias.zero_()
    plain = [psnr(others, model.decode(model.encode(others, length))).mean() for length in (4, 16)]
    assert all(value > without + 0.1 for value, without in zip(values, plain, strict=True))


def test_a_model_that_cannot_start_so_is_refused():
    clips, generator = real_clips(), torch.Generator()
    with pytest.raises(ValueError, match="with token_patches"):
        start_linear(make_tokenizer(), clips, generator)
    with pytest.raises(ValueError, match=r"1 clips have \d+ tokens, fewer than codes; give more clips"):
        start_linear(make_tokenizer(**FIELDS | {"codebook_size": 8192}), clips[:1], generator)


def test_a_run_starts_where_others_end(tmp_path):
    (tmp_path / "videos").mkdir()
    videos = make_videos(tmp_path / "videos")
    model = f"--model_overrides={json.dumps(MODEL | FIELDS)}"
    run = options(tmp_path / "run", videos, "--steps=1", "--linear_start=8", model)
    train(run)
    plain = options(tmp_path / "plain", videos, "--steps=1")
    train(plain)
    first, other = (read_log(tmp_path / name)[0]["psnr"] for name in ("run", "plain"))
    assert first > other + 5
