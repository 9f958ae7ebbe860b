"""Conventional codecs at a number of bits, and the benchmark that sets tokens beside them."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from video_samples import encode, moving_frames

from evatok_hf import EvatokConfig, EvatokModel, EvatokRouter, EvatokRouterConfig
from evatok_hf.metrics import psnr
from evatok_hf.video.codecs import CODECS, CodecBaseline

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("codec", CODECS)
def test_more_bits_are_a_better_picture_within_the_bits(codec):
    frames = moving_frames(6, 64, 64)
    baseline = CodecBaseline(frames, codec)
    small, large = baseline.at_bits(2500), baseline.at_bits(9000)
    assert small.bits <= 2500 < large.bits <= 9000 and small.crf > large.crf

    def quality(made) -> float:
        return psnr(torch.from_numpy(frames)[None], torch.from_numpy(made.frames)[None]).item()

    assert small.frames.shape == frames.shape and quality(large) > quality(small) > 10
    finer = baseline.at_crf(large.crf - 1)
    assert finer.bits > 9000  # nothing finer would have fitted
    assert baseline.at_bits(1).crf == CODECS[codec].coarsest


def test_a_thread_keeps_its_priority(tmp_path):
    before = os.sched_getscheduler(0)
    CodecBaseline(moving_frames(4, 64, 64), "av1").at_crf(40)
    assert os.sched_getscheduler(0) == before
    encode(tmp_path / "clip.mp4", moving_frames(4, 64, 64), "libsvtav1", options={"preset": "12"})
    assert os.sched_getscheduler(0) == before


def test_headers_are_not_counted():
    frames = moving_frames(4, 64, 64)
    for codec in CODECS:
        baseline = CodecBaseline(frames, codec)
        whole = 8 * sum(len(bytes(packet)) for packet in baseline._encode(40))
        assert 0 < baseline.at_crf(40).bits < whole


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="unknown codec 'vvc'"):
        CodecBaseline(np.zeros((2, 16, 16, 3), np.uint8), "vvc")


def test_the_benchmark_sets_tokens_beside_a_codec(tmp_path, monkeypatch, capsys):
    sizes = {"image_size": 32, "patch_size": 8, "block_lengths": (2, 4, 8), "num_frames": 8}
    widths = {"encoder_hidden_size": 32, "encoder_num_layers": 1, "encoder_num_heads": 2}
    widths |= {"decoder_hidden_size": 32, "decoder_num_layers": 1, "decoder_num_heads": 2, "embed_dim": 16}
    torch.manual_seed(0)
    EvatokModel(EvatokConfig(codebook_size=64, **sizes, **widths)).save_pretrained(tmp_path / "model" / "tokenizer")
    router = EvatokRouterConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **sizes)
    EvatokRouter(router).save_pretrained(tmp_path / "model" / "router")
    (tmp_path / "videos").mkdir()
    for number in range(2):
        encode(tmp_path / "videos" / f"{number}.mp4", moving_frames(8, 32, 40))
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    options = ["--data", tmp_path / "videos", "--model", tmp_path / "model", "--output", tmp_path / "out"]
    options += ["--qualities", "1.2"]
    monkeypatch.setattr(sys, "argv", ["codecs.py", *map(str, options)])
    runpy.run_path(str(BENCHMARKS / "quality" / "codecs.py"), run_name="__main__")

    report = json.loads((tmp_path / "out" / "codecs.json").read_text())
    assert [point["point"] for point in report["points"]] == ["uniform 2", "uniform 4", "uniform 8", "router 1.2"]
    first = report["points"][0]["systems"]
    assert first["tokens"]["bits"] == pytest.approx(4 * 2 * 6 + 4 * np.log2(3))
    assert first["h264"]["too_large"] == 2 and report["clips"] == 2
    assert "H.264" in capsys.readouterr().out and (tmp_path / "out" / "codecs.png").stat().st_size > 5000
