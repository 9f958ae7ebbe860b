"""Whatever users hold as a video gives the tokens that its file gives."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from fsspec.registry import known_implementations
from video_samples import encode as write_sample
from video_samples import moving_frames

from evatok_hf import EvatokVideoProcessor, VideoTokenizer
from evatok_hf.video.read import VideoReadError, open_video

FRAMES = moving_frames(19, 48, 64)
FIRST = torch.from_numpy(FRAMES).permute(0, 3, 1, 2)


class Decoder:
    """As a `VideoDecoder` of torchcodec."""

    metadata = SimpleNamespace(average_fps=25.0)
    get_frames_in_range = None

    def __len__(self):
        return len(FIRST)

    def __getitem__(self, index):
        return FIRST[index]


class NDArray:
    """As an array of decord."""

    def __init__(self, frames):
        self.asnumpy = lambda: frames


class Decord:
    """As a `VideoReader` of decord."""

    def get_avg_fps(self):
        return 25.0

    def __len__(self):
        return len(FRAMES)

    def __getitem__(self, index):
        return NDArray(FRAMES[index])


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return VideoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("inputs") / "v.mkv", FRAMES, codec="ffv1", pix_fmt="bgr0")


@pytest.fixture(scope="module")
def ids(tokenizer, path):
    return tokenizer.encode(path, 8).ids


@pytest.mark.parametrize(
    "video",
    [
        FRAMES,
        FIRST,
        FIRST.float() / 255,
        list(FRAMES),
        list(FIRST),
        [PIL.Image.fromarray(frame) for frame in FRAMES],
        SimpleNamespace(data=FIRST, pts_seconds=torch.arange(19) / 25),
        [SimpleNamespace(data=frame, pts_seconds=1.0) for frame in FIRST],
        NDArray(FRAMES),
        [NDArray(frame) for frame in FRAMES],
    ],
    ids="array tensor floats arrays tensors images torchcodec torchcodec-list decord decord-list".split(),
)
def test_frames_in_memory(tokenizer, ids, video):
    tokens = tokenizer.encode(video, 8)
    assert torch.equal(tokens.ids, ids) and tokens.num_frames == 19 and tokens.fps is None
    assert tokenizer.encode(video, 8, fps=30, stride=2).fps == 15


@pytest.mark.parametrize("video", [Decoder(), Decord()], ids=["torchcodec", "decord"])
def test_readers_of_other_libraries(tokenizer, ids, path, video):
    tokens = tokenizer.encode(video, 8)
    assert torch.equal(tokens.ids, ids) and tokens.fps == 25
    resampled, expected = tokenizer.encode(video, 8, fps=10), tokenizer.encode(path, 8, fps=10)
    assert torch.equal(resampled.ids, expected.ids) and resampled.fps == 10


def test_frames_in_memory_are_sampled_to_the_processors_rate(tokenizer, path):
    slow = VideoTokenizer(tokenizer.model, EvatokVideoProcessor(**tokenizer.processor.to_dict() | {"fps": 5}))
    expected = slow.encode(path, 8)
    assert expected.num_frames == 4 and expected.fps == 5
    for tokens in (slow.encode(FRAMES, 8, fps=25), slow.encode(slow.prepare(FRAMES, 25), 8)):
        assert torch.equal(tokens.ids, expected.ids) and (tokens.num_frames, tokens.fps) == (4, 5)
    assert len(list(slow.route(FRAMES, 8, fps=100))) == 1 and len(list(slow.route(FRAMES, 8, fps=5))) == 2


def test_a_reader_that_fails_on_the_way_says_where(tokenizer):
    class Broken(Decord):
        def __getitem__(self, index):
            if index == 7:
                raise RuntimeError("corrupt packet\nmore lines")
            return super().__getitem__(index)

    with pytest.raises(VideoReadError, match=r"frame 7 .*\(corrupt packet\)$"):
        tokenizer.encode(Broken(), 8)


def test_rows_of_datasets_and_addresses(tokenizer, ids, path):
    for video in (
        {"path": path, "bytes": None},
        {"path": None, "bytes": path.read_bytes()},
        {"path": "gone.mp4", "bytes": path.read_bytes()},
        f"file://{path}",
    ):
        assert torch.equal(tokenizer.encode(video, 8).ids, ids)


def test_clips_are_routed_without_a_rate_and_prepared(tokenizer, ids):
    clip = next(tokenizer.route(FRAMES, 8))
    assert clip.lengths == [8] * 4 and clip.start is None and clip.end is None
    assert next(tokenizer.route(FRAMES, 8, fps=8)).end == 2
    prepared = tokenizer.prepare(FRAMES)
    assert torch.equal(tokenizer.encode(prepared, 8).ids, ids)
    with pytest.raises(ValueError, match="prepared without a rate"):
        tokenizer.encode(prepared, 8, fps=5)


def test_what_is_no_video_is_refused(tokenizer, monkeypatch):
    slow = VideoTokenizer(tokenizer.model, EvatokVideoProcessor(fps=5))
    for video, message in (
        ({"path": None, "bytes": None}, "neither bytes nor a path"),
        ([], "at least one"),
        (FRAMES[..., :2], "no axis of 3 colours"),
        ([FRAMES[0], FRAMES[1, :9]], "differ in size"),
        (7, "from a int"),
        ("nowhere://host/video.mp4", "cannot be fetched .*nowhere"),
        ("file:///no/such.mp4", "cannot be fetched"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            tokenizer.encode(video, 8)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="sample them to 5 fps; give it as fps"):
        slow.encode(FRAMES, 8)
    with pytest.raises(ValueError, match="may be .* give a list of PIL images"):
        tokenizer.encode(FRAMES[:, :3], 8)
    lacking = {"class": "no_such_package.Files", "err": "Install no_such_package to access videos"}
    monkeypatch.setitem(known_implementations, "lacking", lacking)
    with pytest.raises(VideoReadError, match=r"fetched \(Install no_such_package .*\): install that, or download it$"):
        open_video("lacking://host/video.mp4")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(VideoReadError, match="through fsspec: install it"):
        open_video("https://example.org/video.mp4")
