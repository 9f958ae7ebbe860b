"""Reading and writing video files."""

from __future__ import annotations

import io
import logging
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from video_samples import FORMATS, encode, make_audio_only, make_video, moving_frames

from evatok_hf.video import read as video_io
from evatok_hf.video.read import (
    VideoReader,
    VideoReadError,
    VideoWriteError,
    VideoWriter,
    nearest_frame_indices,
    open_video,
    read_video,
    write_video,
)
from evatok_hf.video.write import frame_rate

READERS = ["auto", "decord", "pyav"]


def decode_plainly(path: Path) -> np.ndarray:
    """The reference: every frame through PyAV's simplest call."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


class OneWay(io.RawIOBase):
    """A file object that can only be read forwards, like a pipe or an upload."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self._stream.readinto(buffer)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {name: make_video(folder, name) for name in FORMATS}


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 noisy frames with a key frame every 12 and B-frames, index in front."""
    frames = moving_frames(90)
    noise = np.random.default_rng(0).integers(0, 40, frames.shape, dtype=np.uint8)
    return encode(
        tmp_path_factory.mktemp("long") / "long.mp4",
        frames // 2 + noise,
        options={"g": "12", "bf": "2"},
        container_options={"movflags": "faststart"},
    )


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("reader", READERS)
def test_every_format_gives_the_frames_that_are_in_it(clips: dict[str, Path], name: str, reader: str) -> None:
    if name in ("gif", "mpg") and reader == "decord":
        with pytest.raises(VideoReadError, match="decord cannot read it"):
            open_video(clips[name], reader)
        return
    expected = decode_plainly(clips[name])
    with open_video(clips[name], reader) as video:
        assert (video.num_frames, video.height, video.width) == (24, 48, 64)
        assert video.fps == pytest.approx(25)
        assert video.backend == ("pyav" if reader == "pyav" or name in ("gif", "mpg") else "decord")
        chunks = list(video.iter_chunks(7))
        picked = video.read([20, 3, 3, 0, 23])
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 3]
    assert chunks[0].dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate(chunks), expected)
    np.testing.assert_array_equal(picked, expected[[20, 3, 3, 0, 23]])


@pytest.mark.parametrize("reader", READERS)
def test_paths_bytes_and_file_objects_are_the_same_video(clips: dict[str, Path], reader: str) -> None:
    path = clips["mp4"]
    data = path.read_bytes()
    expected, fps = read_video(path, reader)
    with open(path, "rb") as opened:
        for source in (str(path), data, bytearray(data), io.BytesIO(data), opened, OneWay(data)):
            frames, rate = read_video(source, reader)
            np.testing.assert_array_equal(frames, expected)
            assert rate == fps
        assert not opened.closed


def test_temporary_copies_are_removed(clips: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = clips["mp4"].read_bytes()
    with open_video(io.BytesIO(data)) as video:
        assert list(tmp_path.iterdir())
        video.read([0])
    assert not list(tmp_path.iterdir())
    open_video(data)  # dropped without being closed
    with pytest.raises(VideoReadError):
        open_video(io.BytesIO(b"no video"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b_frames.avi", "mpeg4", {"g": "12", "bf": "2"}),
        ("h264.avi", "libx264", {"g": "12", "bf": "2"}),
        ("open_gop.mp4", "libx265", {"x265-params": "keyint=12:bframes=3:open-gop=1:log-level=0"}),
        ("stream.mpg", "mpeg1video", {"g": "12", "bf": "2"}),
        ("clip.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_jumps_are_right_where_decoders_are_known_to_miss(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    frames = moving_frames(60) // 2 + np.random.default_rng(0).integers(0, 40, (60, 48, 64, 3), dtype=np.uint8)
    path = encode(tmp_path / name, frames, codec, options=options)
    expected = decode_plainly(path)
    order = np.random.default_rng(1).permutation(60)[:20].tolist()
    for reader in ("auto", "decord", "pyav"):
        if reader == "decord" and name.endswith(".mpg"):
            continue
        with open_video(path, reader) as video:
            np.testing.assert_array_equal(video.read(order), expected[order])
            np.testing.assert_array_equal(video.read([59]), expected[[59]])
            strided = np.concatenate(list(video.iter_chunks(4, stride=7)))
            np.testing.assert_array_equal(strided, expected[::7])


@pytest.mark.parametrize("reader", READERS)
def test_random_access_equals_sequential_access(long_clip: Path, reader: str) -> None:
    expected = decode_plainly(long_clip)
    order = np.random.default_rng(1).permutation(90)[:30].tolist()
    with open_video(long_clip, reader) as video:
        np.testing.assert_array_equal(video.read(order), expected[order])
        for index in (89, 0, 47, 12, 11):
            np.testing.assert_array_equal(video.read([index]), expected[[index]])
        half = video.iter_chunks(32)
        first = next(half)
        video.read([80])  # a jump in between disturbs nobody
        np.testing.assert_array_equal(np.concatenate([first, *half]), expected)
        assert video.read([]).shape == (0, 48, 64, 3)


def test_av1_goes_to_pyav_and_the_log_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = encode(tmp_path / "clip.mp4", moving_frames(8, 64, 64), "libsvtav1", options={"preset": "12"})
    with caplog.at_level(logging.INFO, logger="evatok_hf.video.read"), open_video(path) as video:
        assert video.backend == "pyav"
        assert np.concatenate(list(video.iter_chunks(3))).shape == (8, 64, 64, 3)
    assert "decord cannot" in caplog.text and "PyAV" in caplog.text


def test_a_missing_decord_is_no_obstacle(
    clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)  # what the import system makes of a module that is not there
    with caplog.at_level(logging.INFO, logger="evatok_hf.video.read"), open_video(clips["mp4"]) as video:
        assert video.backend == "pyav"
        assert len(video.read([0, 5])) == 2
    assert "not installed" in caplog.text
    with pytest.raises(VideoReadError, match="not installed"):
        open_video(clips["mp4"], "decord")


def test_a_missing_pyav_is_named(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    data = clips["mp4"].read_bytes()
    for reader in READERS:
        with pytest.raises(VideoReadError, match="pip install av"):
            open_video(data, reader)


def test_importing_needs_neither_reader_nor_torch() -> None:
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(video_io.__file__).parents[2])!r})\n"
        "import evatok_hf.video.read\n"
        "print([name for name in ('torch', 'decord', 'av') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("reader", READERS)
def test_one_frame_and_odd_sizes(tmp_path: Path, reader: str) -> None:
    one = encode(tmp_path / "one.mp4", moving_frames(1))
    odd = encode(tmp_path / "odd.mp4", moving_frames(5, 47, 63), pix_fmt="yuv444p")
    assert read_video(one, reader)[0].shape == (1, 48, 64, 3)
    assert read_video(odd, reader)[0].shape == (5, 47, 63, 3)


def test_a_video_of_one_pixel(tmp_path: Path) -> None:
    frames = moving_frames(5)[:, :1, :1]
    path = encode(tmp_path / "dot.mkv", frames, "ffv1", "bgr0")
    with open_video(path) as video:
        assert video.backend == "pyav"  # decord pads lines narrower than 8 pixels
        np.testing.assert_array_equal(video.read(range(5)), frames)


@pytest.mark.parametrize("rotation", [90, -90, 180])
@pytest.mark.parametrize("size", [(48, 64), (64, 128)])
def test_rotation_metadata_is_applied_by_both_readers(tmp_path: Path, rotation: int, size: tuple[int, int]) -> None:
    path = encode(tmp_path / "turned.mp4", moving_frames(3, *size), rotation=rotation)
    expected = np.rot90(decode_plainly(path), rotation // 90, axes=(1, 2))
    for reader in ("auto", "pyav"):
        with open_video(path, reader) as video:
            assert (video.height, video.width) == expected.shape[1:3]
            np.testing.assert_array_equal(video.read([0, 1, 2]), expected)


def test_a_varying_frame_rate_is_read_frame_by_frame(tmp_path: Path) -> None:
    times = [i if i < 6 else 6 + 3 * (i - 6) for i in range(12)]
    path = encode(tmp_path / "vfr.mp4", moving_frames(12), times=times)
    expected = decode_plainly(path)
    for reader in READERS:
        frames, fps = read_video(path, reader)
        np.testing.assert_array_equal(frames, expected)
        assert 10 < fps < 25


@pytest.mark.parametrize("hidden", [3, 30])
def test_a_trimmed_mp4_gives_the_frames_that_it_shows(long_clip: Path, tmp_path: Path, hidden: int) -> None:
    """Phones trim by an edit list, which hides the first frames; decord would repeat the last one as often."""
    expected = decode_plainly(long_clip)[hidden:]
    data = bytearray(long_clip.read_bytes())
    at = data.find(b"elst") + 12  # ISO 14496-12: version, count, then duration and media time of the one entry
    duration, start = struct.unpack(">Ii", data[at : at + 8])
    data[at : at + 8] = struct.pack(">Ii", duration - 40 * hidden, start + 512 * hidden)  # 1/1000 s, 1/12800 s
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(data)
    for reader in ("auto", "pyav"):
        with open_video(path, reader) as video:
            assert (video.backend, video.num_frames) == ("pyav", 90 - hidden)
            np.testing.assert_array_equal(np.concatenate(list(video.iter_chunks(16))), expected)
            np.testing.assert_array_equal(video.read([50, 0]), expected[[50, 0]])
    with pytest.raises(VideoReadError, match="decord cannot read it"):
        open_video(path, "decord")


@pytest.mark.parametrize("reader", READERS)
def test_resampling_takes_the_nearest_frames(long_clip: Path, reader: str) -> None:
    expected = decode_plainly(long_clip)
    with open_video(long_clip, reader) as video:
        for fps, stride, wanted in [
            (12.5, 1, range(0, 90, 2)),
            (5, 2, range(0, 90, 10)),
            (None, 4, range(0, 90, 4)),
            (25, 1, range(90)),
            (50, 1, [(k + 1) // 2 for k in range(179)]),
        ]:
            got = np.concatenate(list(video.iter_chunks(16, fps=fps, stride=stride)))
            np.testing.assert_array_equal(got, expected[list(wanted)])
    rule = nearest_frame_indices(30, 8)
    assert [next(rule) for _ in range(6)] == [0, 4, 8, 11, 15, 19]


def test_bad_arguments_are_refused(clips: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="reader is 'cv2'"):
        open_video(clips["mp4"], "cv2")
    with open_video(clips["mp4"]) as video:
        for arguments in ({"frames_per_chunk": 0}, {"frames_per_chunk": 1.5}, {"frames_per_chunk": 4, "stride": 0}):
            with pytest.raises(ValueError, match="positive whole number"):
                video.iter_chunks(**arguments)
        for fps in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="fps is"):
                video.iter_chunks(4, fps=fps)
        with pytest.raises(VideoReadError, match="0 to 23"):
            video.read([24])
        with pytest.raises(VideoReadError, match="0 to 23"):
            video.read([-1])
    with pytest.raises(VideoReadError, match="closed"):
        video.read([0])
    with pytest.raises(VideoReadError, match="NoneType"):
        open_video(None)  # type: ignore[arg-type]


# --- files that are not videos, or no longer -----------------------------------------------------------------------


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_a_video_is_named_with_cause_and_mend(tmp_path: Path, reader: str, as_bytes: bool) -> None:
    whole = make_video(tmp_path).read_bytes()
    empty_stream = tmp_path / "stream.mp4"
    with av.open(str(empty_stream), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    cases = {
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"hello, this is text\n" * 50, "recognised"),
        "playlist.mp4": (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n", "recognised"),
        "no_index.mp4": (whole[: len(whole) * 6 // 10], "moov"),
        "sound.mp4": (make_audio_only(tmp_path / "a.mp4").read_bytes(), "no video stream"),
        "codec.mp4": (whole.replace(b"avc1", b"zzzz"), "codec is unknown"),
        "nothing.mp4": (empty_stream.read_bytes(), "no video stream"),
    }
    for name, (data, cause) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(VideoReadError) as error:
            open_video(data if as_bytes else path, reader)
        text = one_line(error)
        assert ("bytes>" in text) if as_bytes else (str(path) in text)
        assert cause in text
        assert "hello" not in text


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(VideoReadError, match="no such file"):
        open_video(tmp_path / "nowhere.mp4")
    with pytest.raises(VideoReadError, match="is a folder"):
        open_video(tmp_path)
    with open(__file__, encoding="utf-8") as text, pytest.raises(VideoReadError, match="mode 'rb'"):
        open_video(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(
    ("name", "codec"),
    [("clip.mp4", "libx264"), ("clip.mkv", "libx264"), ("clip.webm", "libvpx-vp9"), ("clip.avi", "mpeg4")],
)
def test_a_truncated_video_gives_its_frames_and_then_says_so(
    tmp_path: Path, name: str, codec: str, as_bytes: bool
) -> None:
    frames = moving_frames(60) // 2 + np.random.default_rng(0).integers(0, 40, (60, 48, 64, 3), dtype=np.uint8)
    container_options = {"movflags": "faststart"} if "mp4" in name else {}
    options = {"qmin": "3", "qmax": "3"} if codec == "mpeg4" else {}
    path = encode(tmp_path / name, frames, codec, options=options, container_options=container_options)
    whole = decode_plainly(path)
    data = path.read_bytes()[: path.stat().st_size * 6 // 10]
    path.write_bytes(data)
    source = data if as_bytes else path
    got = []
    with open_video(source) as video, pytest.raises(VideoReadError) as error:
        for chunk in video.iter_chunks(8):
            got.append(chunk)
    readable = np.concatenate(got)
    assert 4 < len(readable) < 60
    np.testing.assert_array_equal(readable[:-2], whole[: len(readable) - 2])
    assert f"cut short: {len(readable)} of 60 frames" in one_line(error)
    with pytest.raises(VideoReadError, match="cut short"):
        read_video(source)
    with pytest.raises(VideoReadError, match="cut short"):
        open_video(source, "decord")


def test_a_cut_that_costs_no_frame_is_no_error(tmp_path: Path) -> None:
    path = make_video(tmp_path, "avi")
    data = path.read_bytes()
    index = data.rfind(b"idx1")
    frames, _ = read_video(data[: index + 20])
    np.testing.assert_array_equal(frames, decode_plainly(path))


def test_pictures_that_change_their_size_are_refused(tmp_path: Path) -> None:
    """Two mpg streams one after the other are one stream."""
    small = encode(tmp_path / "a.mpg", moving_frames(6, 48, 64), "mpeg1video").read_bytes()
    large = encode(tmp_path / "b.mpg", moving_frames(6, 64, 96), "mpeg1video").read_bytes()
    with open_video(small + large) as video, pytest.raises(VideoReadError, match="change from 48x64 to 64x96") as error:
        list(video.iter_chunks(4))
    one_line(error)


def test_damage_in_the_middle_names_the_frame(long_clip: Path, tmp_path: Path) -> None:
    data = bytearray(long_clip.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 6000] = bytes(6000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    with pytest.raises(VideoReadError) as error:
        read_video(path, "pyav")
    assert "is damaged" in one_line(error) and "of 90 frames" in one_line(error)


def test_readers_leave_no_open_files(clips: dict[str, Path], long_clip: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        folder = Path("/dev/fd")
    before = None
    for i in range(12):
        for reader in ("decord", "pyav"):
            with open_video(long_clip, reader) as video:
                next(video.iter_chunks(4))  # abandoned half way
                video.read([50])
        with pytest.raises(VideoReadError):
            open_video(b"no video at all")
        count = len(list(folder.iterdir()))
        before = count if i == 2 else before
    assert count == before


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [".mp4", ".mkv", ".webm", ".avi", ".mpg", ".gif", ".MP4"])
@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_what_is_written_is_read_back(tmp_path: Path, extension: str, size: tuple[int, int]) -> None:
    frames = moving_frames(10, *size)
    path = tmp_path / f"out{extension}"
    write_video(path, frames, 25)
    back, fps = read_video(path)
    assert back.shape == frames.shape and fps == pytest.approx(25)
    error = np.square(back.astype(float) - frames).mean()
    assert 10 * np.log10(255**2 / error) > 30  # dB; most of the loss is that of halved colour planes
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("extension", [".mp4", ".webm", ".avi", ".gif"])
def test_writing_twice_gives_the_same_frames(tmp_path: Path, extension: str) -> None:
    frames = moving_frames(12)
    with VideoWriter(tmp_path / f"a{extension}", 25, 48, 64) as writer:
        for start in range(0, 12, 5):  # in pieces
            writer.write(frames[start : start + 5])
    write_video(tmp_path / f"b{extension}", frames, 25)
    np.testing.assert_array_equal(read_video(tmp_path / f"a{extension}")[0], read_video(tmp_path / f"b{extension}")[0])


def test_writing_works_after_reading_by_decord(clips: dict[str, Path], tmp_path: Path) -> None:
    """decord and PyAV bring different versions of the same libraries into one process."""
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(video_io.__file__).parents[2])!r})\n"
        "from evatok_hf.video.read import open_video, read_video, write_video\n"
        f"with open_video({str(clips['mp4'])!r}, 'decord') as video:\n"
        "    frames = next(video.iter_chunks(4))\n"
        "for extension in ('.webm', '.mp4', '.gif'):\n"
        f"    write_video({str(tmp_path / 'x')!r} + extension, frames, 25)\n"
        f"    print(len(read_video({str(tmp_path / 'x')!r} + extension)[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["4", "4", "4"], done.stderr


def test_lossless_codec_and_one_pixel(tmp_path: Path) -> None:
    frames = moving_frames(4)
    write_video(tmp_path / "exact.mkv", frames, 25, codec="ffv1")
    np.testing.assert_array_equal(read_video(tmp_path / "exact.mkv")[0], frames)
    write_video(tmp_path / "dot.mp4", frames[:, :1, :1], 25)
    assert read_video(tmp_path / "dot.mp4")[0].shape == (4, 1, 1, 3)


def test_quality_follows_crf(tmp_path: Path) -> None:
    frames = moving_frames(10) // 2 + np.random.default_rng(0).integers(0, 60, (10, 48, 64, 3), dtype=np.uint8)
    for extension in (".mp4", ".webm", ".avi", ".mpg"):
        sizes = []
        for crf in (6, 18, 36):
            write_video(tmp_path / f"q{extension}", frames, 25, crf=crf)
            sizes.append((tmp_path / f"q{extension}").stat().st_size)
        assert sizes[0] > sizes[1] > sizes[2], extension


@pytest.mark.parametrize("fps", [29.97, 23.976, 59.94, 12.5, 24, 14.2857])
def test_frame_rates_survive(tmp_path: Path, fps: float) -> None:
    write_video(tmp_path / "r.mp4", moving_frames(30), fps)
    with open_video(tmp_path / "r.mp4") as video:
        assert video.fps == pytest.approx(fps, rel=2e-4) and video.num_frames == 30


def test_frame_rate_fractions() -> None:
    assert [str(frame_rate(fps)) for fps in (29.97, 23.98, 59.94, 25, 12.5, 0.5)] == [
        "30000/1001", "24000/1001", "60000/1001", "25", "25/2", "1/2",
    ]  # fmt: skip
    for fps in (0, -1, float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="fps is"):
            frame_rate(fps)


def test_refusals_come_before_any_work(tmp_path: Path) -> None:
    frames = moving_frames(2)
    for path, arguments, message in [
        ("x.mov2", {}, r"\.mp4, \.mkv, \.webm, \.avi, \.mpg, \.gif"),
        ("x", {}, "extension"),
        ("x.mp4", {"codec": "h999"}, "no encoder 'h999'"),
        ("x.mp4", {"crf": 99}, "crf is 99"),
        ("x.mpg", {"fps": 12.5}, "the nearest it has is 12"),
        ("x.gif", {"fps": 60}, "at most 50 fps"),
        ("x.mp4", {"fps": 0}, "fps is 0"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            write_video(tmp_path / path, frames, **{"fps": 25, **arguments})
        one_line(error)
    with pytest.raises(ValueError, match="positive height"):
        VideoWriter(tmp_path / "x.mp4", 25, 0, 4)
    with pytest.raises(ValueError, match="at least one"):
        write_video(tmp_path / "x.mp4", frames[:0], 25)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    for path in (tmp_path / "missing" / "x.mp4", tmp_path / "file" / "x.mp4", tmp_path / "folder.mp4"):
        with pytest.raises(VideoWriteError) as error:
            VideoWriter(path, 25, 48, 64)
        assert str(path) in one_line(error)


def test_a_failure_leaves_an_earlier_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    write_video(path, moving_frames(3), 25)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(path, 25, 48, 64) as writer:
        writer.write(moving_frames(5))
        raise RuntimeError("stop")
    with pytest.raises(VideoWriteError, match="no frame"), VideoWriter(path, 25, 48, 64):
        pass
    with pytest.raises(ValueError, match="uint8"), VideoWriter(path, 25, 48, 64) as writer:
        writer.write(moving_frames(5).astype(np.float32))
    with pytest.raises(ValueError, match=r"give uint8 \(F, 48, 64, 3\)"), VideoWriter(path, 25, 48, 64) as writer:
        writer.write(moving_frames(1)[0])
    with pytest.raises(VideoWriteError, match="cannot encode 48x64"):
        VideoWriter(path, 25, 48, 64, codec="gif")  # not a codec that mp4 holds
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.mp4"]
    with VideoWriter(path, 25, 48, 64) as writer:
        writer.write(moving_frames(2))
    with pytest.raises(VideoWriteError, match="closed"):
        writer.write(moving_frames(1))
    assert read_video(path)[0].shape[0] == 2


def test_memory_stays_flat_over_a_long_video(tmp_path: Path) -> None:
    """400 frames of 256 x 256 are 79 MB; writing and reading them must not hold them."""
    code = (
        "import resource, sys\n"
        f"sys.path.insert(0, {str(Path(video_io.__file__).parents[2])!r})\n"
        "import numpy as np\n"
        "from evatok_hf.video.read import VideoWriter, open_video\n"
        "def run(count):\n"
        f"    path = {str(tmp_path / 'long.mp4')!r}\n"
        "    with VideoWriter(path, 25, 256, 256, crf=40) as writer:\n"
        "        for i in range(count // 8):\n"
        "            writer.write(np.full((8, 256, 256, 3), i % 256, dtype=np.uint8))\n"
        "    for reader in ('decord', 'pyav'):\n"
        "        with open_video(path, reader) as video:\n"
        "            assert sum(len(chunk) for chunk in video.iter_chunks(8)) == count\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run(64); short = run(64); print((run(400) - short) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 25  # MB


def test_reader_class_is_what_open_video_returns(clips: dict[str, Path]) -> None:
    with open_video(clips["mp4"]) as video:
        assert isinstance(video, VideoReader)
