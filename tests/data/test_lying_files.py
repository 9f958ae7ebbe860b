"""What files must not be able to do: take memory before they are checked, run code, or be another run's silently."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from test_damaged_files import MODELS, Run
from test_token_dataset import LENGTHS
from test_token_dataset import write as write_tokens
from typer.testing import CliRunner
from video_samples import encode, moving_frames

from evatok_hf import EvatokModel, EvatokVideoProcessor, default_checkpoint
from evatok_hf.cli.commands import app
from evatok_hf.data.clip_sources import open_source, source_state
from evatok_hf.data.parquet_shards import is_whole
from evatok_hf.data.token_dataset import SHARDS, TokenDataset
from evatok_hf.video import open_video
from training.common import checkpoints


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        *((part, "num_labels", 10**9) for part in MODELS),
        *((part, "dtype", "load") for part in MODELS),
        *((part, "to_dict", 3) for part in MODELS),
        *((part, "attn_implementation", "somebody/kernel") for part in MODELS),
        ("tokenizer", "encoder_num_heads", 0),
        ("tokenizer", "image_size", 8192),
        ("tokenizer", "codebook_size", 10**12),
        ("tokenizer", "layer_norm_eps", float("inf")),
        ("router", "hidden_act", "evil"),
        ("router", "num_blocks", 16),
        ("generator", "hidden_act", "evil"),
        ("generator", "num_attention_heads", 0),
        ("generator", "fps", float("inf")),
        ("generator", "rope_parameters", {"rope_type": "evil"}),
    ],
)
def test_a_configuration_is_refused_when_it_is_made_and_when_it_is_read(part, field, value, tmp_path):
    with pytest.raises(ValueError, match=f"^[a-z_ ]*{field} "):
        MODELS[part].from_preset("tiny", **{field: value})
    MODELS[part].from_preset("tiny").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=f"config.json is damaged: .*{field} ") as caught:
        MODELS[part].from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", {"shortest_edge": 100_000}), ("crop_size", {"height": 0, "width": 64}), ("fps", float("inf"))],
)
def test_a_processor_is_refused_when_it_is_made(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be"):
        EvatokVideoProcessor(**{field: value})


def test_weights_are_compared_before_they_take_memory_and_pickles_are_not_read(tmp_path):
    shutil.copytree(Path(default_checkpoint()) / "tokenizer", tmp_path / "large")
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    (tmp_path / "large" / "config.json").write_text(json.dumps({**config, "codebook_size": 16_000_000}))
    with pytest.raises(ValueError, match=r"model.safetensors does not fit .*: quantizer.weight .*16000000"):
        EvatokModel.from_pretrained(tmp_path / "large")
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    (tmp_path / "large" / "model.safetensors").unlink()
    with open(tmp_path / "large" / "pytorch_model.bin", "wb") as file:
        pickle.dump(Evil(tmp_path / "ran"), file)
    with pytest.raises(ValueError, match="pickle, pytorch_model.bin, which may run code"):
        EvatokModel.from_pretrained(tmp_path / "large")
    assert not (tmp_path / "ran").exists()


# --- shards and their videos ------------------------------------------------------------------------------------------


def test_flipped_bytes_in_a_finished_data_set_are_found(tmp_path):
    path = SHARDS.list(write_tokens(tmp_path))[1]
    assert "5" in CliRunner().invoke(app, ["info", str(tmp_path)]).stdout
    content = path.read_bytes()
    assert is_whole(content)
    for place in (10, len(content) // 2, len(content) - 12):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=f"{path.name} is damaged: its checksum is another"):
            TokenDataset.load(tmp_path)
        result = CliRunner().invoke(app, ["info", str(tmp_path)])
        assert result.exit_code == 1 and "its checksum is another" in result.output


def test_shards_of_before_have_no_checksum_and_are_read(tmp_path):
    for path in SHARDS.list(write_tokens(tmp_path)):
        pq.write_table(pq.read_table(path), path)
        assert not is_whole(path.read_bytes())
    assert TokenDataset.load(tmp_path).lengths().tolist() == LENGTHS


@pytest.mark.parametrize("note", [b"{}", b"[", b'{"settings": {}}', b'{"settings": {"tokenizer_fingerprint": 3}}'])
def test_a_note_that_says_nothing_is_refused(note, tmp_path):
    path = SHARDS.list(write_tokens(tmp_path))[0]
    metadata = {b"evatok_hf": note}
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    with pytest.raises(ValueError, match=f"the note of .*{path.name} is damaged"):
        TokenDataset.load(tmp_path)


def test_videos_that_were_replaced_are_another_source(tmp_path):
    frames = moving_frames(4, 32, 32)
    encode(tmp_path / "a.mp4", frames)
    before = source_state([open_source(tmp_path, "train")])
    assert source_state([open_source(tmp_path, "train")]) == before
    encode(tmp_path / "a.mp4", frames[::-1])
    assert source_state([open_source(tmp_path, "train")]) != before


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    """Checkpoints 1 and 2 of a run."""
    run = Run(0)
    for step in (1, 2):
        run.step()
        checkpoints.save_checkpoint(run.accelerator, tmp_path, step, 5)
    return tmp_path


def resume(folder: Path, resume: str | Path = "latest") -> Run:
    run = Run(1)
    checkpoints.load_checkpoint(run.accelerator, folder, str(resume), run.progress)
    return run


def of_before(checkpoint: Path) -> None:
    (checkpoint / "checksums.json").unlink()


FILES = ["model.safetensors", "optimizer.bin", "scheduler.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("sums", [True, False])
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_taken(name, sums, saved, caplog):
    latest = saved / "checkpoint-2"
    if not sums:
        of_before(latest)
    (latest / name).write_bytes((latest / name).read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"checkpoint-2/{name} is") as caught:
        resume(saved, latest)
    assert "\n" not in str(caught.value)
    assert resume(saved).progress.step == 1
    assert f"checkpoint-2/{name} is" in caplog.text and "Going on from checkpoint-1" in caplog.text
    assert (saved / "checkpoint-2.damaged").is_dir() and not latest.exists()
    latest.mkdir()
    assert resume(saved).progress.step == 1
    assert (saved / "checkpoint-2.damaged").is_dir() and not latest.exists()  # nor is that lost


def test_a_checkpoint_without_its_random_state_is_refused(saved):
    for number in (1, 2):
        of_before(saved / f"checkpoint-{number}")
        (saved / f"checkpoint-{number}" / "random_states_0.pkl").unlink()
    with pytest.raises(ValueError, match="checkpoint-2/random_states_0.pkl is missing"):
        resume(saved)
    torch.save({"random_state": random.getstate()}, saved / "checkpoint-2" / "random_states_0.pkl")
    with pytest.raises(ValueError, match="random_states_0.pkl holds no random state"):
        resume(saved)


def test_a_checkpoint_that_does_not_tell_its_step_is_no_beginning(saved):
    of_before(saved / "checkpoint-2")
    torch.save({"seconds": 1.0}, saved / "checkpoint-2" / "custom_checkpoint_0.pkl")
    with pytest.raises(ValueError, match="step is missing"):
        resume(saved, saved / "checkpoint-2")


def test_checkpoints_of_before_are_resumed(saved):
    of_before(saved / "checkpoint-2")
    assert resume(saved).progress.step == 2


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_checkpoint_runs(name, zipped, saved, tmp_path):
    of_before(saved / "checkpoint-2")
    path, ran = saved / "checkpoint-2" / name, tmp_path / "ran"
    if zipped:
        torch.save(Evil(ran), path)
    else:
        path.write_bytes(pickle.dumps(Evil(ran)))
    with pytest.raises(ValueError, match=f"{name} is"):
        resume(saved, saved / "checkpoint-2")
    assert not ran.exists()
    with zipfile.ZipFile(io.BytesIO((saved / "checkpoint-1" / name).read_bytes())) as whole:
        assert whole.testzip() is None


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_and_what_is_held_have_a_bound_that_can_be_raised(tmp_path, monkeypatch):
    encode(tmp_path / "a.mp4", moving_frames(4, 32, 32))
    monkeypatch.setenv("EVATOK_MAX_FRAME_PIXELS", "1000")
    with pytest.raises(ValueError, match="32x32 pixels, more than 1,000 in all.*EVATOK_MAX_FRAME_PIXELS"):
        open_video(tmp_path / "a.mp4")
    monkeypatch.setenv("EVATOK_MAX_FRAME_PIXELS", "2000")
    monkeypatch.setenv("EVATOK_MAX_HELD_BYTES", "7000")
    with open_video(tmp_path / "a.mp4") as video:
        assert video.read([0, 1]).shape == (2, 32, 32, 3)
        for take in (lambda: video.read([0, 1, 2]), lambda: video.iter_chunks(4)):
            with pytest.raises(ValueError, match="take .* bytes at once, more than 7,000.*EVATOK_MAX_HELD_BYTES"):
                take()
        assert sum(len(chunk) for chunk in video.iter_chunks(2)) == 4
    monkeypatch.setenv("EVATOK_MAX_HELD_BYTES", "many")
    with open_video(tmp_path / "a.mp4") as video, pytest.raises(ValueError, match="EVATOK_MAX_HELD_BYTES is 'many'"):
        video.read([0])


def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path):
    size = (16_000).to_bytes(2, "little")
    image = b"\x2c" + bytes(4) + size + size + b"\x00\x02\x02\x44\x01\x00"
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + size + size + b"\x80\x00\x00" + bytes(6) + image * 3 + b"\x3b")
    with pytest.raises(ValueError, match="16000x16000 pixels, more than 67,108,864 in all"):
        open_video(tmp_path / "a.gif")
