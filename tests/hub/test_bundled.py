"""The checkpoints that come with the package are found by name, everywhere a checkpoint may be named."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from evatok_hf import EvatokPipeline, VideoTokenizer, VideoTokens, bundled_checkpoints, default_checkpoint
from evatok_hf.bundled import find_checkpoint
from evatok_hf.cli.commands import app


def test_every_bundled_checkpoint_has_a_tokenizer_and_a_router():
    for name, folder in bundled_checkpoints().items():
        assert Path(folder).name == name
        assert all(Path(folder, part, "model.safetensors").is_file() for part in ("tokenizer", "router"))


def test_the_default_is_the_first_that_has_what_is_wanted():
    folders = bundled_checkpoints().values()
    assert default_checkpoint() == next(iter(folders))
    assert default_checkpoint("generator") == next(f for f in folders if Path(f, "generator").is_dir())
    with pytest.raises(ValueError, match="has a decoder; ask for tokenizer"):
        default_checkpoint("decoder")


def test_a_bundled_checkpoint_loads_by_its_name():
    assert VideoTokenizer.from_pretrained("evatok-tiny", decoder=False).name == "evatok-tiny"
    assert EvatokPipeline.from_pretrained("evatok-tiny").tokenizer.config.image_size == 64


def test_the_commands_take_the_name():
    done = CliRunner().invoke(app, ["classes", "--model", "evatok-tiny"])
    assert done.exit_code == 0 and "basic" in done.stdout
    done = CliRunner().invoke(app, ["info", "evatok-huge"])
    assert done.exit_code != 0 and "come with the package are" in done.output


@pytest.mark.parametrize("name", bundled_checkpoints())
def test_tokens_are_decoded_by_the_bundled_checkpoint_that_made_them(name, sample_clip, tmp_path):
    tokens, options = tmp_path / "t.safetensors", ["--max-clips", "1", "--model", name]
    done = CliRunner().invoke(app, ["encode", str(sample_clip), str(tokens), *options])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["decode", str(tokens), str(tmp_path / "v.mp4"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["checkpoint"] == name, done.output
    ids, lengths = torch.zeros(128, dtype=torch.int64), torch.tensor([[32] * 4])
    VideoTokens(ids, lengths, fps=25.0, fingerprint="0" * 16).save(tokens)
    done = CliRunner().invoke(app, ["decode", str(tokens), str(tmp_path / "v.mp4")])
    assert done.exit_code == 1 and "0" * 16 in done.output


def test_a_folder_here_goes_before_a_bundled_checkpoint_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "evatok-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("evatok-tiny") == "evatok-tiny"
