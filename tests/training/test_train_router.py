"""training/train_router.py: whole runs of a very small router on curated clips, and that they resume exactly."""

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
from curated_samples import CLIP, METRIC, SPACE, TRAINING, make_proxy, make_videos, options, run_curation
from device_waits import waits_of_steps
from PIL import Image
from safetensors.torch import load_file
from script_samples import error_of_script
from transformers import AutoModel

from evatok_hf import EvatokModel, EvatokRouter
from evatok_hf.allocation.reward import proxy_reward, reward_percentile
from evatok_hf.data.curated import CuratedClips
from evatok_hf.data.streaming import to_float
from training import train_router
from training.common.arguments import parse_arguments
from training.common.reporting import MovingMean, save_router_curve

SCRIPT = TRAINING / "train_router.py"
MODEL = {**CLIP, **SPACE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SETTINGS = {
    "quality": ["--targets=quality"],
    "soft": ["--targets=soft"],
    "argmax": ["--targets=argmax"],
    "one quality": ["--targets=argmax", "--quality=1.2"],
    "one quality, soft": ["--targets=soft", "--quality=1.2"],
}


class Killed(BaseException):
    """What no handler of the script catches."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos") / "all", 8)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory) -> Path:
    return make_proxy(tmp_path_factory.mktemp("proxy") / "tokenizer")


@pytest.fixture(scope="module")
def curated(videos, proxy, tmp_path_factory) -> Path:
    """24 clips, three of each video."""
    more = ["--clips=24", "--clips_per_video=3", "--shard_size=24"]
    return run_curation(options(tmp_path_factory.mktemp("curated") / "all", videos, proxy, *more))


@pytest.fixture(scope="module")
def argv(curated, videos):
    def given(output_dir: Path, *more: object) -> list[str]:
        values = {
            "curated": curated,
            "train_data": videos,
            "output_dir": output_dir,
            "model_overrides": json.dumps(MODEL),
            "val_fraction": 0.3,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "steps": 6,
            "ema_decay": 0.9,
            "mixed_precision": "no",
            "save_every": 2,
            "log_every": 1,
            "validate_every": 3,
            "cpu": "true",
        }
        return [*(f"--{name}={value}" for name, value in values.items()), *map(str, more)]

    return given


def train(argv: list[str]) -> Path:
    # accelerate keeps its settings for the life of a process, as is right outside tests.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return train_router.main(argv)


def read_log(output_dir: Path) -> dict[int, dict]:
    """The log by step, without times; a step that was done twice, as the second time."""
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    clock = ("clips_per_second", "mfu", "data_wait", "seconds")
    return {line["step"]: {name: value for name, value in line.items() if name not in clock} for line in lines}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kill_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Dies before the loss of a step."""
    loss, calls = train_router.Batches.__call__, []

    def until(self, number: int):
        calls.append(number)
        if number == step:
            raise Killed
        return loss(self, number)

    patch.setattr(train_router.Batches, "__call__", until)


@pytest.fixture(scope="module")
def trained(argv, tmp_path_factory) -> Path:
    """A run without interruption."""
    output_dir = tmp_path_factory.mktemp("run") / "quality"
    assert train(argv(output_dir)) == output_dir / "router"
    return output_dir


def test_what_a_run_leaves(trained, curated, proxy):
    names = {"checkpoint-4", "checkpoint-6", "clips.npy", "clips.sha256", "log.jsonl", "router"}
    assert {path.name for path in trained.iterdir()} == names
    router, data = EvatokRouter.from_pretrained(trained / "router").eval(), CuratedClips.load(curated)
    assert type(AutoModel.from_pretrained(trained / "router")) is EvatokRouter
    config = router.config
    assert (config.distance, config.quality) == (METRIC, None)
    assert (config.distance_low, config.distance_high) == (data.bounds.low, data.bounds.high)
    assert config.proxy_fingerprint == EvatokModel.from_pretrained(proxy).fingerprint()
    assert router.assign(torch.zeros(1, 4, 3, 32, 32), 1.0).shape == (1, 2)
    assert not same_weights(weights(trained / "router"), weights(trained / "checkpoint-6"))  # averaged and last
    assert Image.open(trained / "router" / "loss_curve.png").size[0] > 400

    summary = json.loads((trained / "router" / "training.json").read_text())
    held = train_router.held_out(data, 0.3)
    assert (summary["steps"], summary["seed"], summary["more_curation"]) == (6, 0, None)
    assert (summary["clips"], summary["clips_held_out"]) == (int((~held).sum()), int(held.sum()))
    assert summary["curation"] == data.summary and "--steps=6" in summary["command"]
    # The figures are those of the exported weights on the clips held out.
    clips = to_float(torch.from_numpy(np.load(trained / "clips.npy")[held]))
    for quality in (0.8, 1.6):
        with torch.no_grad():
            chosen = router.choose(router(clips, quality).logits)
        rewards = proxy_reward(data.distances()[held], data.space, data.bounds, quality)
        assert summary["held_out"][f"val/percentile_{quality}"] == pytest.approx(reward_percentile(rewards, chosen))
        tokens = data.space.to_lengths(chosen).sum(1).double().mean().item()
        assert summary["held_out"][f"val/tokens_{quality}"] == pytest.approx(tokens)


def test_the_log(trained):
    log = read_log(trained)
    assert list(log) == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] > 0 and line["learning_rate"] > 0 for line in log.values())
    figures = {f"val/{kind}_{quality}" for kind in ("percentile", "tokens") for quality in (0.8, 1.0, 1.2, 1.4, 1.6)}
    for step, line in log.items():
        assert {name for name in line if name.startswith("val/")} == (figures if step in (3, 6) else set())
    assert all(0 <= value <= 100 for name, value in log[6].items() if name.startswith("val/percentile"))


def test_no_video_is_both_trained_on_and_held_out(curated):
    data = CuratedClips.load(curated)
    held, sources = train_router.held_out(data, 0.3), np.array(data.rows["source"][:])
    assert held.any() and not held.all()
    assert not set(sources[held]) & set(sources[~held])
    assert not train_router.held_out(data, 0.0).any()


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_kind_of_target_learns(argv, curated, tmp_path, setting):
    more = ["--steps=40", "--batch_size=8", "--learning_rate=3e-3", "--save_every=40", "--val_fraction=0"]
    folder = train(argv(tmp_path, *SETTINGS[setting], *more))
    losses = [line["loss"] for line in read_log(tmp_path).values()]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
    router, quality = EvatokRouter.from_pretrained(folder).eval(), 1.2 if "one" in setting else None
    assert router.config.quality == quality
    # What it chooses is better than chance on what it saw.
    data, clips = CuratedClips.load(curated), to_float(torch.from_numpy(np.load(tmp_path / "clips.npy")))
    rewards = proxy_reward(data.distances(), data.space, data.bounds, 1.2)
    with torch.no_grad():
        chosen = router.choose(router(clips).logits)
    chance = [reward_percentile(rewards, torch.full((24,), index)) for index in range(len(data.space))]
    assert reward_percentile(rewards, chosen) > np.mean(chance)
    assert not any(name.startswith("val/") for line in read_log(tmp_path).values() for name in line)


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (5, []),
        (2, ["--targets=soft", "--channel_shuffle=0.5", "--mixed_precision=bf16"]),
        # Means go over checkpoints.
        (5, ["--targets=argmax", "--quality=1.2", "--log_every=3"]),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(argv, trained, tmp_path, step, more):
    straight = trained
    if more:
        straight = tmp_path / "straight"
        train(argv(straight, *more))
    resumed = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train(argv(resumed, *more))
    assert not (resumed / "router").exists()
    train(argv(resumed, "--resume=latest", *more))
    assert read_log(resumed) == read_log(straight)
    for name in ("router", "checkpoint-6"):
        assert same_weights(weights(resumed / name), weights(straight / name))
    summaries = [json.loads((run / "router" / "training.json").read_text()) for run in (resumed, straight)]
    assert summaries[0]["held_out"] == summaries[1]["held_out"]


def test_a_process_that_is_killed_can_go_on(argv, trained, tmp_path):
    run = tmp_path / "run"
    long = [sys.executable, str(SCRIPT), *argv(run, "--save_every=1", "--keep_checkpoints=9")]
    # One step is slow enough to be killed in.
    driver = (
        "import runpy, sys, time, torch\n"
        "step = torch.optim.AdamW.step\n"
        "torch.optim.AdamW.step = lambda *args, **more: (time.sleep(0.5), step(*args, **more))[1]\n"
        f"sys.path.insert(0, {str(TRAINING.parent)!r})\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver, *long[1:]], stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 240
        while not (run / "checkpoint-2").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors[-2000:]
    assert not (run / "router").exists()
    train(argv(run, "--resume=latest"))
    assert read_log(run) == read_log(trained)
    assert same_weights(weights(run / "router"), weights(trained / "router"))


def test_a_run_that_is_killed_while_it_cuts_clips_begins_anew(argv, trained, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(argv(tmp_path))
    assert not (tmp_path / "clips.npy").exists()
    train(argv(tmp_path))
    assert read_log(tmp_path) == read_log(trained)


def test_a_run_that_left_no_checkpoint(argv, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 1)
        with pytest.raises(Killed):
            train(argv(tmp_path))
    with pytest.raises(ValueError, match="there is no checkpoint in .*leave --resume out"):
        train(argv(tmp_path, "--resume=latest"))
    with pytest.raises(ValueError, match=r"log.jsonl of a run that left no checkpoint; remove it"):
        train(argv(tmp_path))


def test_an_earlier_run_is_not_overwritten(argv, trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    with pytest.raises(ValueError, match="checkpoint-4, checkpoint-6, log.jsonl; use --resume latest"):
        train(argv(trained))
    with pytest.raises(ValueError, match="checkpoint-6, later than"):
        train(argv(trained, "--resume", trained / "checkpoint-4"))
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_clips_are_cut_once_and_again_for_other_data(argv, curated, videos, tmp_path, monkeypatch):
    data, cuts = CuratedClips.load(curated), []
    cut = CuratedClips.cut_into
    monkeypatch.setattr(CuratedClips, "cut_into", lambda self, *a, **m: (cuts.append(self), cut(self, *a, **m))[1])
    args, _ = parse_arguments(train_router.RouterArguments, "", argv(tmp_path))

    class Alone:
        is_main_process = True

        def wait_for_everyone(self) -> None:
            pass

    def load(clips: CuratedClips) -> np.ndarray:
        return train_router.load_clips(clips, "clips.npy", args, Alone())

    expected = data.cut([videos])
    cuts.clear()
    assert np.array_equal(load(data), expected) and np.array_equal(load(data), expected) and len(cuts) == 1

    def changed(rows=None, **clip) -> CuratedClips:
        summary = {**data.summary, "clip": {**data.summary["clip"], **clip}}
        return CuratedClips(data.folder, summary, rows or data.rows, data.space, data.bounds)

    # The same crops at another size, the same ends with other frames between, other clips.
    assert load(changed(image_size=16)).shape[-1] == 16 and len(cuts) == 2
    frozen = data.rows.map(lambda row: {"frames": [row["frames"][0], *[row["frames"][-1]] * 3]})
    assert not np.array_equal(load(changed(frozen)), expected) and len(cuts) == 3
    fewer = data.rows.select(range(5))
    assert np.array_equal(load(changed(fewer)), expected[:5]) and len(cuts) == 4
    assert np.array_equal(load(data), expected) and len(cuts) == 5
    (tmp_path / "clips.sha256").write_text("{")  # half-written
    assert np.array_equal(load(data), expected) and len(cuts) == 6


def test_what_was_not_measured_is_estimated():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 40, generator=generator)
    truth = torch.randn(60, 3, generator=generator) @ basis + torch.linspace(0, 1, 40)
    truth += 0.01 * torch.randn(60, 40, generator=generator)
    known, full = truth.clone(), torch.arange(60) < 20
    known[20:] = known[20:].where(torch.rand(40, 40, generator=generator) < 0.3, torch.nan)
    made = train_router.complete(known, full)
    assert torch.equal(made[known.isfinite()], truth[known.isfinite()])
    assert (made - truth).abs().mean() < 0.05 < (truth - truth[:20].mean(0)).abs().mean()
    assert train_router.complete(known[:, :2], full).isfinite().all()  # fewer assignments than components
    assert torch.equal(train_router.complete(truth, full), truth)


def test_clips_measured_in_part(argv, curated, videos, proxy, tmp_path):
    part = run_curation(
        options(tmp_path / "part", videos, proxy, "--clips=16", "--branches=1", "--nodes_per_batch=4", "--seed=5")
    )
    train(argv(tmp_path / "run", f"--more_curated={part}"))
    log = read_log(tmp_path / "run")
    assert all(np.isfinite(value) for line in log.values() for value in line.values())
    summary = json.loads((tmp_path / "run" / "router" / "training.json").read_text())
    assert summary["clips"] + summary["clips_held_out"] < 24 + 16  # of the second, only other videos than held-out ones
    assert summary["more_curation"]["branches"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run" / "router").values())
    for more, message in (
        ([f"--more_curated={part}", "--targets=argmax"], "argmax needs every assignment measured"),
        ([f"--curated={part}"], "P needs every assignment of held-out clips measured and .*--more_curated"),
    ):
        with pytest.raises(ValueError, match=message):
            train(argv(tmp_path / "refused", *more))
    other = run_curation(options(tmp_path / "other", videos, make_proxy(tmp_path / "proxy", seed=1)))
    with pytest.raises(ValueError, match="was curated with proxy_fingerprint"):
        train(argv(tmp_path / "refused", f"--more_curated={other}"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model_overrides={}"], "was curated with num_frames 4, the router has 16; choose another --preset or give"),
        (
            [f"--model_overrides={json.dumps({**MODEL, 'num_blocks': 4})}"],
            "curated with num_blocks 2, the router has 4",
        ),
        ([f"--model_overrides={json.dumps({**MODEL, 'block_lengths': [2, 4]})}"], r"curated with block_lengths \[2, 4"),
        (["--model_overrides={"], "no JSON"),
        (["--model_overrides=[1]"], "must map fields"),
        (['--model_overrides={"hidden": 3}'], "has no .*hidden"),
        (['--model_overrides={"quality": 1.2}'], r"cannot set \['quality'\]"),
        (['--model_overrides={"distance_low": 0}'], r"cannot set \['distance_low'\]"),
        (["--preset=huge"], "unknown preset"),
        (["--curated=nowhere"], "no finished curation"),
        (["--train_data=no/such/folder"], "There is no folder"),
        (["--val_fraction=0.999"], "all 24 clips are held out"),
    ],
)
def test_what_does_not_fit_is_refused(argv, tmp_path, more, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(argv(tmp_path / "run", *more))
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "router").exists()


def test_a_mistake_ends_with_code_1_and_one_line(argv, tmp_path, monkeypatch, caplog):
    given = argv(tmp_path / "run", f"--curated={tmp_path}")
    assert "no finished curation" in error_of_script(SCRIPT, given, monkeypatch, caplog)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps=0"], "--steps must be at least 1"),
        (["--targets=hard"], "argmax, soft, quality"),
        (["--quality=1.2"], "--targets quality trains for every w_q"),
        (["--quality_range", "1.2", "0.8"], "lo hi"),
        (["--val_fraction=1"], "--val_fraction must lie in"),
        (["--channel_shuffle=2"], "--channel_shuffle must lie in"),
        (["--mixed_precision=fp8"], "auto, no, fp16 or bf16"),
        (["--export_dtype=int8"], "float32, bfloat16"),
    ],
)
def test_wrong_options_end_with_code_2(argv, tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit) as ended:
        train(argv(tmp_path / "run", *wrong))
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_spoil_no_checkpoint(argv, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"(loss|gradient) became (nan|inf) at step [12].*Lower --learning_rate"):
        train(argv(tmp_path / "a", "--learning_rate=1e38", "--warmup_steps=0"))
    assert not (tmp_path / "a" / "router").exists()
    loss = train_router.RouterLoss.__call__

    def spiked(self, model, video, rows, quality):
        return (
            loss(self, model, video, rows, quality) + (0 * model(video).logits).square().sum().sqrt()
        )  # 0, with an infinite slope

    monkeypatch.setattr(train_router.RouterLoss, "__call__", spiked)
    with pytest.raises(ValueError, match="gradient became nan at step 0"):
        train(argv(tmp_path / "b", "--save_every=1"))
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"clips.npy", "clips.sha256"}


def test_half_precision_export(argv, tmp_path):
    folder = train(argv(tmp_path, "--steps=1", "--export_dtype=bfloat16", "--mixed_precision=bf16"))
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    assert EvatokRouter.from_pretrained(folder).assign(torch.zeros(1, 4, 3, 32, 32)).shape == (1, 2)


def test_means_go_on_where_they_were():
    first, second = MovingMean(3), MovingMean(3)
    for value in (1.0, 2.0):
        first.add({"loss": torch.tensor(value)})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for value in (3.0, 4.0):
        first.add({"loss": torch.tensor(value)})
        second.add({"loss": torch.tensor(value)})
    assert first.values() == second.values() == {"loss": 3.0}


@pytest.mark.parametrize("records", [None, [{"step": 3, "val/percentile_1.2": 40.0}], [{"step": 1, "loss": 0.5}]])
def test_the_curve(tmp_path, records):
    if records is not None:
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    save_router_curve(tmp_path / "log.jsonl", tmp_path / "curve.png")
    picture = np.asarray(Image.open(tmp_path / "curve.png").convert("L"))
    assert picture.shape[1] > 2 * picture.shape[0] > 400 and picture.min() < 100
    assert {path.name for path in tmp_path.iterdir()} <= {"log.jsonl", "curve.png"}


@pytest.mark.slow
def test_two_processes(argv, tmp_path):
    def run(folder: Path, *more: str) -> Path:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(SCRIPT), *argv(folder, *more)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    straight, resumed = run(tmp_path / "straight"), tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    for name in ("checkpoint-6", "router"):
        shutil.rmtree(resumed / name)
    run(resumed, "--resume=latest")
    assert read_log(resumed) == read_log(straight)
    assert same_weights(weights(resumed / "router"), weights(straight / "router"))


def test_no_step_waits_for_the_device(argv, tmp_path, monkeypatch):
    for targets in ("quality", "soft"):
        given = argv(tmp_path / targets, f"--targets={targets}", "--validate_every=4", "--save_every=4")
        assert waits_of_steps(train, given, monkeypatch) == []
