"""Outputs are there whole or not at all, wherever they go: files, folders, links, pipes and devices."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
import tty
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from video_samples import moving_frames

from evatok_hf import VideoTokens
from evatok_hf.models.files_evatok import (
    Replacement,
    adding_to,
    prepare,
    readable,
    remove_left_over,
    replacing_folder,
    scratch_in,
    write_text,
)
from evatok_hf.pictures.clips import save_picture
from evatok_hf.video import read_video
from evatok_hf.video.read import write_video
from evatok_hf.video.source_files import list_files

TOKENS = VideoTokens(torch.arange(8), torch.tensor([[8]]), fps=25.0, num_frames=4)


def folder_of_text(path: Path) -> None:
    with replacing_folder(path) as folder:
        (folder / "a.txt").write_text("a")
        (folder / "a.txt").chmod(0o600)  # as some libraries make theirs


def added_text(path: Path) -> None:
    with adding_to(path.parent) as folder:
        (folder / path.name).write_text("a")


WRITERS = {
    "text.txt": lambda path: write_text(path, "text"),
    "added.txt": added_text,
    "tokens.safetensors": TOKENS.save,
    "picture.png": lambda path: save_picture(Image.new("RGB", (4, 4)), path),
    "video.mp4": lambda path: write_video(path, moving_frames(2), 25),
}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def narrow():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("name", WRITERS)
def test_new_files_obey_the_umask_and_old_ones_keep_mode_owner_and_links(name, tmp_path, narrow):
    path, link, real = tmp_path / name, tmp_path / f"link-{name}", tmp_path / "elsewhere" / "real"
    WRITERS[name](path)
    assert mode(path) == 0o640
    real.parent.mkdir()
    real.write_text("earlier")
    real.chmod(0o604)
    owner = (1234, 4321) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(real, *owner)
    link.symlink_to(Path("elsewhere", "real"))
    WRITERS[name](link)
    assert link.is_symlink() and real.stat().st_size == path.stat().st_size
    assert mode(real) == 0o604 and (real.stat().st_uid, real.stat().st_gid) == owner
    assert sorted(os.listdir(tmp_path)) == sorted(["elsewhere", link.name, name])
    assert os.listdir(real.parent) == ["real"]


def test_folders_are_replaced_as_a_whole_and_keep_mode_and_links(tmp_path, narrow):
    real, link = tmp_path / "real", tmp_path / "link"
    folder_of_text(real)
    assert mode(real) == 0o750 and mode(real / "a.txt") == 0o640
    (real / "b.txt").write_text("b")
    real.chmod(0o701)
    link.symlink_to("real")
    folder_of_text(link)
    assert link.is_symlink() and os.listdir(real) == ["a.txt"] and mode(real) == 0o701
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_link_to_nothing_makes_what_it_names_and_a_circle_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("new")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new").read_text() == "text"
    (tmp_path / "round").symlink_to("about")
    (tmp_path / "about").symlink_to("round")
    with pytest.raises(ValueError, match="cannot write .*round"):
        write_text(tmp_path / "round", "text")


@pytest.mark.parametrize(
    "name", ["a[1]*?.txt", "x" * 250 + ".txt", "é" * 120, os.fsdecode(b"\xff.txt"), " .txt", "a\nb"]
)
def test_any_name_can_be_written_and_what_was_left_under_it_goes(name, tmp_path):
    with pytest.raises(RuntimeError), Replacement(tmp_path / name) as partial:
        staging = partial.parent
        raise RuntimeError
    staging.mkdir()
    (staging / "half").touch()
    write_text(tmp_path / name, "text")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "text"


def test_a_failure_leaves_what_was_there(tmp_path):
    path, folder = tmp_path / "file", tmp_path / "folder"
    path.write_text("earlier")
    folder_of_text(folder)
    for block in (Replacement(path), replacing_folder(folder), adding_to(folder), scratch_in(folder)):
        with pytest.raises(KeyError), block as partial:
            if partial.is_dir():
                (partial / "b.txt").write_text("half")
            else:
                partial.write_text("half")
            raise KeyError
    with (
        pytest.raises(ValueError, match=r"cannot write .*file \(No space left on device\)"),
        Replacement(path) as partial,
    ):
        raise OSError(28, os.strerror(28))
    assert path.read_text() == "earlier" and os.listdir(folder) == ["a.txt"]
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_what_cannot_be_written_is_refused_at_once(tmp_path):
    write_text(tmp_path / "file", "text")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder", tmp_path / "none" / "x"):
        with pytest.raises(ValueError, match="cannot write") as error:
            Replacement(path)
        assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="cannot write"):
        prepare(tmp_path / "file" / "x")
    with pytest.raises(ValueError, match="cannot write"):
        folder_of_text(tmp_path / "file")
    prepare(tmp_path / "deep" / "er" / "x")
    assert sorted(os.listdir(tmp_path)) == ["deep", "file", "folder"] and os.listdir(tmp_path / "deep" / "er") == []


@pytest.mark.parametrize("save", [torch.save, save_file, lambda made, path: path.write_bytes(made["a"].numpy())])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(save, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with (
            pytest.raises(ValueError, match="cannot write") as told,
            replacing_folder(tmp_path / "model") as new,
        ):
            save({"a": torch.zeros(1 << 18)}, new / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_a_folder_that_was_being_replaced_comes_back(tmp_path):
    """A process killed in between has moved the earlier folder away, and nothing to its place."""
    before = tmp_path / ".run.0123abcd.partial" / "before" / "run"
    before.mkdir(parents=True)
    (before / "weights").write_text("earlier")
    remove_left_over(tmp_path)
    assert os.listdir(tmp_path) == ["run"] and (tmp_path / "run" / "weights").read_text() == "earlier"


def test_what_is_being_written_is_nobodys_input(tmp_path):
    write_text(tmp_path / "a.mp4", "whole")
    with Replacement(tmp_path / "b.mp4") as partial:
        partial.write_text("half")
        assert list_files(tmp_path, [".mp4"]) == [tmp_path / "a.mp4"]


def test_where_there_are_no_locks_files_are_written_and_nothing_is_taken_for_left_over(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".a.txt.01234567.partial").mkdir()
    monkeypatch.setattr("fcntl.flock", no_locks)
    write_text(tmp_path / "a.txt", "text")
    assert sorted(os.listdir(tmp_path)) == [".a.txt.01234567.partial", "a.txt"]
    monkeypatch.undo()
    write_text(tmp_path / "a.txt", "text")
    assert os.listdir(tmp_path) == ["a.txt"]


def read_from(fifo: Path) -> tuple[threading.Thread, list[bytes]]:
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    thread.start()
    return thread, got


@pytest.mark.parametrize("name", ["video.mkv", "tokens.safetensors", "video"])
def test_a_named_pipe_is_written_to_and_read_from(name, tmp_path):
    fifo, copy = tmp_path / name, tmp_path / f"copy-{name}"
    os.mkfifo(fifo)
    thread, got = read_from(fifo)
    TOKENS.save(fifo) if "tokens" in name else write_video(fifo, moving_frames(3), 25)
    thread.join()
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    copy.write_bytes(got[0])
    thread = threading.Thread(target=lambda: fifo.write_bytes(got[0]))
    thread.start()
    if "tokens" in name:
        assert torch.equal(VideoTokens.load(fifo).ids, TOKENS.ids)
    else:
        assert np.array_equal(read_video(fifo)[0], read_video(copy)[0])
    thread.join()
    assert sorted(os.listdir(tmp_path)) == sorted([name, copy.name])


def test_a_device_is_written_through(tmp_path):
    master, slave = os.openpty()
    tty.setraw(slave)
    link = tmp_path / "terminal"
    link.symlink_to(os.ttyname(slave))
    write_text(link, "text")
    assert os.read(master, 100) == b"text"
    assert link.is_symlink() and stat.S_ISCHR(link.stat().st_mode)
    os.close(master)
    os.close(slave)
    write_text(os.devnull, "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1"])
def test_standard_output_goes_on_where_it_is(name, tmp_path):
    code = "import sys; from evatok_hf.models.files_evatok import write_text; print('a'); write_text(sys.argv[1], 'b')"
    with (tmp_path / "out").open("a") as out:
        out.write("before ")
        out.flush()
        subprocess.run([sys.executable, "-c", code, name], stdout=out, check=True)
        inode = os.fstat(out.fileno()).st_ino
    assert (tmp_path / "out").read_text() == "before a\nb" and (tmp_path / "out").stat().st_ino == inode
    assert os.listdir(tmp_path) == ["out"]


def test_a_regular_file_is_read_where_it_is(tmp_path):
    with readable(tmp_path / "file") as path:
        assert path == str(tmp_path / "file")
