"""The demo without a browser: limits, the process that reads uploads, jobs, the Space's files, the command."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from test_cli import refused, run
from video_samples import encode, moving_frames

import evatok_hf
from evatok_hf import VideoTokenizer, VideoTokens, default_checkpoint
from evatok_hf.demo import jobs, results
from evatok_hf.demo.limits import Limits, UploadError
from evatok_hf.demo.uploads import UploadedVideo
from evatok_hf.video.read import VideoHeader, open_video, probe_video

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "spaces" / "evatok"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """40 frames of 64 x 48 at 25 fps."""
    return encode(tmp_path_factory.mktemp("video") / "a clip.mp4", moving_frames(40), options={"crf": "10"})


@pytest.fixture(scope="module")
def models():
    """What the demo works with where no checkpoint is named."""
    return jobs.load(None, "cpu")


def unheard(done: float, what: str) -> None:
    """A progress that nobody looks at."""


# --- limits and uploads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (VideoHeader(25, 0, 48, 64), "no frames"),
        (VideoHeader(25, 1000, 48, 64), "40.0 seconds long, at most 12"),
        (VideoHeader(100, 400, 48, 64), "400 frames, at most 300"),
        (VideoHeader(25, 10, 2160, 3840), "3840 x 2160, at most 1920"),
        (VideoHeader(25, 10, 0, 64), "no size"),
        (VideoHeader(30, 300, 1080, 1920), "622 megapixels, at most 200"),
        (VideoHeader(90000, 10, 48, 64), "9e+04 frames a second"),
    ],
)
def test_a_header_beyond_the_limits_is_refused_with_a_mend(header, words):
    with pytest.raises(UploadError, match=re.escape(words)) as caught:
        Limits().check_header(header)
    assert ": " in str(caught.value) and "\n" not in str(caught.value)
    Limits().check_header(VideoHeader(25, 300, 48, 64))  # exactly 12 seconds


def test_a_probe_decodes_nothing_and_tells_what_opening_tells(sample_clip):
    with open_video(sample_clip) as opened:
        assert probe_video(sample_clip) == (opened.fps, opened.num_frames, opened.height, opened.width)


def test_an_upload_reads_like_the_file_itself(video):
    tokenizer = VideoTokenizer.from_pretrained()
    with UploadedVideo(video, Limits()) as upload:
        prepared = tokenizer.prepare(upload)
        assert (upload.fps, upload.num_frames, upload.height, upload.width) == (25, 40, 48, 64)
    expected = list(tokenizer.clips(video))
    assert [clip.num_frames for clip in prepared.clips] == [16, 16, 8]
    for ours, theirs in zip(prepared.clips, expected, strict=True):
        assert torch.equal(ours.pixel_values_videos, theirs.pixel_values_videos)
    ours, theirs = tokenizer.encode(prepared), tokenizer.encode(video)
    assert torch.equal(ours.ids, theirs.ids) and ours.fps == theirs.fps and ours.num_frames == theirs.num_frames
    with pytest.raises(ValueError, match="prepared at 25 fps"):
        tokenizer.encode(prepared, fps=10)
    with UploadedVideo(video, Limits()) as upload:
        slower = tokenizer.prepare(upload, fps=12.5)
    assert slower.num_frames == 20 and tokenizer.encode(slower).fps == 12.5


def test_a_reader_that_is_stuck_is_given_up(video, monkeypatch, tmp_path):
    stuck = tmp_path / "stuck"
    stuck.write_text("#!/bin/sh\nexec sleep 60\n")
    stuck.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(stuck))
    with pytest.raises(UploadError, match=r"^a clip.mp4: reading it took longer than 0.5 seconds: "):
        UploadedVideo(video, replace(Limits(), patience=0.5))
    assert not [child for child in psutil.Process().children() if child.cmdline()[:1] == ["sleep"]]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_a_file_that_needs_too_much_memory_ends_its_reader_alone(tmp_path):
    frames = np.zeros((30, 1080, 1920, 3), dtype=np.uint8)
    large = encode(tmp_path / "large.mp4", frames, options={"preset": "ultrafast"})
    with pytest.raises(UploadError, match=r"^large.mp4: [^/]+: "):
        UploadedVideo(large, replace(Limits(), memory=160 << 20))
    with UploadedVideo(large, Limits()) as upload:
        assert sum(len(chunk) for chunk in upload.iter_chunks(8)) == 30


def test_a_reader_knows_no_secrets_and_leaves_nothing(video, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with UploadedVideo(video, Limits()):
        (reader,) = [p for p in psutil.Process().children() if "evatok_hf.demo.reader_process" in p.cmdline()]
        assert "HF_TOKEN" not in reader.environ() and reader.cwd().startswith(str(tmp_path))
    assert not reader.is_running() and list(tmp_path.iterdir()) == []


def test_a_video_is_read_through_only_as_far_as_it_goes(video, tmp_path):
    """A header that says less than there is."""
    with UploadedVideo(video, replace(Limits(), frames=40)) as upload:
        assert sum(len(chunk) for chunk in upload.iter_chunks(16)) == 40
    with pytest.raises(UploadError, match="more than 39 frames, though"):
        replace(Limits(), frames=39).check_count(40)


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_reconstruct_measures_what_the_tokenizer_does(models, video, tmp_path):
    with UploadedVideo(video, Limits()) as upload:
        prepared = jobs.tokenizer().prepare(upload)
    heard = []
    done = jobs.reconstruct(prepared, 1.2, None, True, progress=lambda share, what: heard.append((share, what)))
    expected = list(jobs.tokenizer().reconstruct(video, quality=1.2))
    fixed = 3 * 4 * jobs.tokenizer().model.config.block_lengths[3]
    assert done.adaptive.tokens == sum(sum(clip.lengths) for clip in expected)
    assert done.adaptive.psnr == pytest.approx(sum(clip.psnr for clip in expected) / 3)
    assert done.fixed_tokens == done.fixed.tokens == fixed and done.saved == 1 - done.adaptive.tokens / fixed
    assert [share for share, _ in heard] == pytest.approx([k / 6 for k in range(1, 7)])
    summary, *_, numbers = results.reconstruction(tmp_path, done, "<script>.mp4", {"quality": 1.2})
    assert numbers["tokens"] == done.adaptive.tokens and numbers["fixed_length"]["psnr"] == done.fixed.psnr
    assert "&lt;script&gt;.mp4" in summary and "<script>" not in summary
    assert "not measured" not in summary


def test_the_default_checkpoint_reconstructs_and_a_named_one_does_all(models):
    assert jobs.tokenizer().name == Path(default_checkpoint()).name
    assert jobs.pipeline().name == Path(default_checkpoint("generator")).name
    try:
        pipe = jobs.load("evatok-tiny", "cpu")
        assert jobs.tokenizer().model is pipe.tokenizer and pipe.name == "evatok-tiny"
    finally:
        jobs.load(None, "cpu")


def test_a_prediction_is_compared_with_the_truth_only_where_there_is_one(models):
    frames = moving_frames(20, 64, 64)
    done = jobs.predict(frames, False, 3, None, 0, 1.0, 0.0, progress=unheard)
    assert done.known == 5 and len(done.frames) == 8 and len(done.psnr) == len(done.copied) == 3
    end = jobs.predict(frames, True, 3, None, 0, 1.0, 0.0, progress=unheard)
    assert end.truth is None and end.psnr == [] and np.array_equal(end.frames[:5], frames[-5:])
    held = jobs.predict(frames, False, 3, None, 0, 1.0, 0.0, 1.0, progress=unheard)
    moved = [abs(made.frames[5:].astype(int) - made.frames[4]).mean() for made in (held, done)]
    assert moved[0] < moved[1] and held.copied == done.copied
    short = jobs.predict(frames[:2], False, 3, None, 0, 1.0, 0.0, progress=unheard)
    assert short.known == 2 and short.truth is None and len(short.frames) == 5


def test_generation_tells_how_far_it_is(models):
    heard = []
    samples = jobs.generate("basic", 1, 0, 1.25, 1.0, progress=lambda share, what: heard.append(share))
    assert heard == sorted(heard) and heard[-1] == 1 and len(heard) > 30
    expected = models("basic", 1, generator=torch.Generator().manual_seed(0))
    assert samples[0].lengths == expected.tokens.lengths[0].tolist()
    assert np.array_equal(samples[0].frames, (expected.frames[0] * 255).round().astype(np.uint8))


def test_on_zerogpu_the_jobs_run_on_the_lent_gpu(tmp_path):
    (tmp_path / "spaces.py").write_text(
        "names = []\ndef GPU(duration):\n    def lend(function):\n        names.append(function.__name__)\n"
        "        return function\n    return lend\n"
    )
    code = "import spaces; from evatok_hf.demo import jobs; print(spaces.names)"
    done = subprocess.run([sys.executable, "-c", code], env=_environment(tmp_path), capture_output=True, text=True)
    assert done.stdout.strip() == "['reconstruct', 'generate', 'predict']", done.stderr


# --- the Space and the command ----------------------------------------------------------------------------------------


def test_the_space_installs_the_pinned_versions():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    lines = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    required = dict(line.split("==") for line in lines)
    assert required.pop("evatok_hf") == evatok_hf.__version__
    assert {name: pins[name] for name in required} == required
    spec = importlib.util.spec_from_file_location("setup_names", ROOT / "setup.py")
    text = Path(spec.origin).read_text()
    needed = re.findall(r'"([a-z][a-z0-9-]+)>=', text[text.index("INSTALL") : text.index("PERCEPTUAL")])
    assert set(needed) <= set(required), "every dependency of the package is pinned"


def test_the_card_of_the_space_says_what_the_hub_asks():
    _, front, text = (SPACE / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    pins = (ROOT / "constraints.txt").read_text()
    assert card["sdk"] == "gradio" and f"gradio=={card['sdk_version']}\n" in pins
    assert card["app_file"] == "app.py" and (SPACE / "app.py").is_file() and card["license"] == "apache-2.0"
    assert "arxiv:2603.12267" in card["tags"] and len(card["short_description"]) <= 60
    assert {"title", "emoji", "colorFrom", "colorTo", "python_version", "suggested_hardware", "models"} <= set(card)
    assert "hf upload USER/evatok spaces/evatok --repo-type space" in text and "EVATOK_MODEL" in text


def test_the_space_starts_the_app_with_the_model_that_was_named(tmp_path):
    code = (
        "import sys, evatok_hf.demo as demo; demo.launch = lambda model: print('model', model);"
        f"import runpy; runpy.run_path({str(SPACE / 'app.py')!r}, run_name='__main__')"
    )
    for name, expected in (("someone/evatok", "model someone/evatok"), ("", "model None")):
        environment = _environment(tmp_path) | {"EVATOK_MODEL": name}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest))
    assert 'pip install "evatok_hf[demo]"' in refused(run("demo"))


def test_an_address_that_is_taken_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-c", "from evatok_hf.cli import main; main()", "demo", "--port", port]
        environment = _environment(tmp_path) | {"TMPDIR": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "choose another --host or --port" in done.stderr and done.stdout == ""
    assert not list(tmp_path.glob("evatok_demo_*"))
    assert "--port" in refused(run("demo", "--port", "70000"), code=2)


def test_tokens_of_a_job_are_a_file_that_decodes(models, video, tmp_path):
    tokenizer = jobs.tokenizer()
    budget = 3 * 4 * tokenizer.model.config.block_lengths[0] + 54  # a little more than three clips need
    with UploadedVideo(video, Limits()) as upload:
        done = jobs.reconstruct(tokenizer.prepare(upload), None, budget, False, progress=unheard)
    done.tokens.save(tmp_path / "t.safetensors")
    loaded = VideoTokens.load(tmp_path / "t.safetensors")
    assert loaded.ids.numel() <= budget
    assert sum(len(frames) for frames in tokenizer.decode(loaded)) == 40


def _environment(*folders: Path) -> dict[str, str]:
    source = Path(evatok_hf.__file__).parent.parent
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*folders, source])), "HF_HUB_OFFLINE": "1"}
