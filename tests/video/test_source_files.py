"""Names and folders as they are: brackets, colons, links, bytes that are no UTF-8; each is what it is called."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner
from video_samples import encode, moving_frames

from evatok_hf.cli.commands import app
from evatok_hf.data.streaming import ClipConfig, ClipStream
from evatok_hf.video.read import open_video, probe_video, read_video, write_video
from evatok_hf.video.source_files import list_files, match_files, printable
from training.common.arguments import parse_sources
from training.prepare_videos import PrepareArguments, run

SMALL = ClipConfig(num_frames=4, image_size=16)
LATIN = os.fsdecode(b"caf\xe9")  # a name of Latin-1, as old archives have them
ODD = [
    "[UCF] videos (1080p)",
    "star*dir",
    "q?dir",
    "a::b",
    "x#y %20z",
    "c:d",
    "file:x",
    "-x",
    "100%d",
    'it\'s "q"',
    "日本 😀",
]


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return encode(tmp_path_factory.mktemp("video") / "v.mp4", moving_frames(8, 32, 64))


def put(video: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(video, path)
    return path


def put_tar(video: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        tar.add(video, f"{path.stem}.mp4")
    return path


def clips(source, training: bool = False, **options) -> list[tuple[str, int]]:
    stream = ClipStream(source, config=SMALL, repeat=False, training=training, **options)
    return sorted((item["source"], item["label"]) for item in stream)


@pytest.mark.parametrize("name", ODD)
def test_a_folder_or_a_file_may_have_any_name(tmp_path, monkeypatch, video, name):
    monkeypatch.chdir(tmp_path)
    put(video, Path(name) / f"{name}.mp4")
    for source in (name, tmp_path / name):
        assert clips(source) == [(f"{name}.mp4", -1)]
    put_tar(video, Path("tars") / name / f"{name}.tar")
    for source in (f"tars/{name}", f"tars/{name}/{name}.tar", f"tars/{name}/*.tar", f"{tmp_path}/tars/{name}/**/*.tar"):
        assert clips(source) == [(name, -1)]


def test_a_name_comes_before_a_pattern(tmp_path, video):
    for name in ("s[0].tar", "s0.tar", "s1.tar"):
        put_tar(video, tmp_path / name)
    assert clips(tmp_path / "s[0].tar") == [("s[0]", -1)]
    assert clips(str(tmp_path / "s[01].tar")) == [("s0", -1), ("s1", -1)]
    assert clips(str(tmp_path / "s?.tar")) == [("s0", -1), ("s1", -1)]
    with pytest.raises(ValueError, match="No file matches"):
        clips(tmp_path / "t[0].tar")
    put(video, tmp_path / "v.mp4")
    with pytest.raises(ValueError, match="single file"):
        clips(str(tmp_path / "v*"))


def test_a_source_with_an_equals_sign_is_no_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fps=8").mkdir()
    assert parse_sources(["fps=8", "fps=8=2", "tars=0.5"]) == [("fps=8", 1.0), ("fps=8", 2.0), ("tars", 0.5)]


@pytest.mark.parametrize(
    "name", ["2023-05-01T10:11:12.mp4", "file:x.mp4", "http:x.mp4", "C:x.mp4", "-x.mp4", "100%d.mp4"]
)
def test_relative_names_are_no_protocols(tmp_path, monkeypatch, video, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(video, name if name[0] != "-" else f"./{name}")
    for reader in ("auto", "pyav", "decord"):
        with open_video(name, reader) as opened:
            assert opened.num_frames == 8 and len(opened.read([0, 7])) == 2
    assert probe_video(name).num_frames == 8
    frames, _ = read_video(name)
    for path in (f"out {name}", f"to:{name}/{name}"):
        Path(path).parent.mkdir(exist_ok=True)
        write_video(path, frames, 25)
        assert probe_video(path).num_frames == 8


def test_links_are_followed_and_loops_are_seen(tmp_path, video, caplog):
    store = tmp_path / "store"
    put(video, store / "run" / "a.mp4")
    put(video, store / "jump" / "deep" / "b.mp4")
    put(video, store / "one.mp4")
    root = tmp_path / "videos"
    root.mkdir()
    for name in ("run", "jump", "one.mp4"):
        (root / name).symlink_to(store / name)
    (root / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    loops = {root / "self": root, root / "up": tmp_path, store / "run" / "again": store / "run"}
    loops |= {store / "run" / "to": store / "jump", store / "jump" / "to": store / "run", root / "x": root / "x"}
    for place, target in loops.items():
        place.symlink_to(target)
    expected = [("jump/deep/b.mp4", 0), ("one.mp4", -1), ("run/a.mp4", 1)]
    assert clips(root) == expected
    assert ClipStream(root, config=SMALL).sources[0].classes == ("jump", "run")
    split = tmp_path / "split"
    split.mkdir()
    (split / "train").symlink_to(root)
    assert clips(split) == expected
    (root / "sprint").symlink_to("run")  # another name of a class is another class
    assert clips(root) == [*expected[:2], ("run/a.mp4", 1), ("sprint/a.mp4", 2)]


def test_folders_that_all_link_to_each_other_are_read_once(tmp_path, video):
    for name in "abcdefghij":
        put(video, tmp_path / name / "v.mp4")
        for other in "abcdefghij":
            (tmp_path / name / f"to {other}").symlink_to(tmp_path / other)
    found = [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path, (".mp4",))]
    assert found == [f"{name}/v.mp4" for name in "abcdefghij"]


def test_a_pattern_goes_round_in_no_loop(tmp_path, video):
    put_tar(video, tmp_path / "a" / "b" / "x.tar")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "b" / "top").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "a" / "b")
    found = match_files(str(tmp_path / "**" / "*.tar"))
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/b/x.tar", "other/x.tar"]


def test_what_macos_puts_beside_a_video_is_none(tmp_path, video):
    put(video, tmp_path / "a.mp4")
    (tmp_path / "._a.mp4").write_bytes(b"\0\5\x16\7" * 30)
    stream = ClipStream(tmp_path, config=SMALL, repeat=False)
    assert [item["source"] for item in stream] == ["a.mp4"] and not stream.skipped


# --- names that are no UTF-8 ---


def test_printable_names():
    assert printable(LATIN) == "caf\\xe9" and printable("日本 é") == "日本 é" and printable("\ud83d") == "\\ud83d"
    assert printable(Path(LATIN) / "a") == "caf\\xe9/a"


@pytest.mark.parametrize("training", [False, True])
def test_names_that_are_no_utf8_are_used_and_named(tmp_path, video, caplog, training):
    put(video, tmp_path / LATIN / f"{LATIN}.mp4")
    put(video, tmp_path / "run" / "ok.mp4")
    (tmp_path / "run" / f"broken {LATIN}.mp4").write_bytes(b"no video")
    stream = ClipStream(tmp_path, config=SMALL, repeat=False, training=training)
    with caplog.at_level(logging.WARNING, logger="evatok_hf.data.streaming"):
        found = sorted((item["source"], item["label"]) for item in stream)
    assert found == [("caf\\xe9/caf\\xe9.mp4", 0), ("run/ok.mp4", 1)]
    assert stream.sources[0].classes == ("caf\\xe9", "run") and stream.skipped == {"unreadable": 1}
    (message,) = caplog.messages
    assert "run/broken caf\\xe9.mp4" in message
    message.encode()


def test_copies_of_videos_keep_such_names(tmp_path, video):
    source, target = tmp_path / LATIN, tmp_path / f"to {LATIN}"
    put(video, source / "10:11" / f"{LATIN}.mp4")
    (source / f"broken {LATIN}.mp4").write_bytes(b"no video")
    made, kept, broken = run(PrepareArguments(str(source), str(target), short_side=16))
    assert (made, kept, broken) == (1, 0, ["broken caf\\xe9.mp4"])
    assert probe_video(target / "10:11" / f"{LATIN}.mp4").num_frames == 8


def test_commands_print_such_names(tmp_path, video):
    path = str(put(video, tmp_path / f"{LATIN}.mp4"))
    done = CliRunner().invoke(app, ["info", path])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["info", path, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout), done.output
    Path(path).write_bytes(b"no video")
    done = CliRunner().invoke(app, ["info", path])
    assert done.exit_code == 1 and "caf\\xe9.mp4" in done.stderr and "unexpected" not in done.stderr
