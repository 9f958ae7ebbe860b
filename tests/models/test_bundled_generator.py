"""The generator that comes with the package: it belongs to the tokenizer, knows its classes, and has adapted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from evatok_hf import EvatokPipeline, default_checkpoint

FOLDER = Path(default_checkpoint("generator"))


@pytest.fixture(scope="module")
def pipe() -> EvatokPipeline:
    pipe = EvatokPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_whole_checkpoint_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 80e6


def test_the_card_is_of_these_weights(pipe):
    card = ModelCard((FOLDER / "generator" / "README.md").read_text())
    assert card.data.license == "apache-2.0"
    assert pipe.generator.fingerprint() in card.text and pipe.tokenizer.fingerprint() in card.text
    report = json.loads((FOLDER / "generator" / "generation.json").read_text())
    assert report["classes"] == pipe.classes


def test_classes_look_and_cost_as_they_should(pipe):
    out = pipe(
        ["rocket_basic", "take_cover", "health_gathering"], num_videos_per_prompt=6, seeds=range(18), output_type="pt"
    )
    tokens = out.tokens.lengths.sum(-1).double().reshape(3, 6).mean(-1)
    assert tokens[0] > tokens[1] and tokens[0] > tokens[2]  # a moving world against two calm ones
    assert tokens.max() < 0.8 * 4 * 64  # of the uniform baseline
    colours = out.frames.reshape(3, 6, 16, 3, 64, 64)[:, :, :, :, 32:].mean((1, 2, 4, 5))  # (3, RGB) of the lower half
    assert colours[2, 1] == colours[2].max()  # green ground
    assert colours[0].mean() > colours[2].mean()  # a bright world, a dark one


def test_a_clip_that_stands_still_is_predicted_to_go_on_like_itself(pipe):
    seen = pipe("take_cover", seeds=[3], output_type="pt").frames[0, :5]  # (5, 3, 64, 64)
    still = seen[-1:].expand(5, -1, -1, -1).permute(0, 2, 3, 1).numpy()
    out = pipe.predict(still, num_frames=16, seeds=[0], output_type="pt").frames[0]
    assert out.shape == (16, 3, 64, 64)
    error = (out[5:] - seen[-1]).square().mean()
    assert -10 * torch.log10(error) > 20  # dB
