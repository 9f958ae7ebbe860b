"""training/train_tokenizer.py with discriminators and alignment: when they count, kill -9, one process or two."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from device_waits import waits_of_steps
from training_samples import TRAINING, make_videos, options, read_log, same_weights, small_router, train, weights
from transformers import VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

import evatok_hf

TEACHER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[str]:
    """Options that name a VideoMAE and a V-JEPA2 with random weights, on disk as the published ones are."""
    root = tmp_path_factory.mktemp("teachers")
    clip = {"patch_size": 8, "tubelet_size": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        VideoMAEModel(
            VideoMAEConfig(image_size=32, num_frames=8, intermediate_size=32, **clip, **TEACHER)
        ).save_pretrained(root / "videomae")
        predictor = {"pred_hidden_size": 16, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
        VJEPA2Model(
            VJEPA2Config(crop_size=32, frames_per_clip=8, num_pooler_layers=1, **predictor, **clip, **TEACHER)
        ).save_pretrained(root / "vjepa2")
    return [
        "--adversarial=both",
        f"--semantic_teacher={root / 'videomae'}",
        "--patch_channels=8",
        f"--alignment={root / 'vjepa2'}",
        "--alignment_layer=1",
        "--lecam_weight=0.1",
    ]


def test_the_adversarial_game_begins_at_its_step(videos, teachers, tmp_path):
    def run(name: str, start: int) -> list[dict]:
        more = [*teachers, "--steps=4", "--save_every=4", f"--discriminator_start={start}", "--adaptive_weight=true"]
        train(options(tmp_path / name, videos, *more))
        return read_log(tmp_path / name)

    late, never = run("late", 2), run("never", 100)
    assert late[:2] == never[:2]
    for line in never:
        assert not any("generator" in name or "discriminator" in name for name in line)
        assert -1 <= line["alignment"] <= 1 and "alignment_contrast" in line
        terms = line["l1"] + line["codebook"] + 0.25 * line["commitment"] + 0.02 * line["entropy"]
        assert line["total"] == pytest.approx(terms + 0.7 * line["alignment"], rel=1e-4)
    for part in ("patch", "semantic"):
        for name in ("generator", "discriminator", "lecam", "real_logit", "fake_logit", "adaptive_weight"):
            assert [f"{part}_{name}" in line for line in late] == [False, False, True, True]
    # From the first step of the game on the tokenizer learns something else.
    assert late[2]["l1"] == never[2]["l1"] and late[3]["l1"] != never[3]["l1"]
    # The trained tokenizer is a tokenizer and nothing more.
    assert weights(tmp_path / "late" / "tokenizer").keys() == weights(tmp_path / "never" / "tokenizer").keys()
    assert not any("teacher" in name or "bridge" in name for name in weights(tmp_path / "late" / "tokenizer"))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(videos, teachers, tmp_path):
    more = [*teachers, "--steps=16", "--save_every=2", "--discriminator_start=1", "--ema_decay=0.9"]
    train(options(tmp_path / "straight", videos, *more))
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(TRAINING / "train_tokenizer.py"), *options(killed, videos, *more)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-4").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "tokenizer").exists()
    train(options(killed, videos, *more, "--resume=latest"))
    # The run logged a few steps twice: those after the checkpoint that it went on from.
    assert {line["step"]: line for line in read_log(killed)} == {
        line["step"]: line for line in read_log(tmp_path / "straight")
    }
    assert same_weights(weights(killed / "tokenizer"), weights(tmp_path / "straight" / "tokenizer"))


def test_the_losses_are_the_same_with_one_process_and_with_two(videos, teachers, tmp_path):
    more = ["--steps=20", "--save_every=10", "--channel_shuffle=0.5", "--spectral_weight=1", "--random_fraction=0.5"]
    more += ["--quality_range", 0, 2, f"--assignment=router:{small_router(tmp_path)}"]
    # A rate at which rounding, which differs, does not send the runs apart within 20 steps.
    more += [*teachers, "--discriminator_start=2", "--adaptive_weight=true", "--learning_rate=1e-4"]
    argv = [*map(str, [TRAINING / "train_tokenizer.py", *options(tmp_path / "two", videos, *more, "--num_workers=1")])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    train(options(tmp_path / "one", videos, *more, "--batch_size=4", "--num_workers=2"))
    # One process goes on where two were.
    shutil.copytree(tmp_path / "two", tmp_path / "went-on")
    shutil.rmtree(tmp_path / "went-on" / "checkpoint-20")
    train(options(tmp_path / "went-on", videos, *more, "--batch_size=4", "--num_workers=2", "--resume=latest"))
    logs = [read_log(tmp_path / name) for name in ("two", "one", "went-on")]
    assert [len(log) for log in logs] == [20, 20, 30]
    for two, *others in zip(logs[0], logs[1], logs[2][:10] + logs[2][20:], strict=True):
        for other in others:
            assert other == pytest.approx(two, rel=1e-5, abs=1e-6)


def test_a_checkpoint_of_other_losses_is_refused(videos, teachers, tmp_path):
    train(options(tmp_path / "run", videos, "--steps=1", "--save_every=1"))
    with pytest.raises(ValueError, match="--adversarial and --alignment"):
        train(options(tmp_path / "run", videos, *teachers, "--steps=2", "--resume=latest"))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--adversarial=gan"], "--adversarial must be one of none, patch, semantic, both"),
        (["--alignment=x", "--alignment_layer=9"], "--alignment_layer must lie in 1..1"),
        (["--alignment_direction=up"], "--alignment_direction must be one of"),
        (["--lecam_weight=-1"], "--lecam_weight must be at least 0"),
        (["--adversarial_weight=-1"], "--adversarial_weight must be at least 0"),
        (["--augment_probability=2"], "--augment_probability must lie in [0, 1]"),
    ],
)
def test_wrong_options_end_with_code_2(videos, tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit) as stopped:
        train(options(tmp_path / "run", videos, *wrong))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_teacher_that_is_not_there_is_named(videos, tmp_path):
    with pytest.raises(ValueError, match="no-such-folder"):
        train(options(tmp_path / "run", videos, "--adversarial=semantic", "--semantic_teacher=./no-such-folder"))


@pytest.mark.slow
def test_a_step_at_the_papers_size(tmp_path):
    """The command that training/README.md gives to see whether the paper's size fits a machine."""
    (tmp_path / "videos").mkdir()
    shutil.copy(Path(evatok_hf.__file__).parent / "assets" / "bikes.mp4", tmp_path / "videos")
    argv = [f"--config={TRAINING / 'configs' / 'proxy_webvid.yaml'}", f"--output_dir={tmp_path / 'run'}"]
    argv += [f"--train_data={tmp_path / 'videos'}", "--steps=1", "--batch_size=1", "--num_workers=1", "--log_every=1"]
    argv += ["--perceptual=none", "--alignment=none", "--discriminator_start=0", "--cpu=true"]
    train(argv)
    summary = json.loads((tmp_path / "run" / "tokenizer" / "training.json").read_text())
    assert summary["parameters"] == pytest.approx(145e6, rel=0.01) and summary["clips"] == 1
    assert 1 < summary["peak_memory_gib"] < 24
    (line,) = read_log(tmp_path / "run")
    assert all(math.isfinite(value) for value in line.values()) and "patch_generator" in line


def test_no_step_waits_for_the_device(videos, teachers, tmp_path, monkeypatch):
    more = ["--discriminator_start=0", "--adaptive_weight=true", "--optimizer=muon", "--channel_shuffle=0.5"]
    more += ["--splice_probability=0.5", "--blend_end=9", "--spectral_weight=1", "--psnr_weight=1", "--save_every=4"]
    given = options(tmp_path, videos, *teachers, *more)
    assert waits_of_steps(train, given, monkeypatch) == []
    parts = json.loads((tmp_path / "tokenizer" / "training.json").read_text())["tflop_per_clip"]
    assert parts.keys() == {"tokenizer", "alignment", "patch discriminator", "semantic teacher", "semantic heads"}
    assert min(parts.values()) > 0
