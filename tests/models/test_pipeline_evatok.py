"""The pipeline: samples that depend on their seed alone, predictions that begin with what is known, whole folders."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from pipeline_samples import CLASSES, make_generator, with_generator
from router_samples import make_router
from video_samples import encode as write_sample
from video_samples import moving_frames

from evatok_hf import EvatokForCausalLM, EvatokPipeline, VideoTokenizer, VideoTokens
from evatok_hf.models.video_processing_evatok import fade_from_known, held_clip, keep_still

SHORT = {"max_block_length": 8}  # the shortest clips, for speed


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    return with_generator(checkpoint, tmp_path_factory.mktemp("pipeline") / "with-generator")


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = EvatokPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels=None, count=1, **options):
    return pipe(labels, count, **{**SHORT, **options})


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def clips(tokens):
    return [tokens.clip(index).ids.tolist() for index in range(len(tokens))]


# --- generation -----------------------------------------------------------------------------------------------------


def test_what_comes_out(pipe):
    out = draw(pipe, ["walk", 2], 2, seeds=[3, 4, 5, 6])
    assert out.frames.shape == (4, 16, 64, 64, 3) and out.frames.dtype == np.float32
    assert 0 <= out.frames.min() < out.frames.max() <= 1
    assert out.labels == ["walk", "walk", "jump", "jump"] and out.seeds == [3, 4, 5, 6]
    assert out.tokens.lengths.tolist() == [[8] * 4] * 4 and out.tokens.fps == pipe.fps == 12.5
    decoded = np.concatenate(list(VideoTokenizer.from_pipe(pipe).decode(out.tokens)))
    assert (
        decoded.shape == (64, 64, 64, 3)
        and np.abs(decoded / 255 - np.concatenate(out.frames)).max() <= 0.5 / 255 + 1e-6
    )


def test_kinds_of_frames_agree(pipe):
    kinds = {kind: draw(pipe, "run", seeds=[1], output_type=kind).frames for kind in ("np", "pt", "pil")}
    assert kinds["pt"].shape == (1, 16, 3, 64, 64)
    assert np.array_equal(kinds["pt"].permute(0, 1, 3, 4, 2).numpy(), kinds["np"])
    assert isinstance(kinds["pil"][0][0], PIL.Image.Image) and len(kinds["pil"][0]) == 16
    assert np.abs(np.asarray(kinds["pil"][0][7]) / 255 - kinds["np"][0, 7]).max() <= 0.5 / 255 + 1e-6


def test_a_sample_depends_on_neither_their_number_nor_the_batch(pipe):
    many = draw(pipe, ["walk", "run"], 3, generator=seeded(), batch_size=4)
    few = draw(pipe, ["walk", "run"], 2, generator=seeded(), batch_size=1)
    many, few = clips(many.tokens), clips(few.tokens)
    assert few == many[0:2] + many[3:5] and len({tuple(clip) for clip in many}) == 6
    assert clips(draw(pipe, "walk", 2, generator=seeded(1)).tokens) != few[:2]


@pytest.mark.parametrize("one", [0, torch.tensor(0), np.int64(0), np.array(0), torch.tensor([0]), [torch.tensor(0)]])
def test_one_label_and_one_seed_may_be_any_number(pipe, one):
    for out in (draw(pipe, one, seeds=one), pipe.predict(moving_frames(5), 6, class_labels=one, seeds=one, **SHORT)):
        assert out.labels == ["walk"] and out.seeds == [0]


def test_seeds_can_be_given_or_drawn_from_one_generator_each(pipe):
    first = draw(pipe, "walk", 2, generator=[seeded(1), seeded(2)])
    again = draw(pipe, "walk", 2, seeds=first.seeds)
    swapped = draw(pipe, "walk", 2, seeds=first.seeds[::-1])
    assert clips(first.tokens) == clips(again.tokens) == clips(swapped.tokens)[::-1]


def test_the_class_the_guidance_and_the_temperature_matter(pipe):
    one = {"seeds": [7]}
    plain = clips(draw(pipe, "walk", guidance_scale=1, **one).tokens)
    assert plain != clips(draw(pipe, "jump", guidance_scale=1, **one).tokens)
    guided = clips(draw(pipe, "walk", guidance_scale=1.25, **one).tokens)
    assert guided == clips(draw(pipe, "walk", **one).tokens) != plain  # the default
    greedy = [clips(draw(pipe, "walk", temperature=0, seeds=[seed]).tokens) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_lengths_and_budget(pipe):
    rows = [[8, 0, 16, 0], [16, 8, 0, 8], [8, 8, 8, 8]]
    lengths = pipe(None, 3, lengths=rows, budget=40, seeds=[1, 2, 3], batch_size=2).tokens.lengths
    assert (lengths.sum(-1) <= 40).all() and lengths[0, [0, 2]].tolist() == [8, 16] and lengths[2].tolist() == [8] * 4
    assert pipe("walk", 1, lengths=8).tokens.lengths.tolist() == [[8] * 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "wlak"}, "walk.*evatok classes"),
        ({"class_labels": 3}, "no class 3"),
        ({"class_labels": torch.tensor(3)}, "no class 3"),
        ({"class_labels": []}, "empty"),
        ({"class_labels": object()}, "no class <object"),
        ({"guidance_scale": 2.0}, "guidance needs a class"),
        ({"class_labels": "run", "guidance_scale": -1}, "guidance_scale"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"budget": -5}, "budget of -5"),
        ({"lengths": [8, 8, 8]}, "4 lengths"),
        ({"lengths": [[8] * 4] * 2}, "2 rows for 1"),
        ({"seeds": [1, 2]}, "2 seeds for 1"),
        ({"seeds": "one"}, "'one' is no seed"),
        ({"seeds": [1.5]}, "1.5 is no seed"),
        ({"seeds": 2**64}, "is no seed"),
        ({"generator": []}, "0 generators"),
        ({"generator": 5}, "not a int; or give seeds"),
        ({"seeds": [1], "generator": torch.Generator()}, "not both"),
        ({"output_type": "gif"}, "output_type"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_wrong_arguments_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_the_bar_is_that_of_diffusers(folder, capfd):
    pipe = EvatokPipeline.from_pretrained(folder)
    capfd.readouterr()
    pipe.set_progress_bar_config(desc="drawing")
    draw(pipe)
    assert "drawing" in (shown := capfd.readouterr().err) and "100/100" in shown
    pipe.set_progress_bar_config(disable=True)
    draw(pipe)
    assert capfd.readouterr().err == ""


# --- prediction -------------------------------------------------------------------------------------------------------


def seen(pipe, frames):
    """Frames as the model sees them, floats (F, H, W, 3) in [0, 1]."""
    video = pipe.processor(frames, num_frames=None, return_tensors="pt")["pixel_values_videos"]
    return ((video[0] + 1) / 2).permute(0, 2, 3, 1).numpy()


def test_a_prediction_begins_with_the_last_known_frames(pipe):
    frames = moving_frames(9, 48, 80)
    out = pipe.predict(frames, 16, class_labels="run", seeds=[1], **SHORT)
    assert out.frames.shape == (1, 16, 64, 64, 3) and out.labels == ["run"]
    assert np.allclose(out.frames[0, :5], seen(pipe, frames[-5:]), atol=1e-6)
    assert not np.allclose(out.frames[0, 5:], out.frames[0, 4:5], atol=0.05)
    few = pipe.predict(frames[:2], 16, seeds=[1], **SHORT)
    assert few.frames.shape[1] == 16 and np.allclose(few.frames[0, :2], seen(pipe, frames[:2]), atol=1e-6)


def test_the_condition_is_the_held_clip_and_its_known_blocks_are_kept(pipe):
    frames = moving_frames(9)
    out = pipe.predict(frames, 16, known_frames=9, seeds=[4], **SHORT)
    video = pipe.processor(frames, num_frames=None, return_tensors="pt")["pixel_values_videos"]
    condition = pipe.tokenizer.encode(held_clip(video, 16))  # without a router the middle candidate
    assert torch.equal(out.tokens.ids[:64], condition.ids[:64]) and out.tokens.lengths[0, :2].tolist() == [32, 32]
    assert not torch.equal(out.tokens.ids, condition.ids)
    plain = pipe.predict(frames, 16, known_frames=9, seeds=[4], known="decoded", hold=None, **SHORT)
    decoded = pipe.tokenizer.decode(out.tokens)
    assert np.allclose(plain.frames, ((decoded + 1) / 2).permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    kept = keep_still(decoded, video[:, 8], 8)[:, 9:]
    for hold, expected in ((0, kept), (0.8, fade_from_known(kept, video[:, 8]))):
        made = pipe.predict(frames, 16, known_frames=9, seeds=[4], hold=hold, **SHORT).frames[0, 9:]
        assert np.allclose(made, ((expected[0] + 1) / 2).permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert np.allclose(out.frames[0, 9:], made, atol=1e-6)
    with pytest.raises(ValueError, match="hold is 1.5; give a share"):
        pipe.predict(frames, 16, known_frames=9, seeds=[4], hold=1.5, **SHORT)


def test_the_router_chooses_the_lengths_of_the_condition(pipe, monkeypatch):
    routed = EvatokPipeline(pipe.tokenizer, pipe.processor, make_router(pipe.tokenizer.config), pipe.generator)
    routed.set_progress_bar_config(disable=True)
    frames = moving_frames(5)
    video = pipe.processor(frames, num_frames=None, return_tensors="pt")["pixel_values_videos"]
    lengths = routed.router.assign(held_clip(video, 16))
    asked, real = [], pipe.generator.codec.prompt
    monkeypatch.setattr(
        "evatok_hf.models.modeling_evatok_generator.SequenceCodec.prompt",
        lambda self, prompt: asked.append(prompt.condition_lengths) or real(prompt),
    )
    for part in (pipe.tokenizer, routed.router):
        monkeypatch.setattr(part.config, "return_dict", False)  # as users of tuples set it
    routed.predict(frames, seeds=[1], **SHORT)
    assert torch.equal(asked[0], lengths[0])


def test_a_longer_prediction_goes_on_from_a_shorter_one(pipe):
    frames = moving_frames(5)
    long = pipe.predict(frames, 30, seeds=[2], **SHORT)
    short = pipe.predict(frames, 20, seeds=[2], **SHORT)
    assert long.frames.shape[1] == 30 and len(long.tokens) == 3
    assert np.array_equal(long.frames[:, :20], short.frames)


def test_videos_of_a_batch_are_predicted_as_they_are_alone(pipe):
    videos = [moving_frames(5), moving_frames(3)[:, ::-1].copy()]
    both = pipe.predict(videos, 18, class_labels=["walk", None], seeds=[1, 2], batch_size=2, **SHORT)
    for index, (video, label) in enumerate(zip(videos, ("walk", None), strict=True)):
        alone = pipe.predict(video, 18, class_labels=label, seeds=[index + 1], **SHORT)
        assert np.allclose(alone.frames[0], both.frames[index], atol=1e-4)
    assert both.labels == ["walk", None]


def test_kinds_of_videos_agree(pipe):
    frames = moving_frames(5)
    images = [PIL.Image.fromarray(frame) for frame in frames]
    kinds = [frames, frames / np.float32(255), torch.from_numpy(frames).permute(0, 3, 1, 2), images, list(frames)]
    options = {"num_frames": 6, "seeds": [1], "temperature": 0, **SHORT}
    first, *others = [pipe.predict(kind, **options).frames for kind in kinds]
    assert all(np.allclose(first, other, atol=1e-5) for other in others)


@pytest.mark.parametrize(
    ("frames", "arguments", "message"),
    [
        (np.empty((0, 8, 8, 3), np.uint8), {}, "empty"),
        ([], {}, "empty list"),
        ("video.mp4", {}, "cannot be a str"),
        (moving_frames(5), {"num_frames": 5}, "at least 6"),
        (moving_frames(5), {"known_frames": 16}, "1 to 15"),
        (moving_frames(5), {"known": "both"}, "known must be"),
        (moving_frames(5), {"class_labels": ["walk", "run"]}, "1 videos but 2 class_labels"),
        (moving_frames(5), {"seeds": [1, 2]}, "2 seeds for 1"),
        (moving_frames(5), {"class_labels": "hop"}, "no class 'hop'"),
    ],
)
def test_what_cannot_be_predicted_is_refused(pipe, frames, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.predict(frames, **arguments)


def test_an_unknown_option_is_no_option(pipe, folder):
    with pytest.raises(ValueError, match="HTTPS_PROXY"):
        EvatokPipeline.from_pretrained(folder, proxies={"https": "http://127.0.0.1:1"})
    for call in (lambda: pipe("walk", num_inference_steps=50), lambda: pipe.predict(moving_frames(5), steps=50)):
        with pytest.raises(TypeError, match="steps"):
            call()


# --- old names --------------------------------------------------------------------------------------------------------


def test_old_arguments_work_for_one_release(pipe, folder):
    with pytest.warns(FutureWarning, match="num_videos goes .* num_videos_per_prompt"):
        assert len(pipe("walk", num_videos=2, seeds=[1, 2], **SHORT).frames) == 2
    heard = []
    with pytest.warns(FutureWarning, match="progress goes .* callback_on_step_end"):
        draw(pipe, progress=heard.append)
    assert heard[-1] == 1
    with pytest.warns(FutureWarning) as told:
        assert EvatokPipeline.from_pretrained(path_or_hub_id=folder, device="cpu").device.type == "cpu"
    assert {str(one.message).split()[0] for one in told} >= {"device", "path_or_hub_id"}


@pytest.mark.filterwarnings("ignore:EvatokPipeline:FutureWarning")
def test_old_names_give_what_the_video_tokenizer_gives(pipe, tmp_path):
    frames = moving_frames(21)
    path = write_sample(tmp_path / "v.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    with pytest.warns(FutureWarning, match=r"tokenize goes .* VideoTokenizer.from_pipe\(pipe\).encode"):
        tokens = pipe.tokenize(path, lengths=[8, 16, 32, 8])
    expected = VideoTokenizer(pipe.tokenizer, pipe.processor).encode(path, [8, 16, 32, 8])
    assert torch.equal(tokens.ids, expected.ids) and tokens.num_frames == 21 and tokens.fps == 25
    assert torch.equal(pipe.tokenize(frames, lengths=[8, 16, 32, 8]).ids, tokens.ids)
    with pytest.warns(FutureWarning) as told:
        out = pipe.reconstruct(path, lengths=[8, 16, 32, 8])
    assert [str(one.message).split()[0] for one in told] == ["EvatokPipeline.reconstruct"] and told[
        0
    ].filename == __file__
    assert out.frames.shape == (1, 21, 64, 64, 3) and torch.equal(out.tokens.ids, tokens.ids)
    decoded = np.concatenate(list(pipe.video_tokenizer.decode(tokens)))
    assert np.array_equal((out.frames[0] * 255).round().astype(np.uint8), decoded)
    assert np.array_equal(pipe.detokenize(tokens), out.frames)
    assert pipe.detokenize(tokens, clips=True).shape == (2, 16, 64, 64, 3)


# --- loading and saving -----------------------------------------------------------------------------------------------


def test_a_saved_folder_is_the_same_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = EvatokPipeline.from_pretrained(str(tmp_path / "saved"))
    again.set_progress_bar_config(disable=True)
    expected = draw(pipe, ["walk", "run"], seeds=[1, 2])
    assert np.array_equal(draw(again, ["walk", "run"], seeds=[1, 2]).frames, expected.frames)
    assert again.classes == CLASSES and again.router is None
    assert VideoTokenizer.from_pretrained(tmp_path / "saved").model.fingerprint() == pipe.tokenizer.fingerprint()
    again.save_pretrained(tmp_path / "saved")  # over itself
    assert not [path for path in os.listdir(tmp_path / "saved") if path.startswith(".")]


def test_diffusers_loads_the_folder_too(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    routed = EvatokPipeline(pipe.tokenizer, pipe.processor, make_router(pipe.tokenizer.config), pipe.generator)
    routed.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"][1] == "EvatokPipeline"
    loaded = DiffusionPipeline.from_pretrained(str(tmp_path / "saved"), trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is EvatokPipeline and loaded.router is not None
    assert np.array_equal(draw(loaded, "run", seeds=[5]).frames, draw(pipe, "run", seeds=[5]).frames)


def test_it_moves_and_changes_its_dtype(folder):
    pipe = EvatokPipeline.from_pretrained(folder).to("cpu", torch.bfloat16)
    assert {part.dtype for part in (pipe.tokenizer, pipe.generator)} == {torch.bfloat16} and pipe.device.type == "cpu"
    pipe.set_progress_bar_config(disable=True)
    assert draw(pipe, "walk").frames.dtype == np.float32
    assert EvatokPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).generator.dtype == torch.bfloat16
    assert EvatokPipeline.from_pretrained(folder, dtype="bfloat16").generator.dtype == torch.bfloat16
    mixed = EvatokPipeline.from_pretrained(folder, torch_dtype={"generator": torch.bfloat16, "default": torch.float32})
    assert (mixed.tokenizer.dtype, mixed.generator.dtype) == (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="unknown dtype torch.float16"):
        EvatokPipeline.from_pretrained(folder, torch_dtype=torch.float16)


def test_a_failed_save_leaves_nothing(pipe, tmp_path, monkeypatch):
    def fail(self, folder, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EvatokForCausalLM, "save_pretrained", fail)
    with pytest.raises(ValueError, match="No space left"):
        pipe.save_pretrained(tmp_path / "saved")
    assert os.listdir(tmp_path / "saved") == []


def test_parts_of_different_checkpoints_do_not_mix(pipe, checkpoint, other_checkpoint, folder, tmp_path):
    other = EvatokPipeline.from_pretrained(other_checkpoint)
    with pytest.raises(ValueError, match="random-b.*with-generator.*tokenizer_fingerprint"):
        EvatokPipeline(other.tokenizer, other.processor, generator=pipe.generator)
    for fields, message in (
        ({"codebook_size": 32}, "codebook_size is 64.* and 32"),
        ({"block_lengths": [8, 16]}, "block_lengths"),
        ({"num_blocks": 2}, "num_blocks"),
    ):
        wrong = make_generator(**fields)
        with pytest.raises(ValueError, match=message):
            EvatokPipeline(pipe.tokenizer, pipe.processor, generator=wrong)
    shutil.copytree(folder, tmp_path / "mixed")
    with pytest.raises(ValueError, match="has a generator of another checkpoint"):
        other.save_pretrained(tmp_path / "mixed")
    VideoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "mixed")  # the generator's own tokenizer


def test_a_checkpoint_without_generator_says_so(checkpoint):
    pipe = EvatokPipeline.from_pretrained(checkpoint)
    assert pipe.classes == [] and pipe.fps is None
    for call in (lambda: pipe("walk"), lambda: pipe.predict(moving_frames(5))):
        with pytest.raises(ValueError, match="random-a has no generator"):
            call()


def test_a_damaged_generator_is_refused_but_not_where_it_is_not_wanted(folder, tmp_path, sample_clip):
    for name, content in (("model.safetensors", "x" * 40), ("config.json", '{"model_type": "bert"}')):
        broken = tmp_path / name
        shutil.copytree(folder, broken)
        (broken / "generator" / name).write_text(content)
        with pytest.raises(ValueError, match="generator"):
            EvatokPipeline.from_pretrained(broken)
        assert isinstance(VideoTokenizer.from_pretrained(broken).encode(sample_clip, 8, max_clips=1), VideoTokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": "auto"}, "cannot load so: auto not supported.*balanced.*; change that argument"),
        ({"tokenizer": None}, "router and generator may be None"),
        ({"torch_dtype": {"default": "float17"}}, "unknown dtype 'float17'"),
    ],
)
def test_a_wrong_argument_is_no_damaged_checkpoint(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        EvatokPipeline.from_pretrained(folder, **arguments)


def test_a_generator_without_class_names_takes_numbers(pipe):
    numbered = make_generator(class_names=None, num_classes=3)
    pipe = EvatokPipeline(pipe.tokenizer, pipe.processor, generator=numbered)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.classes == ["0", "1", "2"] and draw(pipe, ["2", 1]).labels == [2, 1]
    none = EvatokPipeline(pipe.tokenizer, pipe.processor, generator=make_generator(class_names=None))
    with pytest.raises(ValueError, match="without classes"):
        none("walk")
