"""A tokenizer with a router: loading, choices of lengths, budgets over whole videos."""

from __future__ import annotations

import gc
import io
import itertools
import json
import weakref

import pytest
import torch
from router_samples import make_router, with_router
from safetensors.torch import load_file, save_file

from evatok_hf import EvatokRouter, VideoTokenizer
from evatok_hf.allocation import Allocation
from evatok_hf.video import open_video


@pytest.fixture(scope="module")
def routed(checkpoint, tmp_path_factory):
    return with_router(checkpoint, tmp_path_factory.mktemp("routed") / "random-a")


@pytest.fixture(scope="module")
def tokenizer(routed):
    return VideoTokenizer.from_pretrained(routed)


def assigned(tokenizer, video, quality, clips):
    found = tokenizer.clips(video, max_clips=clips)
    return [tokenizer.router.assign(clip.pixel_values_videos, quality)[0].tolist() for clip in found]


# --- loading and saving ---------------------------------------------------------------------------------------------


def test_a_router_is_loaded_and_saved_with_its_tokenizer(tokenizer, sample_clip, tmp_path):
    tokenizer.save_pretrained(tmp_path / "copy")
    again = VideoTokenizer.from_pretrained(tmp_path / "copy")
    assert again.router.fingerprint() == tokenizer.router.fingerprint() and not again.router.training
    a, b = tokenizer.encode(sample_clip, max_clips=3), again.encode(sample_clip, max_clips=3)
    assert a.ids.equal(b.ids) and a.lengths.equal(b.lengths)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["router", "tokenizer"]
    half = VideoTokenizer.from_pretrained(tmp_path / "copy", dtype="bfloat16")
    assert half.router.dtype == torch.bfloat16 and len(half.encode(sample_clip, max_clips=1)) == 1


def test_a_tokenizer_alone_stays_possible(routed, checkpoint, sample_clip, tmp_path):
    for folder in (checkpoint, routed / "tokenizer"):
        alone = VideoTokenizer.from_pretrained(folder)
        assert alone.router is None
        assert alone.encode(sample_clip, max_clips=1).lengths.tolist() == [[32] * 4]
    alone.save_pretrained(tmp_path / "alone")
    assert VideoTokenizer.from_pretrained(tmp_path / "alone").router is None


def test_saving_leaves_other_files_alone_and_mixes_no_checkpoints(routed, checkpoint, tokenizer, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "README.md").write_text("kept")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer" / "README.md").read_text() == "kept"
    with pytest.raises(ValueError, match="has a router of another checkpoint"):
        VideoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        tokenizer.save_pretrained(tmp_path / "file")


def test_the_tokenizer_may_lie_beside_its_router_folder(routed, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in (routed / "tokenizer").iterdir():
        (tmp_path / "flat" / path.name).write_bytes(path.read_bytes())
    (routed / "router").rename(tmp_path / "flat" / "router")
    try:
        assert VideoTokenizer.from_pretrained(tmp_path / "flat").router is not None
    finally:
        (tmp_path / "flat" / "router").rename(routed / "router")


def test_a_router_that_does_not_fit_or_load_is_refused(checkpoint, tokenizer, tmp_path):
    other = with_router(checkpoint, tmp_path / "other", block_lengths=(8, 16))
    with pytest.raises(ValueError, match="tokenizer and router disagree: block_lengths"):
        VideoTokenizer.from_pretrained(other)
    with pytest.raises(ValueError, match="disagree: num_frames"):
        VideoTokenizer(tokenizer.model, tokenizer.processor, make_router(tokenizer.model.config, num_frames=8))

    broken = with_router(checkpoint, tmp_path / "broken") / "router"
    weights = load_file(broken / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if name != "head.bias"}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks tensors: head\.bias"):
        VideoTokenizer.from_pretrained(broken.parent)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the router in .*broken does not load"):
        VideoTokenizer.from_pretrained(broken.parent)
    (broken / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert', not an EVATok router"):
        VideoTokenizer.from_pretrained(broken.parent)


# --- choices --------------------------------------------------------------------------------------------------------


def test_the_router_at_its_quality_is_the_default(tokenizer, checkpoint, sample_clip, tmp_path):
    expected = assigned(tokenizer, sample_clip, 1.2, 5)
    assert len({tuple(row) for row in expected}) > 1  # clips of this video differ
    assert tokenizer.encode(sample_clip, max_clips=5).lengths.tolist() == expected
    assert [clip.lengths for clip in tokenizer.reconstruct(sample_clip, max_clips=5)] == expected
    assert tokenizer.encode(sample_clip, quality=1.2, max_clips=5).lengths.tolist() == expected
    # the paper's router, which knows one quality, is asked at that one
    single = VideoTokenizer.from_pretrained(with_router(checkpoint, tmp_path / "single", quality=0.9))
    assert single.encode(sample_clip, max_clips=5).lengths.tolist() == assigned(single, sample_clip, 0.9, 5)
    with pytest.raises(ValueError, match="quality 0.9 alone"):
        single.encode(sample_clip, quality=1.2)
    with pytest.raises(ValueError, match="a budget needs a router"):
        single.encode(sample_clip, budget=500)


def test_more_weight_on_quality_never_takes_fewer_tokens(tokenizer, sample_clip):
    totals = [
        [sum(row) for row in tokenizer.encode(sample_clip, quality=quality, max_clips=4).lengths.tolist()]
        for quality in (0, 0.8, 1.6, 2)
    ]
    assert totals[0] == [32] * 4
    assert all(a <= b for less, more in itertools.pairwise(totals) for a, b in zip(less, more, strict=True))


def test_a_clip_gets_what_it_gets_alone(tokenizer, sample_clip):
    together = tokenizer.encode(sample_clip, quality=1.4, max_clips=4).lengths
    for clip, row in zip(tokenizer.clips(sample_clip), together, strict=False):
        assert torch.equal(tokenizer.router.assign(clip.pixel_values_videos, 1.4)[0], row)


def test_route_says_what_each_clip_gets_and_when(tokenizer, sample_clip):
    clips = list(tokenizer.route(sample_clip, quality=1.6))
    expected = tokenizer.encode(sample_clip, quality=1.6)
    assert [clip.lengths for clip in clips] == expected.lengths.tolist()
    assert sum(clip.tokens for clip in clips) == len(expected.ids)
    assert [clip.index for clip in clips] == list(range(16))
    assert clips[0].start == 0 and clips[-1].end == pytest.approx(10) and len(clips[-1].original) == 10
    assert all(a.end == b.start for a, b in itertools.pairwise(clips))


def test_router_and_budget_run_neither_encoder_nor_decoder(tokenizer, sample_clip, monkeypatch):
    for part in (tokenizer.model.encoder, tokenizer.model.decoder):
        monkeypatch.setattr(part, "forward", lambda *_, **__: pytest.fail("a part of the tokenizer ran"))
        monkeypatch.setattr(part, "block", lambda *_, **__: pytest.fail("a part of the tokenizer ran"))
    for options in ({"quality": 1.0}, {"budget": 300}, {"budget_per_clip": 100}, {"lengths": 8}):
        assert len(list(tokenizer.route(sample_clip, max_clips=2, **options))) == 2


# --- budgets --------------------------------------------------------------------------------------------------------


def predicted(tokenizer, video, lengths):
    """The sum of the qualities that the router predicts for these assignments."""
    space, total = tokenizer.model.assignment_space, 0.0
    for clip, row in zip(tokenizer.clips(video), lengths.tolist(), strict=False):
        with torch.no_grad():
            qualities = tokenizer.router(clip.pixel_values_videos).qualities[0]
        total += float(qualities[space.to_index(row)])
    return total


@pytest.mark.parametrize(("clips", "budget"), [(1, 100), (1, 32), (5, 160), (5, 425), (5, 700), (5, 99999)])
def test_a_budget_holds_and_is_split_at_least_as_well_as_equally(tokenizer, sample_clip, clips, budget):
    split = tokenizer.encode(sample_clip, budget=budget, max_clips=clips)
    equal = tokenizer.encode(sample_clip, budget_per_clip=budget // clips, max_clips=clips)
    assert len(split) == len(equal) == clips and len(split.ids) <= budget
    assert (equal.lengths.sum(-1) <= budget // clips).all()
    better = predicted(tokenizer, sample_clip, split.lengths)
    assert better >= predicted(tokenizer, sample_clip, equal.lengths) - 1e-6
    if clips == 1:
        assert split.lengths.equal(equal.lengths)
    elif 160 < budget < 99999:
        assert better > predicted(tokenizer, sample_clip, equal.lengths)


def test_a_budget_that_is_too_small_names_the_smallest_before_the_work(tokenizer, sample_clip, monkeypatch):
    monkeypatch.setattr(EvatokRouter, "forward", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=r"511 tokens are too few: 16 clip\(s\) need at least 512"):
        tokenizer.encode(sample_clip, budget=511)
    with pytest.raises(ValueError, match="31 tokens are too few.* at least 32"):
        tokenizer.encode(sample_clip, budget_per_clip=31)


class _Pipe(io.RawIOBase):
    """Bytes that come once and cannot be rewound."""

    def __init__(self, data):
        self._data = io.BytesIO(data)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self._data.readinto(buffer)


def test_a_budget_reads_twice_whatever_the_video_comes_from(tokenizer, sample_clip):
    expected = tokenizer.encode(sample_clip, budget=400, max_clips=4)
    data = sample_clip.read_bytes()
    with open_video(sample_clip) as video:
        for source in (data, io.BytesIO(data), _Pipe(data), video):
            found = tokenizer.encode(source, budget=400, max_clips=4)
            assert found.lengths.equal(expected.lengths) and found.ids.equal(expected.ids)


def test_both_passes_of_a_budget_let_clips_go(tokenizer, sample_clip):
    alive: list[weakref.ref] = []

    class Remembering(VideoTokenizer):
        def clips(self, *arguments, **options):
            for clip in super().clips(*arguments, **options):
                gc.collect()
                assert sum(ref() is not None for ref in alive) <= 2
                alive.append(weakref.ref(clip))
                yield clip

    remembering = Remembering(tokenizer.model, tokenizer.processor, tokenizer.router)
    tokens = remembering.encode(sample_clip, budget=800, max_clips=8)
    assert len(tokens) == 8 and len(alive) == 16


def test_an_allocation_of_the_module_can_be_given(tokenizer, sample_clip):
    for allocation, options in (
        (Allocation(budget=300), {"budget": 300}),
        (Allocation(budget_per_clip=90), {"budget_per_clip": 90}),
        (Allocation(quality=0.9).bind(tokenizer.model, tokenizer.router), {"quality": 0.9}),
        (Allocation("fixed", lengths=[8, 16, 8, 16]), {"lengths": [8, 16, 8, 16]}),
    ):
        found = tokenizer.encode(sample_clip, allocation, max_clips=3)
        assert found.lengths.equal(tokenizer.encode(sample_clip, **options, max_clips=3).lengths)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": 8, "quality": 1.2}, "lengths and quality contradict each other"),
        ({"lengths": lambda clip: 8, "budget": 99}, "lengths and budget contradict each other"),
        ({"quality": 1.0, "budget": 99, "budget_per_clip": 50}, "quality and budget and budget_per_clip"),
        ({"quality": 2.5}, "quality must lie between 0"),
        ({"quality": float("nan")}, "quality must lie between 0"),
    ],
)
def test_choices_that_contradict_are_refused_before_the_video_is_read(tokenizer, options, message):
    for method in (tokenizer.encode, tokenizer.reconstruct, tokenizer.route):
        with pytest.raises(ValueError, match=message):
            method("/there/is/no/such/video.mp4", **options)


@pytest.mark.parametrize("options", [{"quality": 1.2}, {"budget": 500}, {"budget_per_clip": 50}])
def test_what_needs_a_router_says_so(checkpoint, options):
    with pytest.raises(ValueError, match="needs a router and this model has none"):
        VideoTokenizer.from_pretrained(checkpoint).encode("/no/video.mp4", **options)
