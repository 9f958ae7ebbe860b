"""The command line as a user meets it: results, JSON, and one line for everything that goes wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from video_samples import encode as write_sample
from video_samples import make_audio_only, make_video, moving_frames

import evatok_hf
from evatok_hf import EvatokConfig, EvatokEncoderModel, VideoTokenizer, VideoTokens
from evatok_hf.cli.commands import app
from evatok_hf.video import read_video
from evatok_hf.video.codecs import CODECS


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="evatok", **options)


def run_json(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1 and result.stderr == ""
    return json.loads(result.stdout)


def refused(result, code=1):
    """The one line of a failure."""
    assert result.exit_code == code, result.output
    assert result.stdout == "" and result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result.stderr
    assert "unexpected" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """21 frames of 64 x 48 at 25 fps: one full clip and a tail of 5."""
    return make_video(tmp_path_factory.mktemp("video"), frames=moving_frames(21))


@pytest.fixture
def tokens(video, checkpoint, tmp_path):
    path = tmp_path / "tokens.safetensors"
    VideoTokenizer.from_pretrained(checkpoint).encode(video, 8).save(path)
    return path


# --- what works -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        (["--lengths", "8, 64,16,128"], [8, 64, 16, 128]),
        (["--uniform", "64", "--batch-clips", "2"], [64] * 4),
        ([], [32] * 4),
    ],
)
def test_encode_then_decode_is_reconstruct(video, checkpoint, tmp_path, options, lengths):
    paths = [tmp_path / name for name in ("v.safetensors", "decoded.mp4", "reconstructed.mp4")]
    encoded = run_json("encode", video, paths[0], *options, "--model", checkpoint)
    decoded = run_json("decode", paths[0], paths[1], "--model", checkpoint)
    direct = run_json("reconstruct", video, paths[2], *options, "--model", checkpoint)
    frames, fps = read_video(paths[1])
    again, _ = read_video(paths[2])
    assert frames.shape == (21, 64, 64, 3) and fps == 25 and np.array_equal(frames, again)
    for report in (encoded, decoded, direct):
        assert report["tokens"] == 2 * sum(lengths) and report["frames"] == 21 and report["fps"] == 25
        assert [clip["lengths"] for clip in report["clips"]] == [lengths] * 2
        assert report["checkpoint"] == "random-a" and report["seconds"] > 0
    assert [report["output"] for report in (encoded, decoded, direct)] == [str(path) for path in paths]
    assert direct["psnr"] == pytest.approx(sum(clip["psnr"] for clip in direct["clips"]) / 2)
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths)


def test_tokens_decode_in_another_process(video, checkpoint, tokens, tmp_path):
    source = str(Path(evatok_hf.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from evatok_hf.cli import main; main()", "decode"]
    result = subprocess.run(
        [*command, tokens, tmp_path / "out.mp4", "--model", checkpoint, "--json"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["frames"] == 21 and result.stderr == ""
    run_json("reconstruct", video, tmp_path / "here.mp4", "--uniform", 8, "--model", checkpoint)
    assert np.array_equal(read_video(tmp_path / "out.mp4")[0], read_video(tmp_path / "here.mp4")[0])


def test_help_answers_without_torch():
    code = (
        "import sys; from evatok_hf.cli.commands import app\n"
        "try: app(['reconstruct', '--help'], prog_name='evatok')\n"
        "finally: assert not {'torch', 'transformers', 'av', 'numpy'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(evatok_hf.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "--side-by-side" in result.stdout, result.stderr


def test_version_and_bare_command():
    assert run("--version").stdout == f"evatok_hf {evatok_hf.__version__}\n"
    bare = run()
    assert bare.exit_code == 0 and all(name in bare.stdout for name in ("info", "encode", "decode", "reconstruct"))


def test_side_by_side_with_a_picture_and_a_distance(sample_clip, checkpoint, tmp_path):
    out, picture = tmp_path / "new" / "demo.mp4", tmp_path / "new" / "demo.png"
    options = ["--side-by-side", "--picture", picture, "--perceptual", "perceptual-effnet-lite0", "--fps", "5"]
    options += ["--codec", "hevc"]
    report = run_json("reconstruct", sample_clip, out, *options, "--lengths", "8,16,32,128", "--model", checkpoint)
    frames, fps = read_video(out)
    assert len(frames) == report["frames"] == 50 and fps == report["fps"] == 5
    height, width = frames.shape[1:3]
    assert height > 256 and width >= 512
    assert report["perceptual"]["name"] == "perceptual-effnet-lite0"
    distances = [clip["perceptual"] for clip in report["clips"]]
    assert report["perceptual"]["distance"] == pytest.approx(sum(distances) / 4) and min(distances) > 0
    bits = EvatokConfig.from_pretrained(checkpoint, subfolder="tokenizer").bits([8, 16, 32, 128])
    codec = report["codec"]
    assert codec["name"] == "HEVC (medium)" and codec["clips"] == 2 and codec["tokens_bits"] == bits
    assert codec["bits"] > 0 and codec["tokens_psnr"] < codec["psnr"] < 40 and codec["perceptual"] > 0
    changed = np.abs(frames[3].astype(int) - frames[4]).max(-1)[-70:] > 60  # the dark bar moves to the next block
    assert changed[:, : width // 4].any() and changed[:, width // 4 : width // 2].any()
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 4 * 256 and image.height > 2 * 3 * 256
        assert len(set(image.convert("RGB").resize((200, 60)).get_flattened_data())) > 500
    assert sorted(os.listdir(tmp_path / "new")) == ["demo.mp4", "demo.png"]


def test_a_picture_does_without_a_codec_that_is_not_there(video, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(CODECS, "hevc", replace(CODECS["hevc"], encoder="libx999"))
    words = ("reconstruct", video, "--picture", tmp_path / "p.png", "--codec", "hevc", "--model", checkpoint, "--json")
    result = run(*words)
    assert result.exit_code == 0 and json.loads(result.stdout)["codec"] is None
    assert "no row of hevc: this build of PyAV has no libx999" in result.stderr and result.stderr.count("\n") == 1
    with Image.open(tmp_path / "p.png") as image:
        assert 2 * 2 * 256 < image.height < 2 * 3 * 256 + 2 * 100


def test_scale_enlarges_the_video(video, checkpoint, tmp_path):
    run_json("reconstruct", video, tmp_path / "big.mkv", "--scale", 3, "--model", checkpoint, "--max-clips", 1)
    assert read_video(tmp_path / "big.mkv")[0].shape == (16, 192, 192, 3)


def test_reconstruct_can_only_measure(video, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run_json("reconstruct", video, "--model", checkpoint)
    assert report["output"] is None and math.isfinite(report["psnr"]) and os.listdir(tmp_path) == []


def test_a_perfect_reconstruction_is_null_in_json(video, checkpoint, monkeypatch):
    monkeypatch.setattr("evatok_hf.tokenize.video_tokenizer.frame_psnr", lambda a, b: math.inf)
    assert run_json("reconstruct", video, "--model", checkpoint)["psnr"] is None
    assert "infinite" in run("reconstruct", video, "--model", checkpoint).stdout


def test_the_table_for_people(video, checkpoint, tmp_path):
    result = run("reconstruct", video, tmp_path / "o.mp4", "--model", checkpoint)
    assert result.exit_code == 0 and result.stderr == ""
    assert all(word in result.stdout for word in ("PSNR", " dB", "tokens", "256", "seconds", "o.mp4"))
    assert run("encode", video, tmp_path / "t", "--model", checkpoint, "--quiet").output == ""


def test_the_table_does_not_fold_a_long_path(video, checkpoint, tmp_path):
    path = tmp_path / ("a_long_name_" * 10) / "tokens.safetensors"
    lines = run("encode", video, path, "--model", checkpoint).stdout.splitlines()
    assert any(line.endswith(str(path)) for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_info_describes_each_kind(video, checkpoint, tokens):
    model = run_json("info", checkpoint)
    assert model["candidates"] == [8, 16, 32, 64, 128] and model["assignments"] == 625
    assert model["parameters"] > 0 and model["config"]["num_frames"] == 16
    assert model["fingerprint"] == VideoTokens.load(tokens).fingerprint
    clip = run_json("info", video)
    assert clip == run_json("info", f"file://{video}") | {"video": str(video)}
    assert (clip["frames"], clip["fps"], clip["height"], clip["width"]) == (21, 25, 48, 64)
    codes = run_json("info", tokens)
    assert (codes["kind"], codes["tokens"], codes["frames"], codes["fps"]) == ("tokens", 64, 21, 25)
    table = run("info", checkpoint).stdout
    assert "random-a" in table and "[8, 16, 32, 64, 128]" in table


def test_a_video_of_one_frame_and_one_of_one_pixel(checkpoint, tmp_path):
    one = write_sample(tmp_path / "one.mp4", moving_frames(1))
    dot = write_sample(tmp_path / "dot.mkv", moving_frames(2, 1, 1), codec="ffv1", pix_fmt="bgr0")
    assert run_json("reconstruct", one, tmp_path / "a.mp4", "--model", checkpoint)["frames"] == 1
    assert run_json("reconstruct", dot, tmp_path / "b.mp4", "--model", checkpoint)["frames"] == 2
    assert len(read_video(tmp_path / "a.mp4")[0]) == 1 and len(read_video(tmp_path / "b.mp4")[0]) == 2


# --- what goes wrong ------------------------------------------------------------------------------------------------


def _bad_video(kind, folder, video):
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no video\n" * 50)
    elif kind == "truncated":
        whole = make_video(folder, "mkv", moving_frames(200, 96, 128))
        path = folder / "truncated.mkv"
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
        whole.unlink()
    elif kind == "cut-index":
        path.write_bytes(video.read_bytes()[:-400])
    elif kind == "sound-only":
        make_audio_only(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "unknown-codec":
        data = video.read_bytes()
        assert b"avc1" in data
        path.write_bytes(data.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    return path


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "text", "truncated", "cut-index", "sound-only", "folder", "unknown-codec"]
)
def test_a_bad_video_is_one_line(kind, video, checkpoint, tmp_path):
    bad = _bad_video(kind, tmp_path, video)
    before = sorted(os.listdir(tmp_path))
    for arguments in (["encode", bad, tmp_path / "t"], ["reconstruct", bad, tmp_path / "o.mp4"]):
        assert bad.name in refused(run(*arguments, "--model", checkpoint))
    if kind == "truncated":  # its picture is not there yet, either
        refused(run("reconstruct", bad, tmp_path / "o.mp4", "--picture", tmp_path / "p.png", "--model", checkpoint))
    elif kind != "folder":
        refused(run("info", bad))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--lengths", "8,16,32,60"], 2, ["60", "[8, 16, 32, 64, 128]"]),
        (["--lengths", "8,16,32"], 2, ["4", "[8, 16, 32, 64, 128]"]),
        (["--lengths", "8,16,a,32"], 2, ["--lengths", "commas"]),
        (["--lengths", ""], 2, ["--lengths"]),
        (["--uniform", "7"], 2, ["--uniform", "[8, 16, 32, 64, 128]"]),
        (["--uniform", "8", "--lengths", "8,8,8,8"], 2, ["not both"]),
        (["--device", "quantum"], 1, ["quantum", "cpu"]),
        (["--device", "cuda:77"], 1, ["cuda:77", "cpu"]),
        (["--dtype", "int4"], 1, ["int4", "bfloat16"]),
        (["--fps", "0"], 2, ["--fps"]),
        (["--fps", "nan"], 2, ["--fps"]),
        (["--max-clips", "0"], 2, ["--max-clips"]),
        (["--colour"], 2, ["--colour"]),
        (["--model", "/no/such/folder"], 1, ["/no/such/folder", "Hub"]),
    ],
)
def test_a_bad_option_is_one_line(options, code, words, video, checkpoint, tmp_path):
    model = [] if "--model" in options else ["--model", checkpoint]
    for command in (["encode", video, tmp_path / "t"], ["reconstruct", video, tmp_path / "o.mp4"]):
        line = refused(run(*command, *options, *model), code)
        assert all(word in line for word in words), line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--side-by-side"], 2, "OUT"),
        (["--scale", "2"], 2, "OUT"),
        (["{folder}/a.mp4", "--picture", "{folder}/a.mp4"], 2, "--picture"),
        (["{folder}/a.mp4", "--picture", "{folder}/a.tex"], 1, ".png"),
        (["{folder}/a.mp4", "--perceptual", "taste"], 1, "perceptual-effnet-lite0"),
        (["--codec", "hevc"], 2, "--picture"),
        (["{folder}/a.mp4", "--picture", "{folder}/a.png", "--codec", "vvc"], 1, "h264, hevc, av1"),
    ],
)
def test_options_of_reconstruct_that_do_not_fit(options, code, word, video, checkpoint, tmp_path):
    options = [option.format(folder=tmp_path) for option in options]
    assert word in refused(run("reconstruct", video, *options, "--model", checkpoint), code)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.docx", "noextension", "folder", "file.txt/a.mp4", "same.mp4"])
def test_an_output_that_cannot_be_written_is_known_before_the_work(name, video, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("kept")
    (tmp_path / "same.mp4").write_bytes(video.read_bytes())
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(EvatokEncoderModel, "encode", lambda *_: pytest.fail("the work has begun"))
    refused(run("reconstruct", tmp_path / "same.mp4", tmp_path / name, "--model", checkpoint))
    if name not in ("a.docx", "noextension"):
        refused(run("encode", tmp_path / "same.mp4", tmp_path / name, "--model", checkpoint))
        refused(run("reconstruct", video, "--picture", tmp_path / name, "--model", checkpoint))
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "same.mp4").read_bytes() == video.read_bytes()


@pytest.mark.parametrize("name", ["loop", "n" * 300])
def test_a_name_that_the_system_refuses_is_told_in_words(name, video, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    message = refused(run("encode", video, tmp_path / name))
    assert str(tmp_path / name) in message and "Errno" not in message and "check its name" in message
    assert os.listdir(tmp_path) == ["loop"]


@pytest.mark.parametrize("kind", ["missing", "empty", "noise", "cut", "video", "weights", "ids", "other", "frames"])
def test_bad_tokens_are_one_line(kind, video, tokens, checkpoint, other_checkpoint, tmp_path):
    bad, good = tmp_path / "bad.safetensors", VideoTokens.load(tokens)
    if kind in ("empty", "noise", "cut"):
        bad.write_bytes({"empty": b"", "noise": bytes(range(256)), "cut": tokens.read_bytes()[:-40]}[kind])
    elif kind == "video":
        bad.write_bytes(video.read_bytes())
    elif kind == "weights":
        bad.write_bytes((checkpoint / "tokenizer" / "model.safetensors").read_bytes())
    elif kind == "ids":
        replace(good, ids=good.ids + 60).save(bad)
    elif kind == "other":
        VideoTokenizer.from_pretrained(other_checkpoint).encode(video, 8).save(bad)
    elif kind == "frames":
        replace(good, num_frames=500).save(bad)
    before = sorted(os.listdir(tmp_path))
    refused(run("decode", bad, tmp_path / "o.mp4", "--model", checkpoint))
    if kind not in ("ids", "other", "frames"):
        refused(run("info", bad))
    assert sorted(os.listdir(tmp_path)) == before


def test_tokens_without_a_rate_need_one(tokens, checkpoint, tmp_path):
    replace(VideoTokens.load(tokens), fps=None).save(tokens)
    assert "--fps" in refused(run("decode", tokens, tmp_path / "o.mp4", "--model", checkpoint))
    assert run_json("decode", tokens, tmp_path / "o.mp4", "--fps", 10, "--model", checkpoint)["fps"] == 10


def test_missing_arguments_and_commands():
    assert "VIDEO" in refused(run("encode"), 2)
    assert "encode" in refused(run("encod"), 2)


def _fail_at_the_second_clip(monkeypatch, error):
    real, calls = EvatokEncoderModel.encode, []

    def encode(self, *arguments, **more):
        calls.append(1)
        if len(calls) > 1:
            raise error
        return real(self, *arguments, **more)

    monkeypatch.setattr(EvatokEncoderModel, "encode", encode)


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_an_interrupt_leaves_nothing_behind(command, video, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "o.mp4"
    out.write_bytes(b"the earlier one")
    _fail_at_the_second_clip(monkeypatch, KeyboardInterrupt())
    assert run(command, video, out, "--model", checkpoint).exit_code == 130
    assert os.listdir(tmp_path) == ["o.mp4"] and out.read_bytes() == b"the earlier one"


def test_an_unexpected_failure_is_named_and_shown_on_request(video, checkpoint, tmp_path, monkeypatch):
    _fail_at_the_second_clip(monkeypatch, RuntimeError("the machine\nis on fire"))
    result = run("reconstruct", video, tmp_path / "o.mp4", "--model", checkpoint)
    assert result.exit_code == 1 and "RuntimeError: the machine is on fire" in result.stderr
    assert result.stderr.count("\n") == 1 and "--debug" in result.stderr and os.listdir(tmp_path) == []
    for arguments, environment in ((["--debug"], {}), ([], {"EVATOK_DEBUG": "1"})):
        result = run(*arguments, "reconstruct", video, "--model", checkpoint, env=environment)
        assert result.exit_code == 1 and "Traceback" in result.stderr and "Error: unexpected" in result.stderr


# --- pipes ----------------------------------------------------------------------------------------------------------


def test_videos_and_tokens_go_through_pipes(video, checkpoint, tmp_path, capfdbinary):
    model = ("--model", checkpoint)
    result = run("encode", "-", "-", *model, input=video.read_bytes())
    tokens = capfdbinary.readouterr().out
    assert result.exit_code == 0 and result.stdout == "" and "fingerprint" in result.stderr, result.output
    result = run("info", "-", "--json", input=tokens)
    assert json.loads(result.stdout)["frames"] == 21
    result = run("decode", "-", "-", *model, input=tokens)
    (tmp_path / "decoded.mp4").write_bytes(capfdbinary.readouterr().out)
    assert result.exit_code == 0 and result.stdout == "" and "frames" in result.stderr, result.output
    run("reconstruct", video, tmp_path / "direct.mp4", *model)
    assert np.array_equal(read_video(tmp_path / "decoded.mp4")[0], read_video(tmp_path / "direct.mp4")[0])
    result = run("info", "-", "--json", input=(tmp_path / "decoded.mp4").read_bytes())
    assert json.loads(result.stdout) | {"reader": ""} == {
        "kind": "video", "video": "-", "frames": 21, "fps": 25.0, "height": 64, "width": 64, "seconds": 0.84,
        "reader": "",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_a_report_and_an_output_do_not_mix(name, video, checkpoint, tokens):
    for command in (["encode", video, name], ["decode", tokens, name], ["reconstruct", video, name]):
        message = refused(run(*command, "--model", checkpoint, "--json"), code=2)
        assert "both go to standard output" in message


def test_an_empty_pipe_is_named(checkpoint, tmp_path):
    for command in (["encode", "-", tmp_path / "t"], ["decode", "-", tmp_path / "o.mp4"], ["info", "-"]):
        refused(run(*command, *(["--model", checkpoint] if len(command) > 2 else []), input=b""))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [["--help"], ["info", "{video}"], ["info", "{video}", "--json"]])
def test_a_reader_that_goes_away_is_no_error(arguments, video):
    source = str(Path(evatok_hf.__file__).parents[1])
    command = [sys.executable, "-c", "from evatok_hf.cli import main; main()"]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*command, *(argument.format(video=video) for argument in arguments)],
        stdout=writer, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": source},
    )  # fmt: skip
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")
