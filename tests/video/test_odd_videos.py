"""Every way to read gives the pictures that a viewer sees, of ordinary videos and of those that readers get wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_videos import (
    MATRICES,
    ODD,
    ORDINARY,
    SIDE,
    Odd,
    coded,
    make_matrix,
    make_resized,
    number,
    numbered,
    numbers,
    remux,
)
from tokenizer_samples import make_tokenizer, processor
from video_samples import encode

from evatok_hf import VideoTokenizer
from evatok_hf.bulk.workers import Views, WholeVideos
from evatok_hf.data.clip_sources import Example
from evatok_hf.data.streaming import ClipConfig, ClipStream
from evatok_hf.video import open_video
from evatok_hf.video.read import VideoReadError, probe_video, read_video

ROOT = Path(__file__).parents[2]
READERS = ["auto", "decord", "pyav"]
READ = [odd for odd in ORDINARY + ODD if not isinstance(odd.shown, str)]
REFUSED = [odd for odd in ORDINARY + ODD if isinstance(odd.shown, str)]


def named(odds: list[Odd]) -> list:
    return [pytest.param(odd, id=odd.name) for odd in odds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


def made(folder: Path, odd: Odd) -> Path:
    path = folder / odd.name
    if not path.exists():
        odd.make(path)
    return path


@pytest.mark.parametrize("odd", named(READ))
def test_every_reader_gives_what_a_viewer_sees(folder: Path, odd: Odd) -> None:
    path = made(folder, odd)
    order = [len(odd.shown) - 1, 0, *range(len(odd.shown) - 2, 0, -7), 3, 3]
    for reader in READERS:
        if reader == "decord" and not odd.decord:
            with pytest.raises(VideoReadError, match="decord cannot read it"):
                open_video(path, reader)
            continue
        with open_video(path.read_bytes() if reader == "pyav" else path, reader) as video:
            assert video.num_frames == len(odd.shown)
            assert video.fps == pytest.approx(odd.fps, rel=0.005)
            assert numbers(video.read(order)) == [odd.shown[i] for i in order]
            assert numbers(np.concatenate(list(video.iter_chunks(7)))) == odd.shown
            assert numbers(np.concatenate(list(video.iter_chunks(16, fps=10)))) == odd.at(10)
            for fps in (10, 40):
                assert [odd.shown[i] for i in islice(video.sampled(fps), len(odd.at(fps)))] == odd.at(fps)
                assert video.count_sampled(fps) == len(odd.at(fps))
                assert video.count_sampled(fps, stride=3) == -(-len(odd.at(fps)) // 3)


@pytest.mark.parametrize("odd", named(REFUSED))
def test_what_is_no_video_is_refused(folder: Path, odd: Odd) -> None:
    path = made(folder, odd)
    for reader in READERS:
        with pytest.raises(VideoReadError, match=odd.shown):
            open_video(path, reader)


@pytest.mark.parametrize("odd", named([odd for odd in READ if odd in ODD]))
def test_the_tokenizer_training_and_bulk_read_the_same(folder: Path, tokenizer: VideoTokenizer, odd: Odd) -> None:
    path = made(folder, odd)
    frames = read_video(path, "pyav")[0]
    expected = processor()(frames, num_frames=None, return_tensors="pt").pixel_values_videos[0]
    assert tokenizer.encode(path, 8).num_frames == len(odd.shown)
    clips = list(tokenizer.clips(path))
    for clip in clips:
        shown = clip.pixel_values_videos[0, : clip.num_frames]
        assert torch.equal(shown, expected[clip.start : clip.start + clip.num_frames])
    assert tokenizer.encode(path, 8, fps=10).num_frames == len(odd.at(10))

    alone = folder / f"alone_{odd.name}"
    alone.mkdir()
    (alone / "it.mkv").symlink_to(path)  # what it is, its content says
    config = ClipConfig(8, SIDE, clips_per_video=len(odd.shown) // 8, random_start=False)
    stream = ClipStream(alone, config=config, repeat=False, training=False)
    cut = list(stream)
    cut += Views(config, training=False, seed=0).cut(Example("it", str(path), -1))
    assert len(cut) == 2 * (len(odd.shown) // 8) and not stream.skipped
    assert len(cut) == 2 or cut[-1]["frames"][-1] == len(odd.shown) - 1
    for item in cut:
        images = item["pixel_values_videos"].permute(0, 2, 3, 1).numpy()
        assert numbers(images) == [odd.shown[i] for i in item["frames"]]

    whole = list(WholeVideos(processor(), 16, 1).cut(Example("it", str(path), -1)))
    assert len(whole) == len(clips)
    assert torch.equal(whole[-1]["pixel_values_videos"], clips[-1].pixel_values_videos[0])


def test_bulk_says_which_frames_a_rate_shows(folder: Path) -> None:
    odd = next(odd for odd in ODD if odd.name == "varying.mp4")
    slow = processor()
    slow.fps = 10
    whole = list(WholeVideos(slow, 16, 2).cut(Example("it", str(made(folder, odd)), -1)))
    shown = [index for item in whole for index in item["frames"]]
    assert shown[: len(odd.at(10)[::2])] == odd.at(10)[::2]


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return VideoTokenizer(make_tokenizer(), processor())


@pytest.mark.parametrize("name", MATRICES)
def test_pictures_are_turned_and_mirrored_as_ffmpeg_shows_them(tmp_path: Path, name: str) -> None:
    matrix, shown = MATRICES[name]
    path = tmp_path / "it.mp4"
    make_matrix(path, 1, 0, 0, 1)
    plain = read_video(path)[0][0]
    make_matrix(path, *matrix)
    expected = shown(plain)
    for reader in READERS:
        if reader == "decord" and "mirrored" in name:
            with pytest.raises(VideoReadError, match="decord cannot read it"):
                open_video(path, reader)
            continue
        with open_video(path, reader) as video:
            assert (video.height, video.width) == expected.shape[:2]
            np.testing.assert_array_equal(next(video.iter_chunks(1))[0], expected)
            np.testing.assert_array_equal(video.read([0])[0], expected)


def test_other_angles_are_refused(tmp_path: Path) -> None:
    make_matrix(tmp_path / "it.mp4", 0.7071, 0.7071, -0.7071, 0.7071)
    with pytest.raises(VideoReadError, match="turned by 45 degrees"):
        open_video(tmp_path / "it.mp4")


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.webm", "libvpx"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"), ("a.mp4", "libx264"), ("a.mkv", "libx265")],
)
def test_pictures_that_change_their_size_are_refused_by_every_reader(tmp_path: Path, name: str, codec: str) -> None:
    path = tmp_path / name
    make_resized(path, codec)
    with pytest.raises(VideoReadError, match="of one size"):
        open_video(path, "decord")
    for reader in ("auto", "pyav"):
        with open_video(path, reader) as video, pytest.raises(VideoReadError, match="change from 64x64 to 128x128"):
            assert numbers(video.read([0, 19])) == [0, 19]
            list(video.iter_chunks(8))


def test_times_that_jump_by_hours_are_refused_where_they_matter(tmp_path: Path) -> None:
    path = tmp_path / "jump.mkv"
    encode(path, numbered(60), times=[k if k <= 30 else k + 7200 * 25 for k in range(60)])
    with open_video(path) as video:
        assert numbers(np.concatenate(list(video.iter_chunks(16)))) == list(range(60))
        with pytest.raises(VideoReadError, match="jump by 7200 seconds"):
            video.iter_chunks(16, fps=10)


def test_a_probe_says_what_packets_tell(folder: Path) -> None:
    for name in ("recording.webm", "hidden.webm", "no_key.mkv", "cover_first.mp4", "trimmed.mp4"):
        odd = next(odd for odd in ODD if odd.name == name)
        header = probe_video(made(folder, odd))
        assert header.num_frames == len(odd.shown) and header.fps == pytest.approx(odd.fps, rel=0.005)
        assert (header.height, header.width) == (SIDE, SIDE)


def test_a_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "it.mkv"
    remux(coded(), path)
    for _ in range(2):  # the second time from memory
        with open_video(path) as video:
            assert (video.num_frames, number(video.read([0])[0])) == (60, 0)
    remux(coded(), path, lambda index, packet: index >= 7)
    with open_video(path) as video:
        assert (video.num_frames, number(video.read([0])[0])) == (40, 20)


def test_nothing_is_written_to_the_terminal(folder: Path) -> None:
    code = (
        "import sys\n"
        "from evatok_hf.video.read import VideoReadError, open_video\n"
        "for path in sys.argv[1:]:\n"
        "    for reader in ('auto', 'decord', 'pyav'):\n"
        "        try:\n"
        "            with open_video(path, reader) as video:\n"
        "                video.read([0, video.num_frames - 1])\n"
        "                list(video.iter_chunks(16))\n"
        "        except VideoReadError:\n"
        "            pass\n"
    )
    paths = [made(folder, odd) for odd in ORDINARY + ODD]
    damaged = folder / "damaged.mp4"
    data = bytearray(coded())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    damaged.write_bytes(data)
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths), str(damaged)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_documentation_has_the_tables(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("reading_table", ROOT / "tools" / "reading_table.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = tool.PAGE.read_text()
    assert tool.fill(page, tool.tables(tmp_path)) == page  # else run tools/reading_table.py
