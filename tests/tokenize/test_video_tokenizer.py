"""Whole videos through a tokenizer: lengths, laziness, loading."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from video_samples import encode as write_sample
from video_samples import moving_frames

from evatok_hf import EvatokVideoProcessor, VideoTokenizer, VideoTokens
from evatok_hf.metrics import psnr
from evatok_hf.video import open_video, read_video


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return VideoTokenizer.from_pretrained(checkpoint)


def sample(folder, frames=24, height=48, width=64, fps=25):
    path = folder / f"{frames}x{height}x{width}.mp4"
    return write_sample(path, moving_frames(frames, height, width), fps=fps, options={"crf": "10"})


# --- any length ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 15, 16, 17, 32, 37])
def test_a_video_of_any_length_comes_back_with_as_many_frames(tokenizer, tmp_path, frames):
    tokens = tokenizer.encode(sample(tmp_path, frames), 8)
    clips = list(tokenizer.decode(tokens))
    assert tokens.num_frames == frames and tokens.fps == 25
    assert len(clips) == len(tokens) == -(-frames // 16)
    assert [len(clip) for clip in clips] == [16] * (frames // 16) + ([frames % 16] if frames % 16 else [])
    assert all(clip.dtype == np.uint8 and clip.shape[1:] == (64, 64, 3) for clip in clips)


def test_the_last_clip_is_filled_up_with_its_last_frame(tokenizer, tmp_path):
    *_, last = tokenizer.clips(sample(tmp_path, 19))
    video = last.pixel_values_videos
    assert (last.index, last.num_frames, tuple(video.shape)) == (1, 3, (1, 16, 3, 64, 64))
    assert torch.equal(video[:, 3:], video[:, 2:3].expand(-1, 13, -1, -1, -1))
    assert not torch.equal(video[:, 2], video[:, 1])


def test_a_video_of_one_pixel_works(tokenizer, tmp_path):
    path = write_sample(tmp_path / "dot.mkv", moving_frames(3, 1, 1), codec="ffv1", pix_fmt="bgr0")
    assert sum(len(clip) for clip in tokenizer.decode(tokenizer.encode(path))) == 3


def test_resampling_keeps_the_duration(tokenizer, sample_clip):
    tokens = tokenizer.encode(sample_clip, 8, fps=5)
    assert tokens.fps == 5 and tokens.num_frames == 50 and len(tokens) == 4
    assert tokenizer.encode(sample_clip, 8, stride=5).ids.equal(tokens.ids)


def test_the_processors_rate_is_the_default(tokenizer, sample_clip):
    processor = EvatokVideoProcessor(fps=5)
    assert VideoTokenizer(tokenizer.model, processor).encode(sample_clip, 8).num_frames == 50


# --- clips ----------------------------------------------------------------------------------------------------------


def test_clips_are_those_of_the_whole_video(tokenizer, sample_clip):
    frames, _ = read_video(sample_clip)
    whole = tokenizer.processor(frames[:37], num_frames=None, return_tensors="pt")["pixel_values_videos"]
    clips = [clip.pixel_values_videos for clip in tokenizer.clips(sample_clip, max_clips=3)]
    assert torch.equal(torch.cat(clips, dim=1)[:, :37], whole)


def test_clips_of_large_frames_are_read_in_parts_with_the_same_result(tokenizer, sample_clip, monkeypatch):
    expected = [clip.pixel_values_videos for clip in tokenizer.clips(sample_clip, max_clips=2)]
    monkeypatch.setattr("evatok_hf.tokenize.streams.PIXELS_AT_ONCE", 3 * 640 * 272)
    parts = [clip.pixel_values_videos for clip in tokenizer.clips(sample_clip, max_clips=2)]
    assert all(torch.equal(a, b) for a, b in zip(expected, parts, strict=True))


def test_a_clip_has_the_tokens_that_it_has_alone(tokenizer, sample_clip):
    tokens = tokenizer.encode(sample_clip, [8, 16, 128, 32], max_clips=3)
    alone = [tokenizer.model.encode(c.pixel_values_videos, [8, 16, 128, 32]) for c in tokenizer.clips(sample_clip)][:3]
    assert tokens.ids.equal(torch.cat([part.ids for part in alone]))
    assert tokens.lengths.tolist() == [[8, 16, 128, 32]] * 3


def test_a_configuration_that_asks_for_tuples_changes_nothing(tokenizer, sample_clip, monkeypatch):
    expected = tokenizer.encode(sample_clip, 8, max_clips=2)
    monkeypatch.setattr(tokenizer.model.config, "return_dict", False)
    tokens = tokenizer.encode(sample_clip, 8, max_clips=2)
    assert torch.equal(tokens.ids, expected.ids) and len(list(tokenizer.decode(tokens))) == 2


def test_a_rule_chooses_the_lengths_of_each_clip(tokenizer, sample_clip):
    seen = []

    def rule(clip):
        seen.append(tuple(clip.shape))
        return [[8, 16, 32, 64], [128] * 4][len(seen) % 2]

    tokens = tokenizer.encode(sample_clip, rule, max_clips=2)
    assert seen == [(1, 16, 3, 64, 64)] * 2
    assert tokens.lengths.tolist() == [[128] * 4, [8, 16, 32, 64]]
    assert [len(clip) for clip in tokenizer.decode(tokens)] == [16, 16]


def test_a_video_is_read_as_its_clips_are_asked_for_and_clips_are_let_go(tokenizer, sample_clip):
    handed = 0

    class Counting(type(tokenizer.processor)):
        def preprocess(self, videos, **kwargs):
            nonlocal handed
            handed += len(videos)
            return super().preprocess(videos, **kwargs)

    lazy = VideoTokenizer(tokenizer.model, Counting(**tokenizer.processor.to_dict()))
    alive: list[weakref.ref] = []
    for count, clip in enumerate(lazy.reconstruct(sample_clip, 8, max_clips=5), 1):
        assert handed == 16 * count
        alive.append(weakref.ref(clip.reconstruction))
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 2  # this one, and the one before where the loop holds it
    assert count == 5


def test_decoding_is_lazy(tokenizer, sample_clip, monkeypatch):
    tokens = tokenizer.encode(sample_clip, 8, max_clips=4)
    decoded, real = [], tokenizer.model.decode_block
    monkeypatch.setattr(tokenizer.model, "decode_block", lambda *block: decoded.append(block) or real(*block))
    next(tokenizer.decode(tokens))
    assert len(decoded) == 4


def test_an_open_video_can_be_given_and_stays_open(tokenizer, sample_clip):
    with open_video(sample_clip) as video:
        first = tokenizer.encode(video, 8, max_clips=1)
        assert first.ids.equal(tokenizer.encode(video, 8, max_clips=1).ids)
        assert tokenizer.count_clips(video) == 16 and tokenizer.count_clips(video, fps=5) == 4


# --- reconstruction -------------------------------------------------------------------------------------------------


def test_reconstruct_is_encode_and_decode(tokenizer, tmp_path):
    path = sample(tmp_path, 21)
    clips = list(tokenizer.reconstruct(path, [8, 16, 32, 64]))
    tokens = tokenizer.encode(path, [8, 16, 32, 64])
    decoded = list(tokenizer.decode(tokens))
    assert torch.cat([clip.tokens.ids for clip in clips]).equal(tokens.ids)
    assert [len(clip.original) for clip in clips] == [16, 5]
    for clip, frames in zip(clips, decoded, strict=True):
        assert np.array_equal(clip.reconstruction, frames) and clip.lengths == [8, 16, 32, 64]
        pair = torch.from_numpy(clip.original)[None], torch.from_numpy(clip.reconstruction)[None]
        assert clip.psnr == float(psnr(*pair))


def test_the_original_is_what_the_model_saw(tokenizer, sample_clip):
    clip = next(tokenizer.reconstruct(sample_clip))
    frames, _ = read_video(sample_clip)
    seen = tokenizer.processor(frames[:16], return_tensors="pt")
    assert np.array_equal(clip.original, tokenizer.processor.postprocess(seen["pixel_values_videos"])[0].numpy())


def test_half_precision_works_and_reads_the_same_tokens(tokenizer, checkpoint, sample_clip):
    half = VideoTokenizer.from_pretrained(checkpoint, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    tokens = tokenizer.encode(sample_clip, 8, max_clips=1)
    close = next(half.decode(tokens)).astype(int) - next(tokenizer.decode(tokens))
    assert np.abs(close).mean() < 4
    assert len(half.encode(sample_clip, 8, max_clips=1)) == 1


# --- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [8, 16, 32]}, "4 lengths a clip"),
        ({"lengths": 9}, "8, 16, 32, 64, 128"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"stride": 0}, "stride"),
        ({"max_clips": 0}, "max_clips"),
    ],
)
def test_wrong_arguments_are_refused_before_the_video_is_read(tokenizer, arguments, message):
    for method in (tokenizer.encode, tokenizer.reconstruct):
        with pytest.raises(ValueError, match=message):
            method("/there/is/no/such/video.mp4", **arguments)


def test_tokens_that_do_not_belong_here_are_refused_at_once(tokenizer, other_checkpoint, sample_clip):
    tokens = tokenizer.encode(sample_clip, 8, max_clips=2)
    with pytest.raises(ValueError, match="random-a.*random-b"):
        VideoTokenizer.from_pretrained(other_checkpoint).decode(tokens)
    empty = VideoTokens(torch.empty(0, dtype=torch.int64), torch.empty(0, 4, dtype=torch.int64))
    for wrong, message in [
        (replace(tokens, ids=tokens.ids + 1000), "codebook has 64"),
        (replace(tokens, lengths=torch.tensor([[9, 7, 8, 8]] * 2)), "candidates"),
        (replace(tokens, num_frames=16), "17 to 32"),
        (replace(tokens, num_frames="many"), "frames"),
        (replace(tokens, fps=-1.0), "fps"),
        (empty, "no clip"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(wrong)


# --- loading --------------------------------------------------------------------------------------------------------


def test_the_folder_or_its_tokenizer_folder_may_be_named(tokenizer, checkpoint, tmp_path, monkeypatch):
    direct = VideoTokenizer.from_pretrained(str(checkpoint / "tokenizer"), dtype=torch.float32)
    assert direct.model.fingerprint() == tokenizer.model.fingerprint()
    assert direct.name == tokenizer.name == "random-a"
    monkeypatch.chdir(checkpoint)
    assert VideoTokenizer.from_pretrained("tokenizer").name == "random-a"
    with pytest.warns(FutureWarning, match="pretrained_model_name_or_path"):
        assert VideoTokenizer.from_pretrained(path_or_hub_id="tokenizer").name == "random-a"


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", "", "cpu:x"])
def test_an_unknown_or_missing_device_is_refused(checkpoint, device):
    with pytest.raises(ValueError, match="choose"):
        VideoTokenizer.from_pretrained(checkpoint, device=device)


def test_auto_takes_a_device_that_is_there(checkpoint):
    kind = VideoTokenizer.from_pretrained(checkpoint, device="auto").model.device.type
    assert kind == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_dtype_is_refused(checkpoint):
    for dtype in ("int8", torch.float64):
        with pytest.raises(ValueError, match="bfloat16"):
            VideoTokenizer.from_pretrained(checkpoint, dtype=dtype)


def test_a_missing_checkpoint_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no folder"):
        VideoTokenizer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no config.json"):
        VideoTokenizer.from_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Hub is not reachable"):
        VideoTokenizer.from_pretrained("nobody/has-this-one")


def test_an_incomplete_checkpoint_is_refused(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder)
        change(folder / "tokenizer")
        with pytest.raises(ValueError) as error:
            VideoTokenizer.from_pretrained(folder)
        assert "\n" not in str(error.value) and name in str(error.value)
        return str(error.value)

    def lose_a_tensor(folder):
        weights = load_file(folder / "model.safetensors")
        del weights["decoder.to_patch.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def another_model(folder):
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))

    assert "decoder.to_patch.weight" in broken("lost-tensor", lose_a_tensor)
    broken("no-weights", lambda folder: (folder / "model.safetensors").unlink())
    broken("cut-weights", lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" * 40))
    broken("no-processor", lambda folder: (folder / "video_preprocessor_config.json").unlink())
    broken("cut-config", lambda folder: (folder / "config.json").write_text('{"model_ty'))
    assert "'bert'" in broken("other-model", another_model)
