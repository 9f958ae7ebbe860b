"""What transformers tests of every video processor and diffusers of every pipeline, which neither package installs.

From `VideoProcessingTestMixin` (tests/test_video_processing_common.py of transformers):

- to_json_string, to_json_file, from_and_save_pretrained: fields survive text, file and folder
- from_dict_with_kwargs: arguments beside the dictionary replace fields, a number stands for a size
- save_load_with_autovideoprocessor: the Auto class loads the folder
- init_without_params, explicit_none_preserved: no argument is needed, None is kept where it is said
- cast_dtype_device: what comes out is float32 on the CPU and can be cast
- call_pil, call_numpy, call_pytorch, nested_input: one video or a batch of any kind gives the expected shape
- call_sample_frames: `do_sample_frames`, `num_frames` and `fps` with `video_metadata` choose frames
- override_instance_attributes_does_not_affect_other_instances

Left out: `call_numpy_4_channels` (the models take RGB, other input is refused), `can_compile` (a GPU's).

From `PipelineTesterMixin` (tests/pipelines/test_pipelines_common.py of diffusers):

- pipeline_call_signature: the arguments that users of diffusers know are there
- inference_batch_consistent, inference_batch_single_identical: a list of generators, one a video
- dict_tuple_outputs_equivalent: `return_dict=False` gives the same
- components_function: `components` are what the constructor takes
- save_load_local, save_load_optional_components, loading_with_variants: folders, with parts left out, and variants
- to_dtype: `to` changes every part
- num_images_per_prompt, cfg: the number of videos, and guidance, have their effect
- callback_inputs: `callback_on_step_end` is called to the end

Left out: what needs a GPU (float16, offloading), text encoders, latents or schedulers.
"""

from __future__ import annotations

import inspect
import json

import numpy as np
import PIL.Image
import pytest
import torch
from pipeline_samples import with_generator
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.video_utils import VideoMetadata

from evatok_hf import EvatokPipeline, EvatokVideoProcessor

FIELDS = {
    "do_resize": True,
    "size": {"shortest_edge": 20},
    "do_center_crop": True,
    "crop_size": {"height": 18, "width": 18},
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.5, 0.25, 0.5],
    "num_frames": 8,
}
KINDS = ("pil", "np", "pt", "list")


def processor(**fields) -> EvatokVideoProcessor:
    return EvatokVideoProcessor(**{**FIELDS, **fields})


def videos(kind: str, count: int = 3) -> list:
    """Random videos of 8 frames, of different sizes."""
    random = np.random.default_rng(0)
    made = [random.integers(0, 255, (8, *random.integers(30, 80, 2), 3), dtype=np.uint8) for _ in range(count)]
    if kind == "pil":
        return [[PIL.Image.fromarray(frame) for frame in video] for video in made]
    if kind == "pt":
        return [torch.from_numpy(video).permute(0, 3, 1, 2) for video in made]
    return [list(video) for video in made] if kind == "list" else made


# --- processor --------------------------------------------------------------------------------------------------------


def test_fields_survive_text_file_and_folder(tmp_path):
    first = processor()
    assert FIELDS.items() <= json.loads(first.to_json_string()).items()
    first.to_json_file(tmp_path / "processor.json")
    assert EvatokVideoProcessor.from_json_file(tmp_path / "processor.json").to_dict() == first.to_dict()
    [saved] = first.save_pretrained(tmp_path)
    assert json.loads(open(saved).read())["video_processor_type"] == "EvatokVideoProcessor"
    for second in (EvatokVideoProcessor.from_pretrained(tmp_path), AutoVideoProcessor.from_pretrained(tmp_path)):
        assert type(second) is EvatokVideoProcessor and second.to_dict() == first.to_dict()


def test_fields_can_be_replaced_and_left_out(tmp_path):
    made = EvatokVideoProcessor.from_dict(FIELDS)
    assert made.size == {"shortest_edge": 20} and made.crop_size == {"height": 18, "width": 18}
    made = EvatokVideoProcessor.from_dict(FIELDS, size=42, crop_size=84)
    assert made.size == {"shortest_edge": 42} and made.crop_size == {"height": 84, "width": 84}
    for name in ("do_resize", "num_frames"):
        none = processor(**{name: None})
        assert none.to_dict()[name] is None
        none.save_pretrained(tmp_path / name)
        assert getattr(EvatokVideoProcessor.from_pretrained(tmp_path / name), name) is None


def test_instances_share_nothing():
    first, second = EvatokVideoProcessor(), EvatokVideoProcessor()
    first.size["shortest_edge"] = -1
    first.image_mean = [-1, *first.image_mean[1:]]
    assert second.size == {"shortest_edge": 64} and list(second.image_mean) == [0.5] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_every_kind_of_video(kind):
    made, given = processor(), videos(kind)
    assert made(given[0], return_tensors="pt").pixel_values_videos.shape == (1, 8, 3, 18, 18)
    batch = made(given, return_tensors="pt").pixel_values_videos
    assert batch.shape == (3, 8, 3, 18, 18)
    assert torch.equal(batch, made(videos("np"), return_tensors="pt").pixel_values_videos)


def test_the_output_can_be_cast():
    batch = processor()(videos("pt"), return_tensors="pt")
    assert batch.pixel_values_videos.dtype == torch.float32 and batch.pixel_values_videos.device.type == "cpu"
    batch["input_ids"] = torch.ones(3, 2, dtype=torch.int64)
    cast = batch.to("cpu", torch.bfloat16)
    assert cast.pixel_values_videos.dtype == torch.bfloat16 and cast.input_ids.dtype == torch.int64


def test_frames_are_sampled_as_asked():
    made, given = processor(), videos("pt")

    def frames(videos, **options) -> int:
        return made(videos, return_tensors="pt", **options).pixel_values_videos.shape[1]

    made.do_sample_frames = False
    assert frames(given[0], num_frames=3) == frames(given, num_frames=3) == 8
    made.do_sample_frames = True
    assert frames(given[0], num_frames=3) == frames(given, num_frames=3) == 3
    with pytest.raises(ValueError, match="own rate"):
        made.sample_frames(VideoMetadata(total_num_frames=8), fps=3)
    for told in ({"duration": 2.0, "total_num_frames": 8, "fps": 4}, VideoMetadata(total_num_frames=8, fps=4)):
        # the processor's own number of frames holds for a new rate, too
        assert frames(given[0], fps=3, num_frames=None, video_metadata=[[told]]) == 6
        assert frames(given, fps=3, num_frames=None, video_metadata=[[told]] * 3) == 6
    with pytest.raises(ValueError, match="a clip needs 10"):
        frames(given, num_frames=10)


# --- pipeline ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    return with_generator(checkpoint, tmp_path_factory.mktemp("common") / "checkpoint")


@pytest.fixture(scope="module")
def pipe(folder):
    return quiet(EvatokPipeline.from_pretrained(folder))


def quiet(pipe: EvatokPipeline) -> EvatokPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: EvatokPipeline, labels="walk", seeds=0, **options):
    generator = [seeded(seed) for seed in seeds] if isinstance(seeds, list) else seeded(seeds)
    return pipe(labels, generator=generator, max_block_length=8, **options)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_arguments_are_those_that_users_know():
    known = {"class_labels", "num_videos_per_prompt", "guidance_scale", "generator", "output_type", "return_dict"}
    assert known | {"callback_on_step_end"} <= inspect.signature(EvatokPipeline.__call__).parameters.keys()


def test_a_batch_gives_what_single_calls_give(pipe):
    single, batch = draw(pipe).frames, draw(pipe, ["walk"] * 3, [0, 1, 2]).frames
    assert len(batch) == 3 and np.abs(batch[0] - single[0]).max() < 1e-4


def test_a_tuple_holds_what_the_output_holds(pipe):
    output, fields = draw(pipe), draw(pipe, return_dict=False)
    assert (
        isinstance(fields, tuple) and np.array_equal(fields[0], output.frames) and np.array_equal(output[0], fields[0])
    )
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    assert isinstance(pipe.predict(frames, 6, return_dict=False, seeds=[1], max_block_length=8), tuple)


def test_components_are_what_the_constructor_takes(pipe):
    assert pipe.components.keys() == {"tokenizer", "processor", "router", "generator"}
    assert np.array_equal(draw(quiet(EvatokPipeline(**pipe.components))).frames, draw(pipe).frames)


def test_components_come_by_keyword_and_can_be_left_out(pipe, folder, tmp_path):
    without = EvatokPipeline.from_pretrained(folder, tokenizer=pipe.tokenizer, generator=None)
    assert without.generator is None and without.tokenizer is pipe.tokenizer
    without.save_pretrained(tmp_path / "saved")
    assert EvatokPipeline.from_pretrained(tmp_path / "saved", local_files_only=True).generator is None
    replaced = quiet(EvatokPipeline.from_pretrained(folder, generator=pipe.generator))
    assert replaced.generator is pipe.generator and np.array_equal(draw(replaced).frames, draw(pipe).frames)


def test_variants_and_placement(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    for part in ("tokenizer", "generator"):
        weights = tmp_path / "saved" / part / "model.safetensors"
        weights.rename(weights.with_name("model.ema.safetensors"))
    varied = quiet(EvatokPipeline.from_pretrained(tmp_path / "saved", variant="ema", device_map="cpu"))
    assert np.array_equal(draw(varied).frames, draw(pipe).frames)
    with pytest.raises(ValueError):
        EvatokPipeline.from_pretrained(tmp_path / "saved")


def test_every_part_changes_its_dtype(folder):
    pipe = EvatokPipeline.from_pretrained(folder).to(torch.bfloat16)
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(models) == 2 and all(model.dtype == torch.bfloat16 for model in models)


def test_number_of_videos_and_guidance(pipe):
    for number in (1, 2):
        for labels in ("walk", ["walk", "run"]):
            made = draw(pipe, labels, num_videos_per_prompt=number)
            assert len(made.frames) == number * (1 if isinstance(labels, str) else 2)
    assert not np.array_equal(draw(pipe, guidance_scale=1).frames, draw(pipe, guidance_scale=4).frames)


def test_the_callback_hears_every_step(pipe):
    heard = []
    draw(pipe, callback_on_step_end=lambda *told: heard.append(told))
    who, steps, shares, tensors = zip(*heard, strict=True)
    assert set(map(id, who)) == {id(pipe)} and list(steps) == list(range(len(heard))) and len(heard) > 30
    assert list(shares) == sorted(shares) and 0 <= shares[0] and shares[-1] == 1 and not any(tensors)
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    heard.clear()
    pipe.predict(frames, 24, seeds=[0], max_block_length=8, callback_on_step_end=lambda *told: heard.append(told))
    assert heard[-1][2] == 1 and [told[1] for told in heard] == list(range(len(heard)))
