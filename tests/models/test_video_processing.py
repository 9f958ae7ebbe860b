"""The video processor: raw frames to model input and back."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata
from video_samples import moving_frames

from evatok_hf.models.video_processing_evatok import EvatokVideoProcessor, nearest_frame_indices
from evatok_hf.video.read import nearest_frame_indices as io_rule


def pixels(processor: EvatokVideoProcessor, videos: object, **kwargs: object) -> torch.Tensor:
    return processor(videos, return_tensors="pt", **kwargs).pixel_values_videos


def processor_input(frames: torch.Tensor) -> torch.Tensor:
    return (frames.permute(0, 1, 4, 2, 3) / 255 - 0.5) / 0.5


def one_line(error: pytest.ExceptionInfo[BaseException]) -> None:
    assert "\n" not in str(error.value)


def test_shape_type_range_and_values() -> None:
    processor = EvatokVideoProcessor()
    video = np.zeros((16, 80, 100, 3), dtype=np.uint8)
    video[..., 0], video[..., 1] = 255, 51
    out = pixels(processor, video)
    assert out.shape == (1, 16, 3, 64, 64) and out.dtype == torch.float32 and out.is_contiguous()
    for channel, value in enumerate((1.0, -0.6, -1.0)):
        torch.testing.assert_close(out[:, :, channel], torch.full((1, 16, 64, 64), value))
    noise = np.random.default_rng(0).integers(0, 256, (16, 33, 90, 3), dtype=np.uint8)
    out = pixels(processor, noise)
    assert out.min() >= -1 and out.max() <= 1


def test_round_trip_of_video_that_has_the_size() -> None:
    processor = EvatokVideoProcessor()
    video = np.random.default_rng(0).integers(0, 256, (2, 16, 64, 64, 3), dtype=np.uint8)
    back = processor.postprocess(pixels(processor, list(video)))
    assert back.dtype == torch.uint8 and back.shape == (2, 16, 64, 64, 3)
    np.testing.assert_array_equal(back.numpy(), video)


def test_postprocess_rounds_clamps_and_refuses() -> None:
    processor = EvatokVideoProcessor()
    values = torch.tensor([-3.0, -1.0, -0.9961, 0.001, 1.0, 7.0]).view(1, 6, 1, 1, 1).expand(1, 6, 3, 2, 2)
    assert processor.postprocess(values)[0, :, 0, 0, 0].tolist() == [0, 0, 0, 128, 255, 255]
    assert processor.postprocess(values.to(torch.bfloat16)).dtype == torch.uint8
    for bad in (torch.zeros(6, 3, 2, 2), torch.zeros(1, 6, 2, 2, 3), torch.zeros(1, 6, 3, 2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="give a float") as error:
            processor.postprocess(bad)
        one_line(error)
    with pytest.raises(ValueError, match="NaN"):
        processor.postprocess(torch.full((1, 1, 3, 2, 2), float("nan")))


def test_every_kind_of_input_gives_the_same() -> None:
    processor = EvatokVideoProcessor()
    video = moving_frames(16, 72, 90)
    expected = pixels(processor, video)
    channels_first = np.ascontiguousarray(video.transpose(0, 3, 1, 2))
    frozen = video.copy()
    frozen.flags.writeable = False
    for same in (
        torch.from_numpy(video),
        channels_first,
        torch.from_numpy(channels_first),
        [video],
        [Image.fromarray(frame) for frame in video],
        [[Image.fromarray(frame) for frame in video]],
        frozen,
        video[::-1][::-1],
        (video,),
        list(video),
        [[video]],
        video[None],
    ):
        assert torch.equal(pixels(processor, same), expected)
    for real in (video.astype(np.float32) / 255, video / 255, torch.from_numpy(video).float() / 255):
        torch.testing.assert_close(pixels(processor, real), expected, atol=2e-6, rtol=0)
    half = pixels(processor, torch.from_numpy(video).half() / 255)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=2e-3, rtol=0)


def test_resize_and_crop_follow_the_reference() -> None:
    """PIL is the reference: its bilinear filter is antialiased, and rounds to whole values."""
    processor = EvatokVideoProcessor()
    for height, width in ((120, 200), (200, 120), (40, 50), (97, 131)):
        frame = moving_frames(1, height, width)[0]
        short = min(height, width)
        resized = Image.fromarray(frame).resize((64 * width // short, 64 * height // short), Image.Resampling.BILINEAR)
        left, top = round((resized.width - 64) / 2), round((resized.height - 64) / 2)
        reference = np.asarray(resized)[top : top + 64, left : left + 64].astype(int)
        out = processor.postprocess(pixels(processor, frame[None], num_frames=None))[0, 0].numpy().astype(int)
        assert np.abs(out - reference).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (2, 3001), (1, 64), (700, 64), (64, 64), (4000, 5)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    processor = EvatokVideoProcessor(num_frames=4)
    video = np.full((4, *size, 3), 255, dtype=np.uint8)
    assert torch.equal(pixels(processor, video), torch.ones(1, 4, 3, 64, 64))


def test_thin_videos_are_cropped_in_the_middle() -> None:
    """The cut that spares memory gives what resizing the whole gives."""
    processor = EvatokVideoProcessor(num_frames=1, size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    video = np.random.default_rng(0).integers(0, 256, (1, 4, 401, 3), dtype=np.uint8)
    whole = pixels(processor, video, do_center_crop=False)
    left = round((whole.shape[-1] - 8) / 2)
    torch.testing.assert_close(pixels(processor, video), whole[..., left : left + 8], atol=0.02, rtol=0)
    turned = video.transpose(0, 2, 1, 3)
    torch.testing.assert_close(pixels(processor, turned).mT, pixels(processor, video), atol=1e-6, rtol=0)


def test_chunks_give_what_the_whole_gives() -> None:
    processor = EvatokVideoProcessor(do_sample_frames=False)
    video = np.random.default_rng(0).integers(0, 256, (23, 70, 110, 3), dtype=np.uint8)
    whole = pixels(processor, video)
    assert whole.shape[1] == 23
    for step in (1, 4, 16):
        parts = [pixels(processor, video[i : i + step]) for i in range(0, 23, step)]
        assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(pixels(processor, video), whole)


def test_frames_are_chosen_from_the_start_or_where_told() -> None:
    processor = EvatokVideoProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    video = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 8, 8, 3))

    def chosen(**kwargs: object) -> list[int]:
        return processor.postprocess(pixels(processor, video, **kwargs))[0, :, 0, 0, 0].tolist()

    assert chosen() == list(range(16))
    assert chosen(num_frames=4) == [0, 1, 2, 3]
    assert chosen(num_frames=None) == list(range(40))
    assert chosen(do_sample_frames=False) == list(range(40))
    assert chosen(num_frames=42, do_pad=True) == [*range(40), 39, 39]
    assert chosen(video_metadata={"fps": 30}) == list(range(16))  # no rate to sample to
    for kwargs, message in [
        ({"num_frames": 41}, "has 40 frames and a clip needs 41"),
        ({"num_frames": 0}, "num_frames must be a whole number from 1"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            chosen(**kwargs)
        one_line(error)


def test_sampling_to_a_rate() -> None:
    processor = EvatokVideoProcessor(fps=8, num_frames=6, size={"shortest_edge": 8}, crop_size=8)
    video = np.broadcast_to(np.arange(60, dtype=np.uint8)[:, None, None, None], (60, 8, 8, 3))
    rates = [{"fps": 30}, VideoMetadata(total_num_frames=60, fps=16)]
    out = processor.postprocess(pixels(processor, [video, video], video_metadata=rates))
    assert out[0, :, 0, 0, 0].tolist() == [0, 4, 8, 11, 15, 19]
    assert out[1, :, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10]
    told = EvatokVideoProcessor(num_frames=6, size={"shortest_edge": 8}, crop_size=8)
    assert torch.equal(pixels(told, [video] * 2, fps=8, video_metadata=[[rates[0]], [rates[1]]]), processor_input(out))
    made = processor(video, video_metadata=rates[0], return_metadata=True)
    assert made.video_metadata[0].frames_indices.tolist() == [0, 4, 8, 11, 15, 19]
    for kwargs, message in [
        ({}, "needs the video's own rate"),
        ({"video_metadata": {"fps": 0}}, "fps is 0"),
        ({"video_metadata": [{"fps": 30}] * 2}, "2 video_metadata for 1"),
        ({"video_metadata": {"rate": 30}}, "video_metadata has no rate"),
        ({"fps": [30, 30]}, "fps must be a number"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            pixels(processor, video, **kwargs)
        one_line(error)


@pytest.mark.parametrize("rates", [(30, 8), (29.97, 8), (25, 50), (24, 24), (10, 3), (23.976, 29.97), (60, 7.5)])
@pytest.mark.parametrize("count", [1, 2, 100])
def test_the_rule_is_that_of_the_reader(rates: tuple[float, float], count: int) -> None:
    expected = []
    for index in io_rule(*rates):
        if index >= count:
            break
        expected.append(index)
    assert nearest_frame_indices(count, *rates) == expected
    assert expected[0] == 0


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((64, 64, 3), np.uint8), "3 axes and needs 4"),
        (np.zeros((1, 2, 16, 64, 64, 3), np.uint8), "6 axes and needs 4"),
        (np.zeros((16, 64, 64, 1), np.uint8), "no axis of 3 colours"),
        (np.zeros((16, 3, 64, 3), np.uint8), "input_data_format"),
        (np.zeros((0, 64, 64, 3), np.uint8), "is empty"),
        (np.zeros((16, 0, 64, 3), np.uint8), "is empty"),
        (np.zeros((16, 64, 64, 3), np.int64), "no known range"),
        (np.full((16, 64, 64, 3), 255.0), r"\[0, 1\]"),
        (np.full((16, 64, 64, 3), -0.5), r"\[0, 1\]"),
        (np.full((16, 64, 64, 3), np.nan), r"\[0, 1\]"),
        ([], "empty list"),
        ([[]], "empty list"),
        ([np.zeros((64, 64, 3), np.uint8), None], "arrays of 3 axes"),
        ([np.zeros((16, 64, 64, 3), np.uint8), None], "NoneType"),
        (None, "NoneType"),
        ([None], "NoneType"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], "differ in size"),
        (np.zeros((5, 64, 64, 3), np.uint8), "has 5 frames"),
    ],
)
def test_bad_videos_are_refused(video: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        EvatokVideoProcessor()(video, return_tensors="pt")
    one_line(error)


def test_bad_options_are_refused() -> None:
    processor, video = EvatokVideoProcessor(), moving_frames(16, 64, 80)
    for kwargs, message in [
        ({"frames": 3}, "unknown option frames"),
        ({"return_tensors": "tf"}, "TensorType"),
        ({"start": 3}, "unknown option start"),
        ({"resample": 1}, "resample must be 0, 2 or 3"),
        ({"do_resize": False, "crop_size": {"height": 99, "width": 99}}, "smaller than the crop"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be a number, or a list of three"),
        ({"input_data_format": "NCHW"}, "channels_last"),
        ({"input_data_format": "channels_first"}, "no axis of 3 colours"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            processor(video, **{"return_tensors": "pt", **kwargs})
        one_line(error)


def test_an_open_shape_can_be_told() -> None:
    processor = EvatokVideoProcessor()
    video = np.random.default_rng(0).integers(0, 256, (16, 3, 9, 3), dtype=np.uint8)
    last = pixels(processor, video, input_data_format="channels_last")
    first = pixels(processor, video, input_data_format="channels_first")
    assert last.shape == first.shape and not torch.equal(last, first)
    assert torch.equal(first, pixels(processor, video.transpose(0, 2, 3, 1), input_data_format="channels_last"))


def test_videos_of_different_sizes() -> None:
    processor = EvatokVideoProcessor()
    videos = [moving_frames(16, 64, 80), moving_frames(20, 90, 70)]
    out = pixels(processor, videos)
    assert out.shape == (2, 16, 3, 64, 64)
    assert torch.equal(out[1:], pixels(processor, videos[1]))
    assert processor(videos, return_tensors="np").pixel_values_videos.shape == (2, 16, 3, 64, 64)
    uncut = processor(videos, do_center_crop=False).pixel_values_videos
    assert [tuple(video.shape) for video in uncut] == [(16, 3, 64, 80), (16, 3, 82, 64)]
    with pytest.raises(ValueError, match="do not stack"):
        pixels(processor, videos, do_center_crop=False)


def test_each_step_can_be_left_out() -> None:
    processor, video = EvatokVideoProcessor(), moving_frames(16, 64, 64)
    plain = torch.from_numpy(video).permute(0, 3, 1, 2)[None].float()
    assert torch.equal(pixels(processor, video, do_rescale=False, do_normalize=False), plain)
    torch.testing.assert_close(pixels(processor, video, do_normalize=False), plain / 255)
    exact = pixels(processor, video, size={"height": 20, "width": 30}, do_center_crop=False)
    assert exact.shape == (1, 16, 3, 20, 30)
    bicubic = pixels(processor, moving_frames(16, 90, 90), resample=3)
    assert bicubic.min() >= -1 and bicubic.max() <= 1
    assert pixels(processor, video, resample=0, size={"shortest_edge": 128}).shape == (1, 16, 3, 64, 64)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 24}, "fps": 12.5, "num_frames": 8},
        {"num_frames": None, "do_pad": True, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "do_normalize": True},
        {"do_sample_frames": False, "do_center_crop": False},
    ],
)
def test_saving_and_loading(tmp_path: Path, fields: dict[str, object]) -> None:
    processor = EvatokVideoProcessor(**fields)
    processor.save_pretrained(tmp_path)
    loaded = EvatokVideoProcessor.from_pretrained(tmp_path)
    ours, theirs = processor.to_dict(), loaded.to_dict()
    ours.pop("auto_map", None), theirs.pop("auto_map", None)
    assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))
    for name in processor.valid_kwargs.__annotations__:
        assert getattr(loaded, name) == getattr(processor, name)
    video = moving_frames(20, 80, 60)
    options = {"video_metadata": {"fps": 25}, "do_pad": True}
    assert torch.equal(pixels(loaded, video, **options), pixels(processor, video, **options))
    assert EvatokVideoProcessor.from_pretrained(tmp_path, num_frames=3).num_frames == 3


def test_the_auto_class_loads_the_copied_code(tmp_path: Path) -> None:
    """From a folder alone, in a process that cannot import the package."""
    processor = EvatokVideoProcessor(num_frames=5, size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    folder = tmp_path / "model"
    processor.save_pretrained(folder)
    assert (folder / "video_processing_evatok.py").is_file()
    code = (
        "import importlib.util, sys, numpy as np\n"
        "sys.path = [p for p in sys.path if not p.rstrip('/').endswith('src')]\n"
        "sys.modules['evatok_hf'] = None\n"
        # the auto module itself: without torchvision `transformers.AutoVideoProcessor` is a placeholder
        "from transformers.models.auto.video_processing_auto import AutoVideoProcessor\n"
        f"processor = AutoVideoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "video = np.arange(5 * 20 * 30 * 3, dtype=np.uint8).reshape(5, 20, 30, 3)\n"
        "out = processor(video, return_tensors='np')['pixel_values_videos']\n"
        "print(type(processor).__module__.split('.')[0], out.shape, round(float(np.abs(out).sum()), 2))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    video = np.arange(5 * 20 * 30 * 3, dtype=np.uint8).reshape(5, 20, 30, 3)
    total = float(pixels(processor, video).abs().sum())
    module, rest = done.stdout.strip().split(" ", 1)
    assert module == "transformers_modules"
    assert rest.startswith("(1, 5, 3, 16, 16)") and float(rest.split()[-1]) == pytest.approx(total, abs=0.02)


def test_nothing_here_imports_torchvision() -> None:
    source = Path(importlib.import_module("evatok_hf.models.video_processing_evatok").__file__).read_text()
    assert "import torchvision" not in source and "from torchvision" not in source
    code = (
        "import sys\n"
        "sys.modules['torchvision'] = None\n"
        f"sys.path.insert(0, {str(Path(importlib.import_module('evatok_hf.video.read').__file__).parents[2])!r})\n"
        "import numpy as np\n"
        "from evatok_hf.models.video_processing_evatok import EvatokVideoProcessor\n"
        "out = EvatokVideoProcessor()(np.zeros((16, 70, 90, 3), np.uint8), return_tensors='pt')\n"
        "print(tuple(out.pixel_values_videos.shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 16, 3, 64, 64)", done.stderr
