"""training/train_tokenizer.py: a whole run of a very small model, what it leaves, and that it resumes exactly."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from training_samples import (
    MODEL,
    TRAINING,
    make_videos,
    options,
    read_log,
    same_weights,
    small_router,
    train,
    weights,
)

from evatok_hf import EvatokGeneratorConfig, EvatokModel, EvatokRouter, EvatokVideoProcessor
from evatok_hf.data.streaming import ClipStream
from evatok_hf.models.checkpoint_evatok import check_generator
from training import train_tokenizer
from training.common.arguments import parse_arguments
from training.common.draws import Draws
from training.common.optimizers import learning_rate_factor
from training.tokenizer.arguments import TokenizerArguments
from training.tokenizer.losses import TokenizerLoss
from training.tokenizer.step_lengths import StepLengths


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def damaged(videos, tmp_path_factory) -> Path:
    """The same, and a file that is no video."""
    root = tmp_path_factory.mktemp("damaged") / "videos"
    shutil.copytree(videos, root)
    (root / "broken.mp4").write_bytes(b"no video")
    return root


@pytest.fixture(scope="module")
def trained(videos, damaged, tmp_path_factory):
    """A run of 6 steps of 2 x 2 clips without interruption, checkpoints at 3 and 6 -> (its folder, its options)."""
    output_dir = tmp_path_factory.mktemp("run")

    def run_options(folder: Path, workers: int, *more: object) -> list[str]:
        schedule = ["--steps=6", "--save_every=3", "--gradient_accumulation_steps=2", "--warmup_steps=2"]
        schedule += ["--blend_start=1", "--blend_end=4", "--ema_decay=0.9", f"--num_workers={workers}"]
        validation = [f"--val_data={videos}", "--validate_every=3", "--val_clips_per_video=1"]
        return options(folder, damaged, *schedule, *validation, *more)

    # One worker reads ahead of the loop, which a checkpoint must not mind.
    assert train(run_options(output_dir, 1)) == output_dir / "tokenizer"
    return output_dir, run_options


def test_what_a_run_leaves(trained):
    output_dir, _ = trained
    names = {path.name for path in output_dir.iterdir()}
    assert names == {"checkpoint-3", "checkpoint-6", "samples", "log.jsonl", "tokenizer"}
    assert {path.name for path in (output_dir / "samples").iterdir()} == {"step-0000003.png", "step-0000006.png"}
    assert Image.open(output_dir / "tokenizer" / "loss_curve.png").size[0] > 400

    summary = json.loads((output_dir / "tokenizer" / "training.json").read_text())
    assert (summary["steps"], summary["clips"], summary["seed"]) == (6, 24, 0)
    assert summary["arguments"]["gradient_accumulation_steps"] == 2 and "--steps=6" in summary["command"]
    assert set(summary["skipped_videos"]) == {"unreadable"} and summary["skipped_videos"]["unreadable"] >= 1

    model = EvatokModel.from_pretrained(output_dir / "tokenizer").eval()
    processor = EvatokVideoProcessor.from_pretrained(output_dir / "tokenizer")
    assert processor.num_frames == 8 and processor.crop_size["height"] == 32
    tokens = model.encode(torch.zeros(2, 8, 3, 32, 32), [2, 4, 8, 32])
    assert tokens.ids.shape == (92,) and model.decode(tokens).shape == (2, 8, 3, 32, 32)
    averaged, last = weights(output_dir / "tokenizer"), weights(output_dir / "checkpoint-6")
    assert averaged.keys() == last.keys() and not same_weights(averaged, last)


def test_the_log(trained):
    output_dir, _ = trained
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "l1" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        terms = line["l1"] + line["codebook"] + 0.25 * line["commitment"] + 0.02 * line["entropy"]
        assert line["total"] == pytest.approx(terms, rel=1e-4) and 0 < line["codebook_use"] <= 1
        assert 0 < line["data_wait"] < 1 and line["mfu"] > 0
        assert line["learning_rate"] == pytest.approx(1e-3 * learning_rate_factor(line["step"] - 1, 6, 2, 0.1))
    assert [line["blend"] for line in steps] == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1])
    assert steps[-1]["skipped_videos"] >= 1  # the file that is no video
    validations = [line for line in lines if "val/psnr_2" in line]
    assert [line["step"] for line in validations] == [3, 6]
    assert set(validations[0]) == {"step", "val/psnr_2", "val/psnr_8", "val/psnr_32"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_is_the_uninterrupted_one(trained, tmp_path, workers):
    straight, run_options = trained
    resumed = tmp_path / "run"
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    shutil.rmtree(resumed / "tokenizer")
    (resumed / "log.jsonl").unlink()
    # Either way to name the checkpoint.
    train(run_options(resumed, workers, "--resume", "latest" if workers else resumed / "checkpoint-3"))
    assert read_log(resumed) == [line for line in read_log(straight) if line["step"] > 3]
    assert same_weights(weights(resumed / "tokenizer"), weights(straight / "tokenizer"))
    assert same_weights(weights(resumed / "checkpoint-6"), weights(straight / "checkpoint-6"))
    states = [json.loads((run / "checkpoint-6" / "stream-0.json").read_text()) for run in (resumed, straight)]
    assert states[0] == states[1]


def test_an_earlier_run_is_not_overwritten(trained, tmp_path):
    output_dir, run_options = trained
    before = sorted(output_dir.rglob("*"))
    with pytest.raises(ValueError, match="--resume latest"):
        train(run_options(output_dir, 0))
    # Its own new checkpoints would be the older ones, which are removed first.
    with pytest.raises(ValueError, match="checkpoint-6, later than"):
        train(run_options(output_dir, 0, "--resume", output_dir / "checkpoint-3"))
    assert sorted(output_dir.rglob("*")) == before
    shutil.copy(output_dir / "log.jsonl", tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="log.jsonl"):
        train(run_options(tmp_path, 0))


def test_training_goes_on_from_a_checkpoint_and_says_from_which(trained, videos, tmp_path):
    earlier = shutil.copytree(trained[0] / "tokenizer", tmp_path / "earlier")
    config = json.loads((earlier / "config.json").read_text())
    (earlier / "config.json").write_text(json.dumps(config | {"return_dict": False}))  # as users of tuples set it
    later = train(options(tmp_path, videos, f"--init_from={earlier}", "--steps=1", "--learning_rate=0", "--seed=5"))
    assert same_weights(weights(later), weights(earlier))
    said = json.loads((later / "training.json").read_text())
    assert said["steps"] == 1 and said["continues"] == json.loads((earlier / "training.json").read_text())
    assert said["continues"]["continues"] is None
    shutil.copytree(earlier, tmp_path / "damaged")
    (tmp_path / "damaged" / "training.json").write_text("{")
    with pytest.raises(ValueError, match="damaged .*; get another copy"):
        train(options(tmp_path / "other", videos, f"--init_from={tmp_path / 'damaged'}", "--steps=1"))


def test_the_decoder_alone_goes_on_and_tokens_stay_good(trained, videos, tmp_path):
    earlier = trained[0] / "tokenizer"
    alone = ["--trained_parts=decoder", "--steps=2", "--psnr_weight=1", f"--init_from={earlier}"]
    before, after = weights(earlier), weights(later := train(options(tmp_path / "run", videos, *alone)))
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder"}
    old, new = (EvatokModel.from_pretrained(path).eval() for path in (earlier, later))
    clip = torch.rand(1, 8, 3, 32, 32) * 2 - 1
    tokens = old.encode(clip, 8)
    assert torch.equal(new.encode(clip, 8).ids, tokens.ids)
    assert not torch.equal(new.decode(tokens), old.decode(tokens))
    with pytest.raises(ValueError, match="made by checkpoint"):
        old.decode(new.encode(clip, 8))  # it cannot know what became of it
    generator = EvatokGeneratorConfig(
        codebook_size=new.config.codebook_size,
        block_lengths=new.config.block_lengths,
        num_blocks=new.config.num_blocks,
        tokenizer_fingerprint=old.fingerprint(),
    )
    check_generator(new, generator)
    # Trained on as a whole, it has tokens of its own.
    whole = train(options(tmp_path / "whole", videos, f"--init_from={later}", "--steps=1"))
    with pytest.raises(ValueError, match="do not belong together: tokenizer_fingerprint"):
        check_generator(EvatokModel.from_pretrained(whole), generator)


def test_nothing_to_resume_from(videos, tmp_path, monkeypatch, caplog):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script = str(TRAINING / "train_tokenizer.py")
    monkeypatch.setattr(sys, "argv", [script, *options(tmp_path / "run", videos, "--resume=latest")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 1 and "there is no checkpoint in" in caplog.text
    with pytest.raises(ValueError, match="is no checkpoint of this script"):
        train(options(tmp_path / "run", videos, "--resume", videos))


def test_a_failed_save_leaves_the_checkpoint_before_it(videos, tmp_path, monkeypatch):
    state_dict = ClipStream.state_dict
    calls = []

    def full_disk(self):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return state_dict(self)

    argv = options(tmp_path, videos, "--steps=2", "--save_every=1", "--keep_checkpoints=1")
    with monkeypatch.context() as patched:
        patched.setattr(ClipStream, "state_dict", full_disk)
        with pytest.raises(ValueError, match="No space left"):
            train(argv)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "log.jsonl"}
    train([*argv, "--resume=latest"])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "log.jsonl", "tokenizer"}
    first, second, again = read_log(tmp_path)
    assert first["step"] == 1 and second == again


def test_a_run_that_diverges_stops(videos, tmp_path):
    with pytest.raises(ValueError, match=r"loss became (nan|inf) at step 1.*Lower --learning_rate"):
        train(options(tmp_path, videos, "--steps=3", "--learning_rate=1e38"))
    assert not (tmp_path / "tokenizer").exists()


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(videos, tmp_path, monkeypatch):
    class Spiked(TokenizerLoss):
        def __call__(self, *args, **kwargs):
            total, terms = super().__call__(*args, **kwargs)
            return total + (0 * args[0].reconstruction).sum().sqrt(), terms  # 0, with an infinite slope

    monkeypatch.setattr(train_tokenizer, "TokenizerLoss", Spiked)
    with pytest.raises(ValueError, match="gradient became nan at step 0"):
        train(options(tmp_path, videos, "--steps=2", "--save_every=1"))
    assert not list(tmp_path.iterdir())


def test_bf16_with_a_perceptual_metric_and_a_configuration_file(videos, tmp_path):
    overrides = {
        "perceptual": "perceptual-effnet-lite0",
        "perceptual_frames": 2,
        "steps": 9,
        "export_dtype": "bfloat16",
    }
    (tmp_path / "options.yaml").write_text(
        "".join(f"{name}: {value}\n" for name, value in overrides.items()) + "shared_assignment: true\n"
    )
    given = [word for word in options(tmp_path / "run", videos) if not word.startswith("--perceptual")]
    folder = train([*given, f"--config={tmp_path / 'options.yaml'}", "--steps=2", "--mixed_precision=bf16"])
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2]  # not the file's 9
    assert all(line["perceptual"] > 0.01 for line in read_log(tmp_path / "run"))
    used = json.loads((folder / "training.json").read_text())["arguments"]
    assert (used["steps"], used["perceptual_frames"], used["shared_assignment"]) == (2, 2, True)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    assert EvatokModel.from_pretrained(folder).encode(torch.zeros(1, 8, 3, 32, 32)).ids.shape == (32,)
    assert {tensor.dtype for tensor in weights(tmp_path / "run" / "checkpoint-2").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--steps=0", "--steps must be at least 1"),
        ("--keep_checkpoints=0", "--keep_checkpoints must be at least 1"),
        ("--model_overrides={", "no JSON"),
        ("--model_overrides=[1]", "must map fields"),
        ('--model_overrides={"imagesize": 32}', "imagesize"),
        ('--model_overrides={"image_size": 40}', "power of two"),
        ("--preset=huge", "unknown preset"),
        ("--assignment=uniform:x", "uniform:N"),
        ("--mixed_precision=bf17", "auto, no, fp16 or bf16"),
        ("--export_dtype=int8", "float32, bfloat16"),
        ("--perceptual=lpips", "one of none, lpips"),
        ("--blend_start=3", "--blend_end must not lie before"),
        ("--channel_shuffle=2", "--channel_shuffle must lie in [0, 1]"),
        ("--patch_channels=0", "--patch_channels must be at least 1"),
        ("--trained_parts=encoder", "--trained_parts must be one of"),
        ("--trained_parts=decoder", "needs --init_from"),
    ],
)
def test_wrong_options_end_with_code_2(tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit) as ended:
        train(options(tmp_path / "run", tmp_path, wrong))
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_that_would_not_train_together_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched but accelerate runs 1; give --cpu"):
        train(options(tmp_path / "run", tmp_path, "--cpu=false"))
    assert not (tmp_path / "run").exists()


def test_assignments(tmp_path):
    def lengths(rank: int, *more: str, processes: int = 2) -> StepLengths:
        args, _ = parse_arguments(TokenizerArguments, "", options(tmp_path, tmp_path, *more))
        draws = Draws(args.seed, rank, processes)
        return StepLengths(args, EvatokModel(args.model_config()), draws)

    clips = torch.zeros(400, 8, 3, 32, 32)
    drawn = lengths(0)(clips, 5, 1)  # (B, T)
    assert torch.equal(drawn, lengths(0)(clips, 5, 1))  # whenever it is asked
    others = [lengths(1)(clips, 5, 1), lengths(0)(clips, 6, 1), lengths(0)(clips, 5, 0)]
    assert not any(torch.equal(drawn, other) for other in [*others, lengths(0, "--seed=1")(clips, 5, 1)])
    for length in MODEL["block_lengths"]:  # uniform: 80 of 400 are expected in each block
        assert all(50 < count < 110 for count in (drawn == length).sum(0).tolist())
    one = lengths(0, processes=1)(clips.repeat(2, 1, 1, 1, 1), 5, 1)
    assert torch.equal(one, torch.cat([drawn, others[0]]))  # the same for the same clips in one process
    shared = [lengths(rank, "--shared_assignment")(clips[:3], 5, 1) for rank in (0, 1)]
    assert torch.equal(shared[0], shared[1]) and len(shared[0].unique(dim=0)) == 1
    steps = [lengths(0, "--shared_assignment")(clips[:1], step, 0) for step in range(20)]
    assert len(torch.cat(steps).unique(dim=0)) > 15
    assert lengths(0, "--assignment=uniform:8")(clips[:2], 0, 0).tolist() == [[8] * 4] * 2
    with pytest.raises(ValueError, match="7"):
        lengths(0, "--assignment=uniform:7")


def test_assignments_of_a_router(tmp_path):
    path = small_router(tmp_path)
    router = EvatokRouter.from_pretrained(path).eval()

    def lengths(*more: str, path: Path = path) -> StepLengths:
        argv = options(tmp_path, tmp_path, f"--assignment=router:{path}", *more)
        args, _ = parse_arguments(TokenizerArguments, "", argv)
        return StepLengths(args, EvatokModel(args.model_config()), Draws(args.seed))

    clips = torch.rand(12, 8, 3, 32, 32) * 2 - 1
    assert torch.equal(lengths("--quality=1.2")(clips, 0, 0), router.assign(clips, 1.2))
    drawn = lengths("--quality_range", 0, 2)(clips[:1].expand(12, -1, -1, -1, -1), 0, 0)
    assert len(drawn.unique(dim=0)) > 1  # a preference for each clip
    assert torch.equal(drawn, lengths("--quality_range", 0, 2)(clips[:1].expand(12, -1, -1, -1, -1), 0, 0))
    shared = lengths("--quality_range", 0, 2, "--shared_assignment")(clips[:1].expand(12, -1, -1, -1, -1), 0, 0)
    assert len(shared.unique(dim=0)) == 1  # one preference for all
    strays = lengths("--quality=1.2", "--random_fraction=0.5")(clips, 0, 0)
    assert 0 < (strays == router.assign(clips, 1.2)).all(-1).sum() < 12
    with pytest.raises(ValueError, match="tokenizer and router disagree: block_lengths"):
        lengths(path=small_router(tmp_path, block_lengths=[2, 4]))


DRIVER = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
from evatok_hf.data.streaming import ClipStream
from training import train_tokenizer
folder, record = sys.argv.pop(1), ClipStream.record

def noted(stream, batch):
    with open(f"{folder}/clips-{stream.rank}.jsonl", "a") as file:
        file.write(json.dumps([batch["source"], batch["frames"][:, 0].tolist()]) + "\\n")
    record(stream, batch)

ClipStream.record = noted
train_tokenizer.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes(videos, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)

    def run(folder: Path, *more: str) -> list[list]:
        """Trains in two processes -> the batches of each of them, as sources and starts."""
        notes = folder.with_name(f"{folder.name}-clips")
        notes.mkdir()
        argv = options(folder, videos, "--steps=4", "--save_every=2", *more)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(tmp_path / "driver.py"), str(TRAINING.parent), str(notes), *argv]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return [
            [json.loads(line) for line in (notes / f"clips-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
        ]

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    clips = run(straight)
    assert [len(batches) for batches in clips] == [4, 4]
    # Three of the six videos are one process's in the first epoch, the others the other's.
    firsts = [{*batches[0][0], batches[1][0][0]} for batches in clips]
    assert len(firsts[0] | firsts[1]) == 6
    states = [json.loads((straight / "checkpoint-2" / f"stream-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(state["rank"], state["world_size"]) for state in states] == [(0, 2), (1, 2)]
    summary = json.loads((straight / "tokenizer" / "training.json").read_text())
    assert summary["clips"] == 16 and "2 process" in summary["machine"]

    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    shutil.rmtree(resumed / "tokenizer")
    (resumed / "log.jsonl").unlink()
    assert run(resumed, "--resume=latest") == [batches[2:] for batches in clips]
    assert read_log(resumed) == read_log(straight)[2:]
    assert same_weights(weights(resumed / "tokenizer"), weights(straight / "tokenizer"))


@pytest.mark.slow
def test_compiled_layers_train_alike(videos, tmp_path):
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        train(options(tmp_path / name, videos, "--steps=3", "--save_every=3", f"--compile={compiled}"))
    logs = [read_log(tmp_path / name) for name in ("eager", "compiled")]
    for eager, compiled in zip(*logs, strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3, abs=1e-4)
    assert weights(tmp_path / "compiled" / "tokenizer").keys() == weights(tmp_path / "eager" / "tokenizer").keys()
