"""What comes with the package: the checkpoint, its card, and the sample clip, used as a newcomer would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import evatok_hf
from evatok_hf import EvatokModel, VideoTokenizer
from evatok_hf.cli.commands import app
from evatok_hf.video import read_video
from training.make_card import load_texts, render_card

ROOT = Path(__file__).parents[2]

CHECKPOINT = Path(evatok_hf.default_checkpoint()) / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return VideoTokenizer.from_pretrained()


def test_it_is_small_and_complete():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    names = {path.name for path in files}
    assert {"config.json", "model.safetensors", "video_preprocessor_config.json", "training.json", "README.md"} <= names
    assert EvatokModel.from_pretrained(CHECKPOINT).dtype == torch.bfloat16


def test_the_card_is_what_its_files_say():
    texts = load_texts(ROOT / "model_cards" / "evatok_tiny.yaml")
    evaluation, scores = (json.loads((CHECKPOINT / f"{name}.json").read_text()) for name in ("evaluation", "scores"))
    assert render_card(CHECKPOINT, evaluation, texts, scores) == (CHECKPOINT / "README.md").read_text()


def test_a_card_is_refused_the_evaluation_of_other_weights():
    texts = load_texts(ROOT / "model_cards" / "evatok_tiny.yaml")
    evaluation = json.loads((CHECKPOINT / "evaluation.json").read_text())
    with pytest.raises(ValueError, match="run benchmarks/quality/reconstruction.py on it again"):
        render_card(CHECKPOINT, {**evaluation, "fingerprint": "0" * 16}, texts)


def test_quality_rises_with_length(tokenizer, sample_clip):
    quality = [
        sum(clip.psnr for clip in tokenizer.reconstruct(sample_clip, length, max_clips=4)) / 4
        for length in (8, 32, 128)
    ]
    assert quality[0] < quality[1] < quality[2]
    assert quality[1] > 15


def test_the_commands_use_it_by_default(sample_clip, tmp_path):
    result = CliRunner().invoke(app, ["encode", str(sample_clip), str(tmp_path / "t.safetensors"), "--max-clips", "2"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["decode", str(tmp_path / "t.safetensors"), str(tmp_path / "decoded.mp4")])
    assert result.exit_code == 0, result.output
    arguments = [str(sample_clip), str(tmp_path / "direct.mp4"), "--max-clips", "2"]
    result = CliRunner().invoke(app, ["reconstruct", *arguments])
    assert result.exit_code == 0, result.output
    decoded, fps = read_video(tmp_path / "decoded.mp4")
    direct, _ = read_video(tmp_path / "direct.mp4")
    assert decoded.shape == (32, 64, 64, 3) and (decoded == direct).all()
    assert fps == pytest.approx(read_video(sample_clip)[1])
