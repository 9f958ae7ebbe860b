"""training/tokenizer/teachers.py: tiny teachers on disk, loaded as the real ones are, against transformers' own
processors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEImageProcessor,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2Model,
    VJEPA2VideoProcessor,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evatok_hf import EvatokConfig
from evatok_hf.data.streaming import to_float
from evatok_hf.video.read import open_video
from training.tokenizer.teachers import (
    Preparation,
    Teacher,
    resample_frames,
)

SIDE, FRAMES, WIDTH = 32, 4, 24


@pytest.fixture(scope="module")
def videomae(tmp_path_factory) -> Path:
    """A pretraining checkpoint of three blocks, 4 x 32 x 32, with the processor of the published ones."""
    folder = tmp_path_factory.mktemp("videomae")
    config = VideoMAEConfig(
        image_size=SIDE,
        patch_size=8,
        num_frames=FRAMES,
        tubelet_size=2,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        decoder_num_attention_heads=2,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=16,
        use_mean_pooling=False,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        VideoMAEForPreTraining(config).save_pretrained(folder)
    VideoMAEImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vjepa2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vjepa2")
    config = VJEPA2Config(
        crop_size=SIDE,
        patch_size=8,
        frames_per_clip=8,
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_ratio=2.0,
        num_pooler_layers=1,
        pred_hidden_size=WIDTH,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        VJEPA2Model(config).save_pretrained(folder)
    VJEPA2VideoProcessor(crop_size=SIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def frames(sample_clip) -> torch.Tensor:
    """(4, 3, 272, 272) uint8, real frames."""
    with open_video(sample_clip) as reader:
        video = reader.read(list(range(0, 40, 10)))
    return torch.from_numpy(np.ascontiguousarray(video[:, :, 100:372])).permute(0, 3, 1, 2)


def smaller(frames: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(frames.float(), (side, side), mode="area").round().to(torch.uint8)


# --- preparing clips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [24, 32, 48, 272])
def test_videomae_clips_are_prepared_as_by_its_processor(videomae, frames, side):
    clip = smaller(frames, side)
    expected = VideoMAEImageProcessor.from_pretrained(videomae)(list(clip), return_tensors="pt")["pixel_values"]
    prepared = Teacher.from_pretrained(videomae).preparation(to_float(clip)[None])
    # The processor rounds to whole pixel values after resizing: half of one is 0.009 here.
    assert prepared.shape == expected.shape and (prepared - expected).abs().max() < 0.02


@pytest.mark.parametrize("side", [24, 32, 48])
def test_vjepa2_clips_are_prepared_as_by_its_processor_without_the_crop(vjepa2, frames, side):
    clip = smaller(frames, side)
    processor = VJEPA2VideoProcessor.from_pretrained(vjepa2)
    size = {"height": SIDE, "width": SIDE}
    expected = processor(clip, size=size, do_center_crop=False, return_tensors="pt")["pixel_values_videos"]
    prepared = Teacher.from_pretrained(vjepa2).preparation(to_float(clip)[None])
    assert prepared.shape == expected.shape and (prepared - expected).abs().max() < 0.02


def test_the_processor_of_the_checkpoint_counts(videomae, frames, tmp_path):
    VideoMAEModel.from_pretrained(videomae).save_pretrained(tmp_path)
    clip = smaller(frames, 48)
    without = Teacher.from_pretrained(tmp_path).preparation(to_float(clip)[None])
    assert torch.equal(without, Teacher.from_pretrained(videomae).preparation(to_float(clip)[None]))
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    for options in ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}, {"do_normalize": False}):
        processor = VideoMAEImageProcessor(**size, **options)
        processor.save_pretrained(tmp_path)
        expected = processor(list(clip), return_tensors="pt")["pixel_values"]
        prepared = Teacher.from_pretrained(tmp_path).preparation(to_float(clip)[None])
        prepared = prepared.clamp(expected.min(), expected.max())  # the processor's bicubic filter does not overshoot
        assert (prepared - expected).abs().max() < 0.03 and (prepared - without).abs().max() > 0.1
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 0}))
    with pytest.raises(ValueError, match="PIL's filter 0"):
        Teacher.from_pretrained(tmp_path)


def test_frames_are_spread_evenly():
    video = torch.arange(8.0)[None, :, None]
    assert resample_frames(video, 4).flatten().tolist() == [1, 3, 5, 7]
    assert resample_frames(video[:, :3], 6).flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert resample_frames(video, 3).flatten().tolist() == [1, 4, 6]
    assert resample_frames(video, 8) is video


@pytest.mark.parametrize("shape", [(1, 4, 3, 32, 24), (1, 4, 1, 32, 32), (4, 3, 32, 32)])
def test_clips_of_another_shape_are_refused(videomae, shape):
    with pytest.raises(ValueError, match="clips must be"):
        Teacher.from_pretrained(videomae).features(torch.zeros(shape))


# --- features ---------------------------------------------------------------------------------------------------------


def test_videomae_features(videomae, frames):
    teacher = Teacher.from_pretrained(videomae)
    assert (teacher.layers, teacher.width, teacher.grid) == ((0, 1, 2, 3), WIDTH, (2, 4, 4))
    video = to_float(smaller(frames, 48))[None].requires_grad_()
    readouts = teacher.features(video)
    assert [readout.shape for readout in readouts] == [(1, 32, WIDTH)] * 4

    model = VideoMAEForPreTraining.from_pretrained(videomae).eval().videomae
    with torch.no_grad():
        hidden = model.embeddings(teacher.preparation(video), None)
        expected = [hidden]
        for block in model.encoder.layer:
            hidden = block(hidden)
            expected.append(hidden)
        last = model.layernorm(hidden)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(readouts, expected, strict=True))
    grid = teacher.grid_features(video)
    assert not grid.requires_grad and torch.allclose(grid, last.view(1, 2, 4, 4, WIDTH), atol=1e-5)

    readouts[-1].square().sum().backward()
    assert (video.grad.flatten(2).abs().sum(-1) > 0).all()  # every frame
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_the_default_layers_of_twelve_blocks_are_those_before_and_after_every_third():
    config = VideoMAEConfig(image_size=8, patch_size=8, num_frames=2, hidden_size=8, num_attention_heads=1)
    config.intermediate_size = 8
    teacher = Teacher(VideoMAEModel(config), Preparation(8))
    assert teacher.layers == (0, 3, 6, 9, 12)


def test_features_are_of_its_layers(videomae, frames):
    video, teacher = to_float(smaller(frames, 32))[None], Teacher.from_pretrained(videomae)
    every = teacher.features(video)
    teacher.layers = (3, 0)
    chosen = teacher.features(video)
    assert torch.equal(chosen[0], every[3]) and torch.equal(chosen[1], every[0])


def test_the_grid_lies_as_the_clip_does(videomae, vjepa2):
    """A change in one cell's pixels changes that cell's embedding only."""
    teacher = Teacher.from_pretrained(videomae)
    still, changed = torch.zeros(1, 4, 3, SIDE, SIDE), torch.zeros(1, 4, 3, SIDE, SIDE)
    changed[:, 2:, :, 8:16, 24:] = 1.0
    difference = (teacher.features(changed)[0] - teacher.features(still)[0]).abs().sum(-1).view(teacher.grid)
    assert difference.nonzero().tolist() == [[1, 1, 3]]

    encoder = Teacher.from_pretrained(vjepa2, num_frames=4)
    with torch.no_grad():
        encoder.model.encoder.layer = torch.nn.ModuleList()
    difference = (encoder.grid_features(changed) - encoder.grid_features(still)).abs().sum(-1)[0]
    assert difference.nonzero().tolist() == [[1, 1, 3]]


def test_vjepa2_features(vjepa2, frames):
    video = to_float(smaller(frames, 48))[None].requires_grad_()
    teacher = Teacher.from_pretrained(vjepa2, num_frames=4)
    assert (teacher.width, teacher.grid) == (WIDTH, (2, 4, 4))
    features = teacher.grid_features(video)
    with torch.no_grad():
        expected = VJEPA2Model.from_pretrained(vjepa2).eval().get_vision_features(teacher.preparation(video))
    assert not features.requires_grad and torch.allclose(features.flatten(1, 3), expected, atol=1e-5)
    slow = Teacher.from_pretrained(vjepa2)  # 16 frames, more than the checkpoint was trained with
    assert slow.grid_features(video).shape == (1, *slow.grid, WIDTH) == (1, 8, 4, 4, WIDTH)
    with pytest.raises(ValueError, match="multiple of 2, got 5"):
        Teacher.from_pretrained(vjepa2, num_frames=5)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_alignment_teachers_by_their_type(videomae, vjepa2, tmp_path):
    assert isinstance(Teacher.from_pretrained(videomae, num_frames=8).model, VideoMAEModel)
    assert Teacher.from_pretrained(videomae, num_frames=8).grid[0] == 2  # always as many as it was trained with
    teacher = Teacher.from_pretrained(vjepa2, num_frames=8)
    assert isinstance(teacher.model, VJEPA2Model) and teacher.grid[0] == 4
    EvatokConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a vjepa2 or a videomae"):
        Teacher.from_pretrained(tmp_path)


def test_weights_with_the_names_of_the_published_checkpoints(videomae, frames, tmp_path):
    state = load_file(videomae / "model.safetensors")
    older = {name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): state[name] for name in state}
    assert sum(name.startswith("videomae.") and name.endswith("q_bias") for name in older) == 3
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_text((videomae / file).read_text())
    save_file(older, tmp_path / "model.safetensors", {"format": "pt"})
    video = to_float(smaller(frames, 32))[None]
    old, new = (Teacher.from_pretrained(folder).features(video)[-1] for folder in (tmp_path, videomae))
    assert torch.equal(old, new)


def test_weights_that_cannot_be_had(videomae, vjepa2, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-teacher", str(tmp_path / "missing"), str(tmp_path)):
        with pytest.raises(ValueError, match="or name a local folder"):
            Teacher.from_pretrained(name)
    with pytest.raises(ValueError, match="type 'vjepa2'; this teacher must be a videomae"):
        Teacher.from_pretrained(vjepa2, ["videomae"])
    (tmp_path / "config.json").write_text((videomae / "config.json").read_text())
    with pytest.raises(ValueError, match="or name a local folder"):
        Teacher.from_pretrained(tmp_path)
    state = load_file(videomae / "model.safetensors")
    del state["videomae.layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*layernorm\.weight"):
        Teacher.from_pretrained(tmp_path)
