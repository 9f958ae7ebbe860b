"""training/train_teacher.py: a whole run of a very small teacher, what it leaves, that it resumes and can teach."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from device_waits import waits_of_steps
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForPreTraining
from video_samples import encode, moving_frames

from evatok_hf.data.streaming import ClipConfig, ClipStream
from training import train_teacher
from training.common.arguments import parse_arguments
from training.common.draws import Draws
from training.common.optimizers import learning_rate_factor
from training.tokenizer.adversarial import AdversarialLoss
from training.tokenizer.alignment import AlignmentLoss
from training.tokenizer.arguments import TokenizerArguments
from training.tokenizer.augmentation import DRAWS
from training.tokenizer.teachers import Teacher

TRAINING = Path(__file__).parents[2] / "training"

SIZES = {
    "image_size": 32,
    "num_frames": 8,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_hidden_size": 8,
    "decoder_num_layers": 1,
    "decoder_num_heads": 2,
    "mask_ratio": 0.75,
}


def options(output_dir: Path, videos: Path, *more: object) -> list[str]:
    given = {
        **SIZES,
        "output_dir": output_dir,
        "train_data": videos,
        "batch_size": 2,
        "steps": 6,
        "save_every": 3,
        "warmup_steps": 2,
        "num_workers": 0,
        "log_every": 1,
        "cpu": "true",
    }
    return [*(f"--{name}={value}" for name, value in given.items()), *map(str, more)]


def train(argv: list[str]) -> Path:
    # accelerate keeps its settings for the life of a process, as is right outside tests.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return train_teacher.main(argv)


def read_log(output_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "loss", "learning_rate")} for line in lines]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for index in range(4):
        frames = np.clip(moving_frames(10, 32, 40).astype(int) + 12 * index, 0, 255).astype(np.uint8)
        encode(root / f"v{index}.mp4", frames, options={"preset": "ultrafast"})
    return root


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory) -> Path:
    """The folder of a run of 6 steps with checkpoints at 3 and 6, one worker ahead of the loop."""
    output_dir = tmp_path_factory.mktemp("run")
    assert train(options(output_dir, videos, "--num_workers=1")) == output_dir / "teacher"
    return output_dir


def test_what_a_run_leaves(trained):
    assert {path.name for path in trained.iterdir()} == {"checkpoint-3", "checkpoint-6", "log.jsonl", "teacher"}
    folder = trained / "teacher"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "training.json", "README.md"}
    model = AutoModelForPreTraining.from_pretrained(folder)
    assert model.config.model_type == "videomae" and "stand-in for VideoMAE-B" in model.config.description
    assert "stand-in for VideoMAE-B" in (folder / "README.md").read_text()
    summary = json.loads((folder / "training.json").read_text())
    assert (summary["steps"], summary["clips"]) == (6, 12) and summary["arguments"]["mask_ratio"] == 0.75
    assert "--steps=6" in summary["command"] and summary["loss"] > 0
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor).__name__.startswith("VideoMAE") and processor.crop_size["height"] == 32
    log = read_log(trained)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    for line in log:
        assert line["learning_rate"] == pytest.approx(1e-3 * learning_rate_factor(line["step"] - 1, 6, 2, 0.01))


def test_the_loss_is_that_of_the_model_on_the_hidden_cells(videos, tmp_path):
    folder = train(options(tmp_path, videos, "--steps=1", "--learning_rate=0", "--batch_size=4", "--seed=3"))
    args, _ = parse_arguments(
        train_teacher.TeacherArguments, "", options(tmp_path, videos, "--batch_size=4", "--seed=3")
    )
    stream = ClipStream(str(videos), config=ClipConfig(8, 32, scale=(0.5, 1.0), clips_per_video=2), seed=3)
    clips = torch.stack([item["pixel_values_videos"] for item, _ in zip(stream, range(4), strict=False)])
    pixels = AutoImageProcessor.from_pretrained(folder)([list(clip) for clip in clips], return_tensors="pt")
    hidden = train_teacher.draw_tubes(4, args.cells, args.masked_cells, 2, Draws(3).generator("tubes", 0))
    expected = AutoModelForPreTraining.from_pretrained(folder)(**pixels, bool_masked_pos=hidden).loss
    assert read_log(tmp_path)[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_training_lowers_the_loss(videos, tmp_path):
    more = ("--steps=60", "--save_every=60", "--batch_size=4", "--learning_rate=1e-2", "--scale", "1", "1")
    log = train(options(tmp_path, videos, *more)) and read_log(tmp_path)
    first, last = (sum(line["loss"] for line in part) / len(part) for part in (log[:5], log[-5:]))
    assert last < 0.9 * first


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_is_the_uninterrupted_one(trained, videos, tmp_path, workers):
    resumed = tmp_path / "run"
    shutil.copytree(trained, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    shutil.rmtree(resumed / "teacher")
    (resumed / "log.jsonl").unlink()
    train(options(resumed, videos, f"--num_workers={workers}", "--resume=latest"))
    assert read_log(resumed) == read_log(trained)[3:]
    state, straight = (load_file(run / "teacher" / "model.safetensors") for run in (resumed, trained))
    assert state.keys() == straight.keys() and all(torch.equal(state[name], straight[name]) for name in state)


def test_tubes():
    hidden = train_teacher.draw_tubes(50, 16, 12, 3, torch.Generator().manual_seed(0)).view(50, 3, 16)
    assert (hidden.sum(-1) == 12).all() and torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    assert len(hidden[:, 0].unique(dim=0)) > 40 and (hidden[:, 0].float().mean(0) - 0.75).abs().max() < 0.25


def test_it_can_teach(trained):
    folder = trained / "teacher"
    teacher = Teacher.from_pretrained(folder)
    args = TokenizerArguments(output_dir="run", train_data=["videos"], adversarial="semantic")
    video = (torch.rand(2, 8, 3, 64, 64) * 2 - 1).requires_grad_()
    loss, _ = AdversarialLoss(args, teacher).generator_terms(video, torch.rand(2, DRAWS))
    loss.backward()
    assert video.grad.abs().sum() > 0
    features = teacher.grid_features(video)
    assert features.shape == (2, 2, 4, 4, 16)
    alignment = AlignmentLoss(24, (2, 8, 8), teacher.width, teacher.grid)
    assert -1 <= alignment(torch.randn(2, 2, 64, 24), features)[0].item() <= 1


def test_an_earlier_run_is_not_overwritten(trained, videos):
    with pytest.raises(ValueError, match="--resume latest"):
        train(options(trained, videos))


def test_a_run_that_diverges_stops(videos, tmp_path):
    with pytest.raises(ValueError, match=r"became (nan|inf) at step \d.*Lower --learning_rate"):
        train(options(tmp_path, videos, "--learning_rate=1e38", "--warmup_steps=0"))
    assert not (tmp_path / "teacher").exists()


def test_failures_end_with_code_1(videos, tmp_path, monkeypatch, caplog):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script = str(TRAINING / "train_teacher.py")
    monkeypatch.setattr(sys, "argv", [script, *options(tmp_path / "run", videos, "--resume=latest")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 1 and "there is no checkpoint in" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--steps=0", "--steps must be at least 1"),
        ("--image_size=36", "--image_size must be a multiple of --patch_size"),
        ("--num_frames=10", "--num_frames must be a multiple of --tubelet_size"),
        ("--num_heads=3", "--hidden_size must be a multiple of --num_heads"),
        ("--num_workers=3", "multiple of --num_workers"),
        ("--mask_ratio=1", "must hide some of the 16 cells"),
        ("--mixed_precision=bf17", "auto, no, fp16 or bf16"),
    ],
)
def test_wrong_options_end_with_code_2(tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit) as ended:
        train(options(tmp_path / "run", tmp_path, wrong))
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_one_teacher(videos, tmp_path):
    """With the same clips and masks in all, two processes have the losses of one with their clips together."""

    def run(folder: Path, processes: int, *more: str) -> list[float]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(TRAINING / "train_teacher.py"), *options(folder, videos, "--steps=3", *more)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return [line["loss"] for line in read_log(folder)]

    together = run(tmp_path / "one", 1, "--batch_size=4", "--num_workers=2")
    apart = run(tmp_path / "two", 2, "--batch_size=2", "--num_workers=1")
    assert apart == pytest.approx(together, rel=1e-4)


def test_no_step_waits_for_the_device_but_in_the_network_itself(videos, tmp_path, monkeypatch):
    waits = waits_of_steps(train, options(tmp_path, videos, "--save_every=4"), monkeypatch)
    assert all("bool_masked_pos" in wait for wait in waits)  # which transformers selects by
