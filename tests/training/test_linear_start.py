"""training/tokenizer/linear_start.py: a tokenizer that codes real clips before its first step."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from tokenizer_samples import TINY, make_tokenizer, real_clips, real_frames
from torch import nn
from torch.nn import functional as F
from training_samples import MODEL, make_videos, options, read_log, train

from evatok_hf import EvatokConfig, EvatokModel
from evatok_hf.data.streaming import to_float
from evatok_hf.metrics import psnr
from evatok_hf.models.modeling_evatok import nearest_codes
from training.tokenizer import linear_start
from training.tokenizer.arguments import TokenizerArguments
from training.tokenizer.linear_start import _fit, start_linear, start_together

LENGTHS = (2, 8, 32)
FIELDS = {
    "position_embedding": "pooled",
    "interlaced_positions": False,
    "codebook_size": 64,
    "token_patches": True,
    "initialization": "scaled",
}


@pytest.fixture(scope="module")
def started() -> tuple[EvatokModel, torch.Tensor]:
    """A model that started on crops of a video, and others of them."""
    frames = to_float(real_frames().permute(0, 1, 4, 2, 3))  # (3, 16, 3, 272, 640)
    frames = F.avg_pool2d(frames.flatten(0, 1), 3).unflatten(0, (3, 16))
    clips = torch.cat([frames[..., y : y + 32, x : x + 32] for y in range(0, 58, 8) for x in range(0, 181, 8)])
    torch.manual_seed(0)
    model = EvatokModel(EvatokConfig(**TINY | FIELDS | {"block_lengths": LENGTHS})).eval()
    start_linear(model, clips[::2], torch.Generator().manual_seed(0))
    return model, clips[1::20]


def test_more_tokens_say_more_of_a_clip_before_the_first_step(started):
    model, clips = started
    values = [psnr(clips, model.decode(model.encode(clips, length))).mean() for length in LENGTHS]
    assert values[0] + 1 < values[1] < values[2] - 1


def test_a_scene_at_rest_gets_better_from_block_to_block(started):
    model, clips = started
    still = clips[:, :1].expand(-1, 16, -1, -1, -1)
    for length in LENGTHS[1:]:
        first, *others = (
            (model.decode(model.encode(still, length)) - still).square().unflatten(1, (4, 4)).mean((0, 2, 3, 4, 5))
        )
        assert all(error < 0.8 * first for error in others)


def test_the_filters_in_the_loop_take_error_away(started):
    model, clips = copy.deepcopy(started[0]), started[1]
    assert all(model.codec.filter_of(length)[0].abs().sum() > 0 for length in LENGTHS[1:])
    values = []
    for _ in range(2):
        values.append([psnr(clips, model.decode(model.encode(clips, length))).mean() for length in LENGTHS[1:]])
        with torch.no_grad():
            for parameter in model.codec.filters.parameters():
                parameter.zero_()
    assert all(value > without + 0.1 for value, without in zip(*values, strict=True))


def test_what_varies_least_is_kept_however_many_values_there_are():
    spread = torch.tensor([1.0, 0.1, 0.03, 0.0])
    values = (torch.randint(4, (2**17, 4), generator=torch.Generator().manual_seed(0)) - 1.5) * spread
    inward, outward = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        codes = _fit(inward, outward, values, 512, 1.0, torch.Generator().manual_seed(0))
        features = F.normalize(inward(values / 4), dim=-1)
        error = outward(F.normalize(codes, dim=-1)[nearest_codes(features, codes)]) - values
    assert (error.square().mean(0)[:3] < 0.2 * values.var(0)[:3]).all()


def test_a_model_that_cannot_start_so_is_refused():
    with pytest.raises(ValueError, match="with token_patches"):
        TokenizerArguments(output_dir="run", train_data=["videos"], linear_start=8)
    with pytest.raises(ValueError, match=r"\d+ tokens or residuals, fewer than 4096 codes; give more clips"):
        start_linear(make_tokenizer(**FIELDS | {"codebook_size": 8192}), real_clips()[:1], torch.Generator())


def test_a_run_without_a_start_is_refused(tmp_path):
    (tmp_path / "videos").mkdir()
    videos = make_videos(tmp_path / "videos")
    with pytest.raises(ValueError, match="needs --linear_start, 256 say; else give --init_from"):
        train(options(tmp_path / "run", videos, "--steps=1", f"--model_overrides={json.dumps(MODEL | FIELDS)}"))


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


def test_clips_in_the_memory_of_an_accelerator_start_a_model_that_is_not_there_yet(started, monkeypatch):
    model, clips = copy.deepcopy(started[0]), (started[1] * 127.5 + 127.5).to(torch.uint8)
    there = SimpleNamespace(cpu=lambda: clips)  # nothing else can be done with it here
    monkeypatch.setattr(linear_start, "collate", lambda items: {"pixel_values_videos": there})
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1, device=torch.device("cpu"))
    start_together(accelerator, model, iter([None]), 1, 0)
    assert not torch.equal(model.quantizer.weight, started[0].quantizer.weight)
