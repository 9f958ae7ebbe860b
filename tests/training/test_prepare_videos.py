"""training/prepare_videos.py: small copies with the same frames, made once, and broken files named."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from video_samples import encode, make_audio_only, moving_frames

from evatok_hf.video.read import read_video

SCRIPT = Path(__file__).parents[2] / "training" / "prepare_videos.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_videos", SCRIPT)
    module = sys.modules["prepare_videos"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "source"
    (source / "cat").mkdir(parents=True)
    encode(source / "cat" / "a.mp4", moving_frames(20, 96, 150), fps=30000 / 1001)
    encode(source / "b.avi", moving_frames(13, 100, 64), codec="mpeg4", fps=15)
    encode(source / "small.webm", moving_frames(6, 30, 40), codec="libvpx-vp9")
    return source


def run(script, source: Path, target: Path, *more: str) -> int:
    return script.main(["--source", str(source), "--target", str(target), "--short_side", "48", *more])


def tree(target: Path) -> dict[str, int]:
    return {p.relative_to(target).as_posix(): p.stat().st_mtime_ns for p in target.rglob("*") if p.is_file()}


def test_copies_are_small_and_frame_for_frame_the_same(script, folder, tmp_path):
    target = tmp_path / "target"
    assert run(script, folder, target, "--gop", "5") == 0
    assert set(tree(target)) == {"cat/a.mp4", "b.avi.mp4", "small.webm.mp4", "prepared.json"}
    sizes = {"cat/a.mp4": (48, 74), "b.avi.mp4": (74, 48), "small.webm.mp4": (30, 40)}  # never upscaled
    for name, size in sizes.items():
        original, rate = read_video(folder / name.removesuffix(".mp4") if name != "cat/a.mp4" else folder / name)
        copy, copy_rate = read_video(target / name)
        assert copy.shape[1:3] == size and len(copy) == len(original)
        assert copy_rate == pytest.approx(rate, rel=1e-3)
        # Colours and the order of frames survive: `moving_frames` gives each frame its own blue.
        difference = copy.mean((1, 2)).astype(float) - original.mean((1, 2))
        assert np.abs(difference).max() < 4
    with av.open(str(target / "cat" / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        packets = [packet for packet in container.demux(stream) if packet.size]
        keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
        assert len(packets) == 20 and max(np.diff([*keys, 20])) <= 5  # more of them where the scene changes


def test_all_intra(script, folder, tmp_path):
    assert run(script, folder / "cat", tmp_path / "t", "--gop", "1") == 0
    with av.open(str(tmp_path / "t" / "a.mp4")) as container:
        assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)


def test_only_the_first_frames(script, folder, tmp_path):
    assert run(script, folder, tmp_path / "t", "--max_frames", "10") == 0
    counts = {name: len(read_video(tmp_path / "t" / name)[0]) for name in ("cat/a.mp4", "b.avi.mp4", "small.webm.mp4")}
    assert counts == {"cat/a.mp4": 10, "b.avi.mp4": 10, "small.webm.mp4": 6}
    original, copy = read_video(folder / "cat" / "a.mp4")[0], read_video(tmp_path / "t" / "cat" / "a.mp4")[0]
    assert np.abs(copy.mean((1, 2)).astype(float) - original[:10].mean((1, 2))).max() < 4


def test_a_rotation_is_carried_out(script, tmp_path):
    (tmp_path / "s").mkdir()
    encode(tmp_path / "s" / "turned.mp4", moving_frames(6, 64, 96), rotation=90)
    assert run(script, tmp_path / "s", tmp_path / "t") == 0
    original, _ = read_video(tmp_path / "s" / "turned.mp4")
    copy, _ = read_video(tmp_path / "t" / "turned.mp4")
    assert original.shape[1:3] == (96, 64) and copy.shape[1:3] == (72, 48)
    difference = copy[:, ::24, ::16].astype(float) - original[:, ::32, ::21][:, :3, :3]
    assert np.abs(difference).mean() < 12  # the gradients lie as they did


def test_a_second_run_goes_on_where_the_first_ended(script, folder, tmp_path, capsys):
    target = tmp_path / "target"
    run(script, folder, target)
    first = tree(target)
    (target / "cat" / "a.mp4").unlink()
    os.utime(folder / "b.avi", ns=(2**61, 2**61))  # an original that changed since
    assert run(script, folder, target) == 0
    second = tree(target)
    assert "2 prepared, 1 there already, 0 broken" in capsys.readouterr().out
    assert set(second) == set(first)
    assert second["small.webm.mp4"] == first["small.webm.mp4"] and second["b.avi.mp4"] != first["b.avi.mp4"]


def test_other_settings_need_another_folder(script, folder, tmp_path, capsys):
    target = tmp_path / "target"
    run(script, folder, target)
    before = tree(target)
    assert run(script, folder, target, "--crf", "30") == 2
    assert "choose another target" in capsys.readouterr().err and tree(target) == before
    assert json.loads((target / "prepared.json").read_text())["crf"] == 18


def test_broken_files_are_named_and_leave_nothing(script, folder, tmp_path, capsys):
    (folder / "broken.mp4").write_bytes(b"no video at all")
    data = (folder / "cat" / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    make_audio_only(folder / "sound.mp4")
    assert run(script, folder, tmp_path / "target") == 0
    out, err = capsys.readouterr()
    assert "3 prepared, 0 there already, 3 broken" in out
    assert all(f"broken: {name}" in err for name in ("broken.mp4", "cut.mp4", "sound.mp4"))
    assert len(tree(tmp_path / "target")) == 4


def test_failure_when_nothing_can_be_read(script, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.mp4").write_bytes(b"no video at all")
    assert run(script, tmp_path / "s", tmp_path / "t") == 1


def test_wrong_arguments(script, folder, tmp_path, capsys):
    assert run(script, tmp_path / "absent", tmp_path / "t") == 2
    assert run(script, folder, folder / "inside") == 2
    (tmp_path / "empty").mkdir()
    assert run(script, tmp_path / "empty", tmp_path / "t") == 2
    assert script.main(["--source", str(folder), "--target", str(tmp_path / "t"), "--short_side", "47"]) == 2
    err = capsys.readouterr().err
    for words in ("is not a folder", "lies inside the source", "No video in", "even number"):
        assert words in err
    (folder / "b.avi.mp4").write_bytes(b"")
    assert run(script, folder, tmp_path / "t") == 2
    assert "rename one of them" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
