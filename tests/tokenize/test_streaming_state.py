"""Videos through the tokenizer bit by bit: any plan of chunks gives the same ids and frames; nothing piles up."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizer_samples import make_tokenizer, processor, real_frames

from evatok_hf import VideoTokenizer, VideoTokens
from evatok_hf.tokenize.memory import MemoryVideo
from evatok_hf.tokenize.seams import Seam

FRAMES = 37
LENGTHS = [2, 8, 32, 4]


@pytest.fixture(scope="module")
def tokenizer():
    return VideoTokenizer(make_tokenizer(), processor())


@pytest.fixture(scope="module")
def frames():
    return real_frames().flatten(0, 1)[:FRAMES].numpy()  # uint8 (37, H, W, 3)


def by_brightness(clip):
    """A rule that gives clips different lengths."""
    return LENGTHS if clip.mean() > -0.1 else [8, 8, 2, 2]


def plans(total: int) -> dict[str, list[int]]:
    """Name -> sizes of chunks that add up to `total`."""
    draw, sizes = np.random.default_rng(0), []
    while sum(sizes) < total:
        sizes.append(int(draw.integers(0, 12)))
    sizes[-1] -= sum(sizes) - total
    return {
        "all at once": [total],
        "one by one": [1] * total,
        "1, 4, 4": [1] + [4] * ((total - 1) // 4) + [(total - 1) % 4],
        "random": sizes,
    }


def cut(frames: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(frames, np.cumsum(sizes)[:-1])


def same(one: VideoTokens, other: VideoTokens) -> bool:
    tensors = torch.equal(one.ids, other.ids) and torch.equal(one.lengths, other.lengths)
    return tensors and all(
        getattr(one, name) == getattr(other, name)
        for name in ("fps", "num_frames", "overlap", "checkpoint", "fingerprint", "height", "width")
    )


# --- any plan of chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["all at once", "one by one", "1, 4, 4", "random"])
@pytest.mark.parametrize("overlap", [0, 3])
def test_any_plan_of_chunks_gives_the_tokens_of_one_call(tokenizer, frames, plan, overlap):
    whole = tokenizer.encode(MemoryVideo(frames, 25), by_brightness, overlap=overlap)
    sizes = plans(FRAMES)[plan]
    with tokenizer.streaming(by_brightness, fps=25, overlap=overlap) as stream:
        parts = [part for chunk in cut(frames, sizes) for part in stream.push(chunk)] + stream.finish()
    assert same(stream.join(parts), whole) and stream.num_frames == FRAMES
    assert all(part.lengths.shape == (1, 4) for part in parts)

    with tokenizer.streaming(LENGTHS, fps=25, overlap=overlap, part="block") as stream:
        blocks = [part for chunk in cut(frames, sizes) for part in stream.push(chunk)] + stream.finish()
    assert all(part.lengths.shape == (1, 1) for part in blocks)
    assert same(stream.join(blocks), tokenizer.encode(MemoryVideo(frames, 25), LENGTHS, overlap=overlap))


@pytest.mark.parametrize("overlap", [0, 3, 8])
@pytest.mark.parametrize("blend", ["fade", "cut", "carry"])
def test_any_plan_of_tokens_gives_the_frames_of_one_call(tokenizer, frames, overlap, blend):
    with tokenizer.streaming(LENGTHS, overlap=overlap) as stream:
        clips = stream.push(frames) + stream.finish()
    whole = np.concatenate(list(tokenizer.decode(stream.join(clips), blend)))
    assert whole.shape == (FRAMES, 32, 32, 3)
    with tokenizer.streaming(LENGTHS, overlap=overlap, part="block") as stream:
        blocks = stream.push(frames) + stream.finish()
    for parts in (clips, blocks, [stream.join(blocks)]):
        with tokenizer.streaming_decode(blend) as decoding:
            shown = [decoding.push(part) for part in parts] + [decoding.finish()]
        assert np.array_equal(np.concatenate(shown), whole)


def test_a_block_is_there_with_its_last_frame(tokenizer, frames):
    arrived = []
    with tokenizer.streaming(LENGTHS, part="block") as stream, tokenizer.streaming_decode() as decoding:
        for number in range(32):
            for part in stream.push(frames[number : number + 1]):
                arrived.append((number, part.ids.numel(), len(decoding.push(part))))
    assert arrived == [(4 * block + 3, LENGTHS[block % 4], 4) for block in range(8)]


def test_blocks_of_the_model_are_those_of_a_whole_clip(tokenizer):
    model = tokenizer.model
    clip = next(tokenizer.clips(MemoryVideo(real_frames()[0].numpy(), 25))).pixel_values_videos
    whole = model.encode(clip, LENGTHS)
    encoding, decoding = model.start_encoding(), model.start_decoding()
    ids = [model.encode_block(part, n, encoding) for part, n in zip(clip.split(4, 1), LENGTHS, strict=True)]
    assert torch.equal(torch.cat(ids), whole.ids)
    assert torch.equal(torch.cat([model.decode_block(part, decoding) for part in ids], 1), model.decode(whole))
    for call in (lambda: model.encode_block(clip[:, :4], 2, encoding), lambda: model.decode_block(ids[0], decoding)):
        with pytest.raises(ValueError, match="all 4 blocks"):
            call()
    with pytest.raises(ValueError, match="not 3"):
        model.encode_block(clip[:, :4], 3, model.start_encoding())
    with pytest.raises(ValueError, match="must have shape"):
        model.encode_block(clip, 2, model.start_encoding())


# --- overlap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [1, 4, 8])
def test_overlapping_clips_give_every_number_of_frames_back(tokenizer, overlap):
    video = real_frames().flatten(0, 1).numpy()
    for count in [1, 15, 16, 17, 16 + 16 - overlap, 17 + 16 - overlap, 47]:
        source = MemoryVideo(video[:count], 25)
        tokens = tokenizer.encode(source, 2, overlap=overlap)
        assert (tokens.num_frames, tokens.overlap) == (count, overlap)
        assert len(tokens) == tokenizer.count_clips(source, overlap=overlap)
        assert sum(len(part) for part in tokenizer.decode(tokens)) == count


def test_overlap_is_written_and_older_files_have_none(tokenizer, frames, tmp_path):
    tokens = tokenizer.encode(MemoryVideo(frames, 25), 2, overlap=4)
    tokens.save(tmp_path / "overlapping")
    loaded = VideoTokens.load(tmp_path / "overlapping")
    assert same(loaded, tokens)
    assert np.array_equal(*(np.concatenate(list(tokenizer.decode(each))) for each in (loaded, tokens)))
    plain = tokenizer.encode(MemoryVideo(frames, 25), 2)
    plain.save(tmp_path / "plain")
    assert b"overlap" not in (tmp_path / "plain").read_bytes()  # readers that do not know the word still read it
    assert VideoTokens.load(tmp_path / "plain").overlap == 0


def test_common_frames_go_from_one_clip_to_the_next(tokenizer, frames):
    tokens = tokenizer.encode(MemoryVideo(frames, 25), 32, overlap=4)
    clips = [tokenizer.model.decode(tokens.clip(index))[0] for index in range(3)]  # (16, 3, 32, 32)
    faded, cut_off = (np.concatenate(list(tokenizer.decode(tokens, blend))) for blend in ("fade", "cut"))

    def shown(video):
        return tokenizer.processor.postprocess(video[None])[0].numpy()

    assert np.array_equal(faded[:12], shown(clips[0][:12])) and np.array_equal(faded[16:24], shown(clips[1][4:12]))
    assert np.array_equal(cut_off[:16], shown(clips[0])) and np.array_equal(cut_off[16:28], shown(clips[1][4:]))
    assert np.array_equal(faded[13], shown(torch.lerp(clips[0][13], clips[1][1], 0.4)[None])[0])


def test_carrying_lets_what_stands_still_pass_over_and_nothing_after_a_cut():
    first, noise = torch.rand(3, 32, 32) * 2 - 1, 0.1 * torch.randn(3, 32, 32)

    def second_clip(frames, blend="carry"):
        seam = Seam(4, blend=blend)
        seam.push(first.expand(4, -1, -1, -1), 0)
        seam.end_clip()
        return torch.cat(seam.push(frames[:2], 0) + seam.push(frames[2:], 2))

    still = (first + noise).clamp(-1, 1).expand(4, -1, -1, -1)
    errors = [(second_clip(still, blend) - first).abs().mean((1, 2, 3)) for blend in ("fade", "carry")]
    assert (errors[1] < 0.7 * errors[0]).all() and errors[1][0] < 0.2 * errors[0][0]

    moves = still.clone()
    moves[2:, :, :, :16] *= -1  # the left half, from the third frame on
    carried = second_clip(moves)
    assert torch.allclose(carried[2:, :, :, :8], moves[2:, :, :, :8], atol=0.01)
    assert (carried[2:, :, :, 24:] - first[:, :, 24:]).abs().mean() < 0.7 * errors[0][0]

    cut = torch.ones(4, 3, 32, 32)
    assert (second_clip(cut) - cut).abs().mean() < 0.05


@pytest.mark.parametrize("overlap", [0, 4])
@pytest.mark.parametrize("blend", ["fade", "carry"])
def test_reconstruct_shows_what_decode_shows(tokenizer, frames, overlap, blend):
    source = MemoryVideo(frames, 25)
    clips = list(tokenizer.reconstruct(source, LENGTHS, overlap=overlap, blend=blend))
    tokens = tokenizer.encode(source, LENGTHS, overlap=overlap)
    decoded = np.concatenate(list(tokenizer.decode(tokens, blend)))
    assert np.array_equal(np.concatenate([clip.reconstruction for clip in clips]), decoded)
    assert torch.equal(torch.cat([clip.tokens.ids for clip in clips]), tokens.ids)
    seen = tokenizer.processor(frames, num_frames=None, return_tensors="pt")["pixel_values_videos"]
    original = tokenizer.processor.postprocess(seen)[0].numpy()
    assert np.array_equal(np.concatenate([clip.original for clip in clips]), original)
    assert [clip.first for clip in clips] == [index * (16 - overlap) for index in range(3)]


# --- constant memory --------------------------------------------------------------------------------------------------


def test_no_more_than_a_clip_and_a_chunk_is_held(tokenizer, frames):
    alive: list[weakref.ref] = []

    class Watching(type(tokenizer.processor)):
        def preprocess(self, videos, **kwargs):
            made = super().preprocess(videos, **kwargs)
            alive.append(weakref.ref(made["pixel_values_videos"][0].untyped_storage()))
            return made

    watched = VideoTokenizer(tokenizer.model, Watching(**tokenizer.processor.to_dict()))
    most = 0
    with watched.streaming(2) as stream:
        for frame in np.concatenate([frames] * 3):
            stream.push(frame[None])
            held = 0 if stream._feed._frames is None else stream._feed._frames.untyped_storage().nbytes()
            most = max(most, held // (3 * 32 * 32 * 4))
    assert len(alive) == 3 * FRAMES and most <= 16
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    assert stream._feed is None


def test_a_long_push_is_preprocessed_in_parts(tokenizer, frames, monkeypatch):
    handed = []

    class Counting(type(tokenizer.processor)):
        def preprocess(self, videos, **kwargs):
            handed.append(len(videos))
            return super().preprocess(videos, **kwargs)

    counted = VideoTokenizer(tokenizer.model, Counting(**tokenizer.processor.to_dict()))
    with counted.streaming(2) as stream:
        stream.push(frames)
    assert handed == [16, 16, 5]


def test_decoding_holds_only_what_the_next_clip_can_change(tokenizer, frames):
    with tokenizer.streaming(2, overlap=4) as stream:
        parts = stream.push(frames) + stream.finish()
    with tokenizer.streaming_decode() as decoding:
        assert [len(decoding.push(part)) for part in parts] == [12, 12, 12]
        assert len(decoding.finish()) == FRAMES - 36
    with pytest.raises(ValueError, match="ended"):
        decoding.push(parts[0])


# --- wrong use --------------------------------------------------------------------------------------------------------


def test_a_stream_that_ended_takes_nothing(tokenizer, frames):
    with tokenizer.streaming(2) as stream:
        assert stream.push(frames[:0]) == [] and stream.finish() == []
    for call in (lambda: stream.push(frames), stream.finish):
        with pytest.raises(ValueError, match="ended"):
            call()
    with pytest.raises(ValueError, match="no tokens"):
        stream.join([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overlap": 9}, "0 to 8"),
        ({"overlap": -1}, "0 to 8"),
        ({"overlap": 1.5}, "0 to 8"),
        ({"part": "frame"}, "clip, block"),
        ({"part": "block"}, "give lengths"),
        ({"lengths": by_brightness, "part": "block"}, "give lengths"),
        ({"lengths": 3}, "2, 4, 8, 16, 32"),
        ({"fps": 0}, "fps"),
    ],
)
def test_wrong_arguments_are_refused(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.streaming(**arguments)


def test_tokens_that_do_not_follow_each_other_are_refused(tokenizer, frames):
    with tokenizer.streaming(2) as stream:
        *_, clip, tail = stream.push(frames) + stream.finish()
    with tokenizer.streaming(2, part="block") as stream:
        block = stream.push(frames[:4])[0]

    def decoding(*parts):
        with tokenizer.streaming_decode() as stream:
            for part in parts:
                stream.push(part)

    for parts, message in [
        ((tail, clip), "filled up"),
        ((block, clip), "not complete"),
        ((clip, replace(clip, overlap=4)), "overlap by 4"),
        ((replace(clip, fingerprint="other"),), "made by checkpoint"),
        ((replace(block, ids=block.ids + 256),), "codebook"),
        ((VideoTokens(torch.zeros(3, dtype=torch.int64), torch.tensor([[3]])),), "not 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoding(*parts)
    with pytest.raises(ValueError, match="join all parts"):
        stream.join([block])
    with pytest.raises(ValueError, match="fade, cut, carry"):
        tokenizer.streaming_decode("mix")
    damaged = replace(tokenizer.encode(MemoryVideo(frames, 25), 2), overlap=9)
    with pytest.raises(ValueError, match="overlap"):
        tokenizer.decode(damaged)
    with pytest.raises(ValueError, match="different overlaps"):
        VideoTokens.concatenate([clip, replace(clip, overlap=2)])
