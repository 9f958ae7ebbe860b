"""training/train_generator.py: whole runs of a very small generator, that they resume exactly, and what they learn."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from device_waits import waits_of_steps
from generator_samples import SIZES, write_tokens
from PIL import Image
from script_samples import error_of_script
from token_samples import make_checkpoint, make_labelled, options, run_tokenizing
from training_samples import TRAINING, same_weights, weights

from evatok_hf import EvatokForCausalLM, EvatokModel
from evatok_hf.data.streaming import to_float
from evatok_hf.data.token_dataset import SHARDS, TokenDataset
from evatok_hf.models.generation_evatok import sample
from evatok_hf.models.modeling_evatok_generator import Prompt
from evatok_hf.models.video_processing_evatok import hold_last_frame
from training import train_generator
from training.common import clip_batches
from training.common.arguments import parse_arguments
from training.common.optimizers import learning_rate_factor
from training.common.reporting import save_clips
from training.generator.arguments import GeneratorArguments
from training.generator.data import VideoData
from training.generator.rows import Tasks, TokenRows

SCRIPT = TRAINING / "train_generator.py"


BF16 = ["--mixed_precision=bf16", "--attn_implementation=split"]


class Killed(BaseException):
    """What no handler of the script catches."""


def argv(output_dir: Path, tokens: Path | None, *more: object) -> list[str]:
    given = {
        "output_dir": output_dir,
        "model_overrides": json.dumps(SIZES),
        "row_length": 48,
        "rows": 2,
        "prediction": 0.5,
        "steps": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "ema_decay": 0.9,
        "mixed_precision": "no",
        "save_every": 2,
        "log_every": 1,
        "sample_every": 0,
        "cpu": "true",
    }
    if tokens is not None:
        given["train_tokens"] = tokens
    return [*(f"--{name}={value}" for name, value in given.items()), *map(str, more)]


def train(argv: list[str]) -> Path:
    # accelerate keeps its settings for the life of a process, as is right outside tests.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return train_generator.main(argv)


def read_log(output_dir: Path) -> dict[int, dict]:
    """The log by step, without times; a step that was done twice, as the second time."""
    steps: dict[int, dict] = {}
    for line in (output_dir / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        clock = ("seconds", "tokens_per_second", "mfu", "data_wait")
        kept = {name: value for name, value in record.items() if name not in clock}
        steps[record["step"]] = steps.get(record["step"], {}) | kept
    return steps


def kill_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Dies when a step wants its rows."""
    take, calls = TokenRows.take, []

    def until(self):
        calls.append(self)
        if len(calls) > step:
            raise Killed
        return take(self)

    patch.setattr(TokenRows, "take", until)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def fingerprint(checkpoint) -> str:
    return EvatokModel.from_pretrained(checkpoint / "tokenizer").fingerprint()


@pytest.fixture(scope="module")
def tokens(fingerprint, tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train", fingerprint)


@pytest.fixture(scope="module")
def trained(tokens, checkpoint, fingerprint, tmp_path_factory):
    """A run of 6 steps without interruption -> (its folder, its further options)."""
    root = tmp_path_factory.mktemp("run")
    val = write_tokens(root / "val", fingerprint, count=7, seed=1)
    more = [f"--val_tokens={val}", "--validate_every=3", f"--tokenizer={checkpoint}", "--sample_every=3", "--samples=3"]
    assert train(argv(root / "run", tokens, *more)) == root / "run" / "generator"
    return root / "run", more


# --- a run ---


def test_what_a_run_leaves(trained, checkpoint, fingerprint):
    output_dir, _ = trained
    names = {"checkpoint-4", "checkpoint-6", "generator", "log.jsonl", "samples"}
    assert {path.name for path in output_dir.iterdir()} == names
    model = EvatokForCausalLM.from_pretrained(output_dir / "generator")
    config = model.config
    assert (config.class_names, config.known_frames, config.tokenizer_fingerprint) == (["cat", "dog"], 2, fingerprint)
    assert (config.codebook_size, config.num_blocks, config.block_lengths) == (64, 2, [2, 4, 8])
    assert config.fps == 15  # 30 frames a second, every other
    assert {tensor.dtype for tensor in weights(output_dir / "generator").values()} == {torch.bfloat16}
    tokens = sample(model, [Prompt(0), Prompt(None)], [0, 1])
    video = EvatokModel.from_pretrained(checkpoint / "tokenizer").decode(tokens)
    assert video.shape == (2, 4, 3, 32, 32)
    assert Image.open(output_dir / "generator" / "loss_curve.png").size[0] > 400
    pictures = sorted((output_dir / "samples").iterdir())
    assert [path.name for path in pictures] == ["step-0000003.png", "step-0000006.png"]
    # Two clips beside each other, four frames each, and a gap after each clip.
    assert Image.open(pictures[0]).size == (2 * (4 * 32 + 4), 2 * (32 + 4))

    summary = json.loads((output_dir / "generator" / "training.json").read_text())
    log = read_log(output_dir)
    assert (summary["steps"], summary["seed"], summary["row_length"], summary["continues"]) == (6, 0, 48, None)
    assert summary["parameters"] == model.num_parameters() and "--steps=6" in summary["command"]
    assert summary["epochs"] == pytest.approx(summary["sequences"] / 20) == pytest.approx(log[6]["epoch"])
    assert summary["held_out"] == {name: log[6][name] for name in summary["held_out"]}
    assert 6 * 2 * 20 < summary["tokens"] < 6 * 2 * 48 and summary["data"]["clips"] == 20


def test_the_log(trained):
    log = read_log(trained[0])
    assert list(log) == [1, 2, 3, 4, 5, 6]
    figures = {"total", "codes", "lengths", "end", "block_1", "block_2", "length_accuracy"}
    for step, line in log.items():
        assert figures <= line.keys() and 0 <= line["padding"] < 0.6 and 0 <= line["length_accuracy"] <= 1
        assert line["learning_rate"] == pytest.approx(1e-2 * learning_rate_factor(step - 1, 6, 2, 0.01))
        parts = [line["codes"], line["lengths"], line["end"]]
        assert min(parts) < line["total"] < max(parts)
        assert min(line["block_1"], line["block_2"]) <= line["codes"] <= max(line["block_1"], line["block_2"])
        held_out = {name for name in line if name.startswith(("val/", "samples/"))}
        expected = {f"val/{task}{name}" for task in ("", "prediction_") for name in figures} | {"samples/tokens"}
        assert held_out == (expected if step in (3, 6) else set())
    assert log[1]["total"] == pytest.approx(np.log(76), abs=0.3)  # all equally likely at first
    assert 4 <= log[6]["samples/tokens"] <= 16


def test_the_loss_is_the_mean_over_all_that_is_predicted(tokens, tmp_path):
    """With a learning rate of 0, of what the exported weights give to each sequence by itself."""
    before = train(argv(tmp_path / "a", tokens, "--steps=1", "--learning_rate=0", "--export_dtype=float32"))
    train(argv(tmp_path / "b", tokens, f"--init_from={before}", "--steps=1", "--learning_rate=0", "--rows=3"))
    model = EvatokForCausalLM.from_pretrained(before)
    rows = TokenRows(TokenDataset.load(tokens), model.codec, 48, Tasks(prediction=0.5), 0, 3).take().rows
    losses = []
    for sequence in (sequence for row in rows for sequence in row):
        kinds, _ = model.codec.describe(sequence)
        logits = model(sequence[None]).logits[0].log_softmax(-1).detach()
        losses += [-float(logits[place - 1, sequence[place]]) for place in kinds.nonzero().flatten()]
    assert read_log(tmp_path / "b")[1]["total"] == pytest.approx(np.mean(losses), abs=1e-5)
    summary = json.loads((tmp_path / "b" / "generator" / "training.json").read_text())
    assert summary["tokens"] == len(losses) and summary["sequences"] == sum(map(len, rows))
    assert summary["continues"]["steps"] == 1


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (5, []),
        # Means go over checkpoints; two forward passes a step.
        (10, [*BF16, "--log_every=3", "--gradient_accumulation_steps=2", "--layout=end-of-block"]),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(trained, tokens, tmp_path, step, more):
    straight, first = trained
    more = more or first
    if more is not first:
        straight = tmp_path / "straight"
        train(argv(straight, tokens, *more))
    resumed = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train(argv(resumed, tokens, *more))
    assert not (resumed / "generator").exists()
    train(argv(resumed, tokens, "--resume=latest", *more))
    assert read_log(resumed) == read_log(straight)
    for name in ("generator", "checkpoint-6"):
        assert same_weights(weights(resumed / name), weights(straight / name))
    summaries = [json.loads((run / "generator" / "training.json").read_text()) for run in (resumed, straight)]
    for name in ("held_out", "tokens", "sequences", "epochs"):
        assert summaries[0][name] == summaries[1][name]


def test_a_checkpoint_goes_on_with_the_same_sequences_only(trained, tokens, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    for more in (["--seed=1"], ["--row_length=47"], ["--label_dropout=0"]):
        with pytest.raises(ValueError, match="trained on rows of .* resume with the settings it was made with"):
            train(argv(run, tokens, "--resume=latest", "--steps=8", *more))
    with pytest.raises(ValueError, match="checkpoint-4, checkpoint-6, log.jsonl; use --resume latest"):
        train(argv(run, tokens))
    with pytest.raises(ValueError, match="there is no checkpoint"):
        train(argv(tmp_path / "other", tokens, "--resume=latest"))


# --- what is learned ---


def test_clips_that_are_learned_by_heart_are_generated(fingerprint, tmp_path):
    tokens = write_tokens(tmp_path / "tokens", fingerprint, count=3)
    sizes = json.dumps({**SIZES, "hidden_size": 64})
    more = ["--steps=120", "--rows=6", "--label_dropout=0", "--prediction_label_dropout=1", "--condition_dropout=0"]
    folder = train(argv(tmp_path / "run", tokens, *more, "--save_every=120", f"--model_overrides={sizes}"))
    log = read_log(tmp_path / "run")
    assert log[120]["total"] < 0.05 < 3 < log[1]["total"] and log[120]["length_accuracy"] == 1
    model, data = EvatokForCausalLM.from_pretrained(folder), TokenDataset.load(tokens)
    for row in data:
        label = None if row.label < 0 else row.label
        for prompt in (Prompt(label), Prompt(None, row.condition_lengths, row.condition_ids)):
            made = sample(model, [prompt], [0], temperature=0)
            assert torch.equal(made.lengths[0], row.lengths) and torch.equal(made.ids, row.ids)
    # The seed draws no clip that it was not shown.
    known = {tuple(row.ids.tolist()) for row in data}
    drawn = sample(model, [Prompt(1)] * 4, range(4), temperature=0.5)
    assert {tuple(drawn.clip(index).ids.tolist()) for index in range(4)} <= known


# --- videos ---


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_labelled(tmp_path_factory.mktemp("videos"))


def from_videos(output_dir: Path, videos: Path, checkpoint: Path, *more: object) -> list[str]:
    given = [f"--train_data={videos}", f"--tokenizer={checkpoint}", "--known_frames=2", "--batch_size=3"]
    return argv(output_dir, None, *given, "--num_workers=0", *more)


def test_tokens_on_the_way_are_those_of_a_data_set(videos, checkpoint, tmp_path):
    more = ["--prediction=1", "--condition_dropout=0", "--prediction_label_dropout=0", "--flip_probability=0"]
    args, _ = parse_arguments(GeneratorArguments, "", from_videos(tmp_path, videos, checkpoint, *more))

    class Alone:
        process_index, num_processes, device = 0, 1, torch.device("cpu")

    data = VideoData(args, Alone())
    assert data.facts["class_names"] == ["bird", "cat", "dog"] and data.summary["strategy"] == "router"
    codec = EvatokForCausalLM(args.model_config(data.facts)).codec
    seen = []
    merge = clip_batches.merge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_batches, "merge", lambda parts: seen.append(merge(parts)) or seen[-1])
        tasks = Tasks(args.label_dropout, args.prediction, args.prediction_label_dropout, args.condition_dropout)
        rows = data.rows(codec, 48, tasks).take().rows
    clips = to_float(seen[0]["pixel_values_videos"])
    expected = []
    for label, clip in zip(seen[0]["label"].tolist(), clips, strict=True):
        own, held = data.encode(clip[None])[0], data.encode(hold_last_frame(clip[None], 2))[0]
        prompt = Prompt(label, held["lengths"], held["ids"])
        expected.append(codec.encode(own["lengths"], own["ids"], prompt).tolist())
    assert sorted(expected) == sorted(sequence.tolist() for row in rows for sequence in row)


def test_a_run_on_videos_resumes(videos, checkpoint, tmp_path):
    more = [*BF16, "--steps=4", "--gradient_accumulation_steps=2", "--sample_every=4", "--samples=2"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(from_videos(straight, videos, checkpoint, *more))
    shutil.copytree(straight, resumed)
    for name in ("checkpoint-4", "generator", "samples"):
        shutil.rmtree(resumed / name)
    train(from_videos(resumed, videos, checkpoint, "--resume=latest", *more))
    assert read_log(resumed) == read_log(straight) and len(read_log(straight)) == 4
    assert same_weights(weights(resumed / "generator"), weights(straight / "generator"))
    assert (resumed / "samples" / "step-0000004.png").exists()
    summary = json.loads((resumed / "generator" / "training.json").read_text())
    assert summary["sequences"] == 4 * 2 * 3 and summary["data"]["allocation"].startswith("router")
    assert EvatokForCausalLM.from_pretrained(resumed / "generator").config.class_names == ["bird", "cat", "dog"]


def test_tokens_of_the_script_that_makes_them(videos, checkpoint, tmp_path):
    made = run_tokenizing(options(tmp_path / "tokens", videos, checkpoint, "--known_frames=2"))
    folder = train(argv(tmp_path / "run", made, "--steps=1"))
    config = EvatokForCausalLM.from_pretrained(folder).config
    assert (config.class_names, config.known_frames) == (["bird", "cat", "dog"], 2) and config.fps > 0


# --- refusals ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (['--model_overrides={"codebook_size": 32}'], "tokens have codebook_size 64, --model_overrides asks for 32"),
        (['--model_overrides={"block_lengths": [8, 16]}'], r"tokens have block_lengths \[2, 4, 8\], .* asks for"),
        (["--row_length=12"], r"the longest clip needs \d+ places, --row_length is 12"),
        (["--train_tokens=nowhere"], "there is no folder nowhere"),
        (["--preset=huge"], "unknown preset"),
        (["--val_tokens={other}"], "has tokenizer_fingerprint other, training has"),
        (["--val_tokens={plain}"], "has no conditions, which --prediction needs"),
        (["--train_tokens={plain}"], "has no conditions, which --prediction needs"),
        (["--train_tokens={empty}"], "holds 0"),
        (
            ["--train_tokens={other}", "--tokenizer={checkpoint}", "--sample_every=1"],
            "the tokens are of tokenizer other",
        ),
        (["--init_from={trained}", "--layout=end-of-block"], "has layout length-first, this run end-of-block"),
    ],
)
def test_what_does_not_fit_is_refused(tokens, fingerprint, checkpoint, trained, tmp_path, more, message):
    made = {
        "other": lambda: write_tokens(tmp_path / "other", "other"),
        "plain": lambda: write_tokens(tmp_path / "plain", fingerprint, known=None),
        "empty": lambda: write_tokens(tmp_path / "empty", fingerprint, count=1),
        "checkpoint": lambda: checkpoint,
        "trained": lambda: trained[0] / "generator",
    }
    for name, make in made.items():
        more = [one.replace(f"{{{name}}}", str(make())) if f"{{{name}}}" in one else one for one in more]
    if any("empty" in one for one in more):
        path = tmp_path / "empty" / "tokens.json"
        path.write_text(path.read_text().replace('"clips": 1', '"clips": 0'))
        SHARDS.list(tmp_path / "empty")[0].unlink()
    with pytest.raises(ValueError, match=message) as caught:
        train(argv(tmp_path / "run", tokens, *more))
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "generator").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--known_frames=4"], "known_frames must be from 1 to 3"),
        (["--row_length=20"], "a clip may need 21 places, --row_length is 20"),
        (["--train_data=no/such/folder"], "There is no folder"),
    ],
)
def test_videos_that_do_not_fit_are_refused(videos, checkpoint, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train(from_videos(tmp_path / "run", videos, checkpoint, *more))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps=0"], "--steps must be at least 1"),
        (["--sample_every=-1"], "--sample_every must be at least 0"),
        (["--prediction=1.5"], "--prediction must lie in"),
        (["--layout=prefix"], "length-first"),
        (["--attn_implementation=flash"], "sdpa, eager, split"),
        (["--attn_implementation=split", "--compile=true"], "--compile works with"),
        (["--mixed_precision=fp8"], "auto, no, fp16 or bf16"),
        (["--export_dtype=int8"], "float32, bfloat16"),
        (["--train_data=videos"], "give either --train_tokens"),
        (["--batch_size=3", "--num_workers=2"], "multiple of --num_workers"),
        (["--model_overrides={"], "no JSON"),
        (["--model_overrides=[1]"], "must map fields"),
        (['--model_overrides={"hidden": 3}'], "no .*hidden"),
        (['--model_overrides={"class_names": ["a"]}'], r"cannot set ['class_names']"),
    ],
)
def test_wrong_options_end_with_code_2(tokens, tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit) as ended:
        train(argv(tmp_path / "run", tokens, *wrong))
    assert ended.value.code == 2 and message.replace(".*", "['") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_wrong_options_of_videos_end_with_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train(argv(tmp_path / "run", None, "--train_data=videos", "--strategy=best"))
    assert ended.value.code == 2 and "unknown strategy 'best'" in capsys.readouterr().err


def test_a_mistake_ends_with_code_1_and_one_line(tmp_path, monkeypatch, caplog):
    given = argv(tmp_path / "run", tmp_path)
    assert "holds no tokens" in error_of_script(SCRIPT, given, monkeypatch, caplog)
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_spoil_no_checkpoint(tokens, tmp_path):
    with pytest.raises(ValueError, match=r"(loss|gradient) became (nan|inf) at step [12].*Lower --learning_rate"):
        train(argv(tmp_path, tokens, "--learning_rate=1e38", "--warmup_steps=0", "--save_every=1"))
    assert not (tmp_path / "generator").exists()


def test_tokens_without_classes(fingerprint, tmp_path):
    plain = write_tokens(tmp_path / "tokens", fingerprint, classes=(), known=None)
    more = ["--prediction=0", "--steps=1", "--gradient_checkpointing=true", *BF16]
    folder = train(argv(tmp_path / "run", plain, *more, f"--model_overrides={json.dumps({**SIZES, 'fps': 12})}"))
    config = EvatokForCausalLM.from_pretrained(folder).config
    assert (config.num_classes, config.class_names, config.known_frames, config.fps) == (0, None, 5, 12)


def test_the_picture_of_clips(tmp_path):
    clips = torch.full((3, 4, 3, 8, 8), -1.0)
    clips[1] = 1
    clips[2, :, 0] = 1
    save_clips(clips, tmp_path / "clips.png", frames=2)
    picture = np.asarray(Image.open(tmp_path / "clips.png"))
    assert picture.shape == (2 * 12, 2 * 20, 3)
    assert (picture[:8, :16] == 0).all() and (picture[:8, 20:36] == 255).all()
    assert (picture[12:20, :16] == (255, 0, 0)).all() and (picture[12:20, 20:] == 255).all()  # no fourth clip
    assert (picture[8:12] == 255).all() and (picture[:, 16:20] == 255).all()


# --- processes ---


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_rows(trained, tokens, tmp_path):
    def run(folder: Path, processes: int, rows: int, *more: str) -> Path:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(SCRIPT), *argv(folder, tokens, f"--rows={rows}", "--export_dtype=float32", *more)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    one, two, resumed = run(tmp_path / "one", 1, 4), run(tmp_path / "two", 2, 2), tmp_path / "resumed"
    for expected, line in zip(read_log(one).values(), read_log(two).values(), strict=True):
        assert line == pytest.approx(expected, abs=1e-4)
    a, b = weights(one / "generator"), weights(two / "generator")
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    summaries = [json.loads((folder / "generator" / "training.json").read_text()) for folder in (one, two)]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
    shutil.copytree(two, resumed)
    for name in ("checkpoint-6", "generator"):
        shutil.rmtree(resumed / name)
    run(resumed, 2, 2, "--resume=latest")
    assert read_log(resumed) == read_log(two)
    assert same_weights(weights(resumed / "generator"), b)


@pytest.mark.slow
def test_a_process_that_is_killed_can_go_on(tokens, tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    more = ["--steps=60", "--save_every=5"]
    command = [sys.executable, str(SCRIPT), *argv(run, tokens, *more)]
    # One step is slow enough to be killed in.
    driver = (
        "import runpy, sys, time, torch\n"
        "step = torch.optim.AdamW.step\n"
        "torch.optim.AdamW.step = lambda *args, **more: (time.sleep(0.1), step(*args, **more))[1]\n"
        f"sys.path.insert(0, {str(TRAINING.parent)!r})\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver, *command[1:]], stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 240
        while not (run / "checkpoint-10").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors[-2000:]
    train(argv(run, tokens, "--resume=latest", *more))
    train(argv(straight, tokens, *more))
    assert read_log(run) == read_log(straight)
    assert same_weights(weights(run / "generator"), weights(straight / "generator"))


@pytest.mark.parametrize("attention", ["sdpa", "split"])
def test_no_step_waits_for_the_device(tokens, tmp_path, monkeypatch, attention):
    given = argv(tmp_path, tokens, "--save_every=4", f"--attn_implementation={attention}")
    assert waits_of_steps(train, given, monkeypatch) == []
