"""training/evaluate.py: figures against those of the parts, the same from any number of processes, and mistakes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from router_samples import make_router
from script_samples import error_of_script
from tokenizer_samples import make_tokenizer, processor
from video_samples import encode, moving_frames

from evatok_hf import EvatokModel, EvatokRouter
from evatok_hf.metrics import load_perceptual, psnr
from evatok_hf.metrics.features import load_video_features
from evatok_hf.metrics.frechet import FrechetStatistics, frechet_distance
from evatok_hf.metrics.pixels import CodebookUse, ssim
from evatok_hf.video import read_video
from training import evaluate

TRAINING = Path(__file__).parents[2] / "training"
SCRIPT = TRAINING / "evaluate.py"

VALUES = json.loads((TRAINING / "protocols" / "all_clips.json").read_text())
CLIPS = [("a/0.mp4", 0), ("a/0.mp4", 16), ("a/1.mp4", 0), ("b/2.mp4", 0), ("b/2.mp4", 16)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_tokenizer()
    model.save_pretrained(folder / "tokenizer")
    processor().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def routed(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    make_router(EvatokModel.from_pretrained(checkpoint / "tokenizer").config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Three videos that hold five clips, one that is too short, and two files that are damaged."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    for index, (place, count) in enumerate([("a", 33), ("a", 31), ("b", 32), ("b", 15)]):
        noise = np.random.default_rng(index).normal(size=(count, 36, 44, 3)) * 30 * index
        frames = np.clip(moving_frames(count, 36, 44) * 0.7 + noise + 10 * index, 0, 255).astype(np.uint8)
        encode(folder / place / f"{index}.mp4", frames, options={"preset": "ultrafast"})
    (folder / "b" / "broken.mp4").write_bytes(b"no video")
    whole = (folder / "a" / "0.mp4").read_bytes()
    (folder / "b" / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    return folder


@pytest.fixture
def protocol(tmp_path):
    """The path of a protocol like all_clips with some fields replaced."""

    def make(**fields) -> Path:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({**VALUES, "name": "mine", **fields}))
        return path

    return make


@pytest.fixture
def run(checkpoint, videos, tmp_path):
    """Evaluates and returns the report."""

    def evaluated(protocol: Path | str, *more: object, data: Path = videos) -> dict:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        given = {"protocol": protocol, "data": data, "model": checkpoint, "output": tmp_path / "r" / "result.json"}
        argv = [*(f"--{name}={value}" for name, value in given.items()), "--cpu=true", *map(str, more)]
        return json.loads(evaluate.main(argv).read_text())

    return evaluated


@pytest.fixture(scope="module")
def pairs(checkpoint, videos):
    """Real clips, reconstructed clips (N, F, 3, S, S) and tokens of uniform length 8, by the parts themselves."""
    model = EvatokModel.from_pretrained(checkpoint / "tokenizer").eval()
    real = [
        processor()(
            read_video(videos / name)[0][first : first + 16], input_data_format="channels_last", return_tensors="pt"
        ).pixel_values_videos
        for name, first in CLIPS
    ]
    real = torch.cat(real)
    tokens = model.encode(real, 8)
    return model, real, model.decode(tokens), tokens


def distance(features, real, made) -> float:
    sides = []
    for video in (real, made):
        sides.append(FrechetStatistics(features.dim))
        sides[-1].update(features(video))
    return frechet_distance(*sides)


def value(report: dict, name: str) -> float:
    return report["metrics"][name]["value"]


def test_figures_are_those_of_the_parts(run, pairs, capsys):
    model, real, made, tokens = pairs
    report = run("all_clips", "--uniform=8", "--batch_size=2")
    assert report["clips"] == 5 and {entry["clips"] for entry in report["metrics"].values()} == {5}
    assert value(report, "psnr") == pytest.approx(psnr(real, made).mean().item(), rel=1e-9)
    assert value(report, "ssim") == pytest.approx(ssim(real, made).mean().item(), rel=1e-9)
    perceptual = load_perceptual("perceptual-effnet-lite0").video(real, made).mean().item()
    assert value(report, "perceptual-effnet-lite0") == pytest.approx(perceptual, rel=1e-5) and perceptual > 0
    features = load_video_features("fd-transnetv2")
    expected = distance(features, real, made)
    assert value(report, "fd-transnetv2") == pytest.approx(expected, rel=1e-6) and expected > 0.01
    assert report["metrics"]["fd-transnetv2"]["weights_sha256"] == features.weights_sha256
    used = CodebookUse(256)
    used.update(tokens.ids)
    codebook = report["metrics"]["codebook"]
    assert [codebook[name] for name in ("use", "entropy", "perplexity")] == [used.use, used.entropy, used.perplexity]
    assert value(report, "tokens") == report["tokens_per_clip"] == 32
    assert report["tokenizer"]["fingerprint"] == model.fingerprint()
    assert report["allocation"] == {"strategy": "uniform", "lengths": [8] * 4}

    printed = capsys.readouterr().out.splitlines()
    row = next(line for line in printed if line.startswith("| fd-transnetv2"))
    for cell in (f"{expected:.4f}", " 5 ", "all_clips", features.weights_sha256[:12], model.fingerprint()):
        assert cell in row
    assert any(line.startswith("| codebook entropy") for line in printed)


def test_what_was_left_out_is_counted_and_named(run, capsys, caplog):
    report = run("all_clips", "--metrics", "psnr")
    assert report["skipped"] == {"unreadable": 2, "too short": 1} and report["videos"] == 6
    named = {(entry["video"], entry["cause"]) for entry in report["skipped_videos"]}
    assert named == {("b/3.mp4", "too short"), ("b/broken.mp4", "unreadable"), ("b/cut.mp4", "unreadable")}
    assert report["complete"] is False and len(report["incomplete_because"]) == 2
    assert report["incomplete_because"][0] == "2 video(s) could not be read"
    assert "not measured: ssim" in report["incomplete_because"][1] and list(report["metrics"]) == ["psnr"]
    printed = capsys.readouterr().out
    assert "2 video(s) unreadable" in printed and "INCOMPLETE: 2 video(s) could not be read" in printed


def test_a_video_that_breaks_off_gives_the_clips_before(run, protocol, tmp_path, caplog):
    folder = tmp_path / "broken"
    folder.mkdir()
    noise = np.random.default_rng(0).normal(size=(48, 36, 44, 3)) * 40
    frames = np.clip(moving_frames(48, 36, 44) + noise, 0, 255).astype(np.uint8)
    path = encode(folder / "v.mp4", frames, options={"preset": "ultrafast"})
    data = bytearray(path.read_bytes())
    data[len(data) * 6 // 10 : len(data) * 8 // 10] = bytes(len(data) * 8 // 10 - len(data) * 6 // 10)
    path.write_bytes(data)
    report = run(protocol(metrics=["psnr"], count=3), "--uniform=8", data=folder)
    assert report["clips"] == 1 and report["skipped"] == {"unreadable": 1} and not report["complete"]
    assert "left out 2 clip(s) of v.mp4" in caplog.text


def test_the_protocol_and_the_run_are_on_record(run, protocol):
    path = protocol(
        metrics=["psnr", "tokens"], clips={"kind": "list", "clips": [list(clip) for clip in CLIPS]}, count=5
    )
    report = run(path, "--lengths", 2, 4, 8, 16)
    assert report["protocol"] == json.loads(path.read_text())
    assert report["protocol_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["allocation"] == {"strategy": "fixed", "lengths": [2, 4, 8, 16]} and value(report, "tokens") == 30
    assert "--lengths 2 4 8 16" in report["command"] and report["versions"]["torch"] == torch.__version__
    assert report["resolution"] == [16, 32, 32] and report["dtype"] == "float32"
    # The damaged videos are not of this protocol, but they might have been.
    assert report["incomplete_because"] == ["2 video(s) could not be read"]


def test_batches_and_readers_change_nothing(run):
    metrics = ("--metrics", "psnr", "perceptual-effnet-lite0", "codebook", "tokens")
    first = run("all_clips", *metrics, "--batch_size=1")
    second = run("all_clips", *metrics, "--batch_size=3", "--num_workers=2")
    assert first["clips_sha256"] == second["clips_sha256"] and first["clips"] == second["clips"] == 5
    for name in ("psnr", "perceptual-effnet-lite0", "tokens"):
        assert value(first, name) == pytest.approx(value(second, name), rel=1e-6)
    assert first["metrics"]["codebook"] == second["metrics"]["codebook"]


def test_other_clips_than_the_protocol_has(run, protocol, capsys):
    path = protocol(metrics=["psnr"], clips={"kind": "sample", "seed": 7, "count": 9}, count=9)
    report = run(path)
    assert report["clips"] == 5 and report["complete"] is False and report["seeds"] == {"clips": 7}
    assert "INCOMPLETE: the protocol has 9 clips and 5 were scored" in capsys.readouterr().out
    listed = protocol(metrics=["psnr"], clips={"kind": "list", "clips": [["a/0.mp4", 1], ["z.mp4", 0]]}, count=2)
    report = run(listed)
    assert report["clips"] == 1 and "1 video(s) of the protocol are missing" in report["incomplete_because"]


def test_whole_videos_complete_a_protocol(run, protocol, videos):
    report = run(protocol(metrics=["psnr"], clips={"kind": "first"}, count=2), data=videos / "a")
    assert (report["complete"], report["incomplete_because"], report["skipped"]) == (True, [], {})


class Means(torch.nn.Module):
    """In place of an I3D: colour means of each frame, and how large frames are."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        means = x.mean((3, 4)).flatten(1)
        size = torch.full((x.shape[0], 1), float(x.shape[3]))
        return torch.cat([means, size, torch.zeros(x.shape[0], 399 - means.shape[1])], 1)


def test_fvd_with_a_file_of_the_user(run, protocol, pairs, tmp_path, capsys):
    file = tmp_path / "i3d_torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Means()).save(str(file))
    path = protocol(metrics=["fvd"], feature_resolution=8)
    report = run(path, f"--i3d={file}", "--uniform=8")
    _, real, made, _ = pairs
    expected = distance(load_video_features("fvd", file, resolution=8), real, made)
    assert value(report, "fvd") == pytest.approx(expected, rel=1e-6) and expected > 1e-3
    assert report["metrics"]["fvd"]["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="measures fvd: name a copy of i3d_torchscript.pt with --i3d"):
        run(path)
    with pytest.raises(ValueError, match="no file .*missing.pt"):
        run(path, "--i3d=missing.pt")


def test_a_router_chooses(run, protocol, routed, pairs):
    model, real, _, _ = pairs
    path = protocol(metrics=["psnr", "tokens"])
    router = EvatokRouter.from_pretrained(routed).eval()
    for quality, more in ((1.2, ()), (1.9, ("--quality=1.9",))):
        report = run(path, f"--router={routed}", *more)
        lengths = router.assign(real, quality)
        assert value(report, "tokens") == lengths.sum().item() / 5
        made = model.decode(model.encode(real, lengths))
        assert value(report, "psnr") == pytest.approx(psnr(real, made).mean().item(), rel=1e-9)
        assert report["allocation"]["quality"] == quality
        assert report["allocation"]["router_fingerprint"] == router.fingerprint()


def test_another_perceptual_distance_is_noted(run, protocol):
    path = protocol(metrics=["lpips-vgg", "tokens"])
    report = run(path, "--perceptual=perceptual-effnet-lite0")
    assert list(report["metrics"]) == ["tokens", "perceptual-effnet-lite0"]
    assert "not measured: lpips-vgg" in report["incomplete_because"]


def test_bfloat16(run, protocol):
    path = protocol(metrics=["psnr"])
    half, full = run(path, "--dtype=bfloat16"), run(path)
    assert half["dtype"] == "bfloat16" and half["tokenizer"] == full["tokenizer"]
    assert value(half, "psnr") != value(full, "psnr") and value(half, "psnr") == pytest.approx(
        value(full, "psnr"), abs=2
    )


def test_what_cannot_be_measured_is_refused(run, protocol, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "v.mp4").write_bytes(b"no video")
    plain = protocol(metrics=["psnr"])
    refused = {
        r"is for class-to-video, which needs a generator; this command measures reconstruction": ["larp_ucf101_gfvd"],
        r"is for frame-prediction": ["adaptok_k600_frame_prediction"],
        "there is no protocol missing": ["missing"],
        "clips of 16 x 128 x 128 and the tokenizer takes 16 x 32 x 32": ["adaptok_ucf101_rfvd", "--metrics", "psnr"],
        "strategy router needs a router": [plain, "--quality=1.0"],
        "not among the candidates": [plain, "--uniform=9"],
        "a clip has 4 temporal blocks": [plain, "--lengths", 8, 8],
        "there is no .*empty/config.json": [plain, f"--router={tmp_path / 'empty'}"],
        "/tokenizer lacks tensors": [plain, f"--router={checkpoint / 'tokenizer'}"],
        "--i3d is for fvd": [plain, "--i3d=x.pt"],
        "--lpips_weights is for LPIPS": [plain, "--lpips_weights=x.pt"],
        "cannot write .*is a (folder|directory)": [plain, f"--output={tmp_path}"],
        "cannot write": [plain, f"--output={plain}/result.json"],
    }
    for message, (path, *more) in refused.items():
        with pytest.raises(ValueError, match=message):
            run(path, *more)
    with pytest.raises(ValueError, match="here is no folder"):
        run(plain, data=tmp_path / "missing")
    with pytest.raises(ValueError, match="No video in"):
        run(plain, data=tmp_path / "empty")
    with pytest.raises(ValueError, match=r"gave a clip \(1 unreadable, 0 unfit\)"):
        run(plain, data=tmp_path / "bad")
    assert not (tmp_path / "r" / "result.json").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--batch_size=0"], "--batch_size must be at least 1"),
        (["--dtype=fp16"], "--dtype must be one of"),
        (["--perceptual=vgg"], "--perceptual must be one of"),
        (["--metrics", "FVD"], "--metrics must be among"),
        (["--metrics", "psnr", "--perceptual=lpips-vgg"], "either --metrics or --perceptual"),
        (["--uniform=8", "--quality=1"], "contradict each other"),
        (["--generated=x"], "--generated"),
    ],
)
def test_wrong_options_end_with_code_2(run, capsys, wrong, message):
    with pytest.raises(SystemExit) as ended:
        run("all_clips", *wrong)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_mistake_is_one_line_and_code_1(monkeypatch, caplog, tmp_path):
    argv = ["--protocol=larp_ucf101_gfvd", f"--data={tmp_path}", f"--output={tmp_path / 'r.json'}"]
    assert "measures reconstruction" in error_of_script(SCRIPT, argv, monkeypatch, caplog)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(run, checkpoint, videos, tmp_path):
    one = run("all_clips", "--uniform=8")
    output = tmp_path / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    command += ["--protocol=all_clips", f"--data={videos}", f"--model={checkpoint}", f"--output={output}"]
    command += ["--uniform=8", "--cpu=true", "--batch_size=2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(output.read_text())
    assert "2 process(es)" in two["machine"] and "1 process(es)" in one["machine"]
    assert done.stdout.count("fd-transnetv2") == 1  # one table
    for name in ("clips", "clips_sha256", "videos", "skipped", "skipped_videos", "incomplete_because", "allocation"):
        assert two[name] == one[name]
    for name, entry in one["metrics"].items():
        for figure, expected in entry.items():
            found = two["metrics"][name][figure]
            assert found == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected)
