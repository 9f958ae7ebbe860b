"""Clips that are worked on together: the same tokens and frames but for ties, read meanwhile."""

from __future__ import annotations

import threading
import time
import warnings

import numpy as np
import pytest
import torch
from tokenizer_samples import make_tokenizer, real_clips
from torch.nn import functional as F

from evatok_hf import VideoTokenizer, VideoTokens
from evatok_hf.allocation import Allocation
from evatok_hf.models.modeling_evatok import PaddedLayout
from evatok_hf.tokenize.ahead import ahead
from evatok_hf.tokenize.clip_tokens import ClipTokens
from evatok_hf.tokenize.streams import VideoClip


@pytest.fixture(scope="module")
def one_by_one(checkpoint):
    return VideoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def together(checkpoint):
    return VideoTokenizer.from_pretrained(checkpoint, batch_clips=3)


def check_same_but_for_ties(model, video, found, expected):
    """At most 0.2 % of ids differ, each time between codes that are equally near."""
    assert found.lengths.equal(expected.lengths)
    other = (found.ids != expected.ids).nonzero()[:, 0]
    assert len(other) <= 0.002 * len(expected.ids)
    if len(other):
        layout = PaddedLayout(expected.lengths)
        with torch.no_grad():
            features = F.normalize(model.features(video, layout)[other], dim=-1)
        near = [(features * model.quantizer.to_codes(tokens.ids[other])).sum(-1) for tokens in (found, expected)]
        assert (near[0] - near[1]).abs().max() < 1e-4


def varied(clip):
    """Another assignment for each clip, as it comes to its frames."""
    return [(8, 16, 32, 64, 128)[int(part.abs().sum() * 1000) % 5] for part in clip[0].split(4)]


@pytest.mark.parametrize(("lengths", "overlap"), [(varied, 0), ([8, 128, 16, 64], 0), (32, 4)])
def test_a_video_has_the_tokens_and_frames_of_its_clips(one_by_one, together, sample_clip, lengths, overlap):
    options = {"max_clips": 7, "overlap": overlap}
    expected = one_by_one.encode(sample_clip, lengths, **options)
    found = together.encode(sample_clip, lengths, **options)
    video = torch.cat([clip.pixel_values_videos for clip in one_by_one.clips(sample_clip, **options)])
    check_same_but_for_ties(one_by_one.model, video, found, expected)
    assert (found.num_frames, found.fps, found.overlap) == (expected.num_frames, expected.fps, overlap)
    assert [clip.lengths for clip in together.route(sample_clip, lengths, max_clips=7)] == [
        clip.lengths for clip in one_by_one.route(sample_clip, lengths, max_clips=7)
    ]
    parts = list(together.decode(expected))
    step = one_by_one.model.config.num_frames - overlap
    assert max(map(len, parts[:-1])) == step
    frames = np.concatenate(list(one_by_one.decode(expected))).astype(int)
    assert np.abs(np.concatenate(parts).astype(int) - frames).max() <= 1  # 1e-4 of the range may round either way
    pairs = zip(together.reconstruct(sample_clip, lengths, **options), range(7), strict=True)
    shown = [clip for clip, index in pairs if clip.index == index]
    assert np.abs(np.concatenate([clip.reconstruction for clip in shown]).astype(int) - frames).max() <= 1
    assert sum(len(clip.original) for clip in shown) == expected.num_frames


def test_batches_of_no_clips_are_refused(one_by_one):
    with pytest.raises(ValueError, match="batch_clips is 0"):
        VideoTokenizer(one_by_one.model, one_by_one.processor, batch_clips=0)


def waits(call, monkeypatch) -> int:
    """How often a call waits for the device of its tensors: as CUDA counts, else how often a value is read."""
    if torch.cuda.is_available():
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(one.message) for one in found)
    reads = []
    with monkeypatch.context() as patch:
        patch.setattr(VideoTokens, "__post_init__", lambda tokens: None)  # which checks what came to the CPU
        for name in ("item", "tolist", "cpu", "__int__", "__float__", "__bool__", "__index__"):
            old = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda *given, old=old: reads.append(old) or old(*given))
        call()
    return len(reads)


def test_the_device_is_not_waited_for_at_every_clip(monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_tokenizer(position_embedding="pooled").to(device)
    tokenizer = VideoTokenizer(model, None, batch_clips=6)
    lengths = model.assignment_space.all()
    video = real_clips()[:1].repeat(6, 1, 1, 1, 1)

    def encode(count):
        clips = [VideoClip(clip, index, clip.shape[1], 0) for index, clip in enumerate(video[:count].split(1))]
        stream = tokenizer.streaming(8)
        return stream.join(stream.encode(clips, video[:count].to(device)))

    def ids(count):
        return ClipTokens(Allocation(lengths=8).bind(model))(video[:count])

    monkeypatch.setattr(model, "_exact", lambda exact: False)
    tokens = {count: model.encode(video[:count], lengths[:count], exact=False) for count in (2, 6)}
    calls = {
        "stream": encode,
        "ids": ids,
        "mixed": lambda count: model.encode(video[:count], lengths[:count], exact=False),
        "decode": lambda count: model.decode(tokens[count], exact=False),
    }
    for name, call in calls.items():
        call(2)  # what is worked out once
        few, many = (waits(lambda call=call, count=count: call(count), monkeypatch) for count in (2, 6))
        assert many <= few, name


def test_what_is_read_ahead_comes_in_order_with_its_errors_and_ends():
    made, closed = [], threading.Event()

    def numbers():
        try:
            for number in range(10):
                made.append((number, threading.current_thread() is threading.main_thread()))
                if number == 4:
                    raise ValueError("it broke")
                yield number
        finally:
            closed.set()

    items = ahead(numbers(), 2)
    assert next(items) == 0
    deadline = time.monotonic() + 30
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [(0, False), (1, False), (2, False)]  # no further than it was let
    items.close()
    assert closed.is_set()
    before = []
    with pytest.raises(ValueError, match="it broke"):
        before.extend(ahead(numbers()))
    assert list(ahead(iter_of([5, 6]))) == [5, 6]


def iter_of(values):
    yield from values


def test_a_reader_that_stops_lets_go_of_the_video(together, sample_clip):
    def readers():
        return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]

    clips = together.reconstruct(sample_clip, 8)
    assert next(clips).index == 0 and readers()
    clips.close()
    assert not readers()
