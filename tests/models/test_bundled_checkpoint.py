"""What comes with the package: the checkpoints, their cards, and the sample clip, used as a newcomer would."""

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

CHECKPOINTS = evatok_hf.bundled_checkpoints()


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request) -> Path:
    """Of a bundled tokenizer."""
    return Path(CHECKPOINTS[request.param]) / "tokenizer"


def texts_of(folder: Path) -> dict:
    return load_texts(ROOT / "model_cards" / f"{folder.parent.name.replace('-', '_')}.yaml")


def test_it_is_small_and_complete(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    names = {path.name for path in files}
    assert {"config.json", "model.safetensors", "video_preprocessor_config.json", "training.json", "README.md"} <= names
    assert EvatokModel.from_pretrained(folder).dtype == torch.bfloat16


def test_the_card_is_what_its_files_say(folder):
    evaluation, scores = (json.loads((folder / f"{name}.json").read_text()) for name in ("evaluation", "scores"))
    assert render_card(folder, evaluation, texts_of(folder), scores) == (folder / "README.md").read_text()


def test_a_card_is_refused_the_evaluation_of_other_weights(folder):
    evaluation = json.loads((folder / "evaluation.json").read_text())
    with pytest.raises(ValueError, match="run benchmarks/quality/reconstruction.py on it again"):
        render_card(folder, {**evaluation, "fingerprint": "0" * 16}, texts_of(folder))


def test_quality_rises_with_length(folder, sample_clip):
    tokenizer = VideoTokenizer.from_pretrained(folder)
    quality = [
        sum(clip.psnr for clip in tokenizer.reconstruct(sample_clip, length, max_clips=4)) / 4
        for length in tokenizer.model.config.block_lengths[::2]
    ]
    assert quality[0] < quality[1] < quality[2]
    assert quality[1] > 15


def test_ids_of_a_clip_are_its_own_in_a_batch(folder, sample_clip):
    tokenizer = VideoTokenizer.from_pretrained(folder)
    video = torch.cat([clip.pixel_values_videos for clip in tokenizer.clips(sample_clip, max_clips=2)])
    short, middle, *_ = tokenizer.model.config.block_lengths
    together = tokenizer.model.encode(video, lengths=[[middle, short, short, middle], [short, middle, short, short]])
    for index in range(2):
        alone = tokenizer.model.encode(video[index : index + 1], lengths=together.lengths[index : index + 1])
        assert torch.equal(alone.ids, together.clip(index).ids)


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
    side = VideoTokenizer.from_pretrained(decoder=False).model.config.image_size
    assert decoded.shape == (32, side, side, 3) and (decoded == direct).all()
    assert fps == pytest.approx(read_video(sample_clip)[1])
