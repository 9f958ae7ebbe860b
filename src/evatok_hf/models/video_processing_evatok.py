"""Video processor of EVATok: raw frames -> `pixel_values_videos`, and back to uint8 frames.

Also what frame prediction does to pixels: the clip that a generator is shown of which only the first frames are known,
and mends of its answer.

Only torch operations are used, so nothing here needs torchvision. The base class is imported from its own module
because `transformers.BaseVideoProcessor` is a placeholder wherever torchvision is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import is_pil_image
from transformers.video_processing_utils import BaseVideoProcessor

from .base_evatok import OwnCard
from .files_evatok import (
    Rule,
    check,
    checked,
    flag,
    list_of,
    named,
    number,
    optional,
    read_json,
    refuse_hidden,
    ruled,
    whole,
)

# PIL's resampling codes, as transformers writes them to JSON -> modes of torch's interpolate.
_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
# Beyond this ratio of the sides a video is cut to its middle before it is resized (see `_cut_thin`).
_THIN = 8
# Chosen on 114 training clips of game video that evatok-tiny predicted from 5 frames: with them the frames 4, 8 and 11
# after the last known one are nearer to the truth than copies of it, by PSNR and by perceptual distance.
STILL_SIGMA = 0.25
HOLD, HOLD_HALF_LIFE = 0.8, 16


_SIDE = whole(1, 4096)


def _is_size(value: Any, *shapes: set[str]) -> bool:
    if value is None or _SIDE.allows(value):
        return True
    sides = dict(value) if isinstance(value, Mapping) or hasattr(value, "keys") else {}
    given = {name: side for name, side in sides.items() if side is not None}
    return set(given) in shapes and all(map(_SIDE.allows, given.values()))


_CROP = Rule(f"a table with height and width, each {_SIDE.words}", lambda value: _is_size(value, {"height", "width"}))
_SIZE = Rule(
    f"a table with height and width or with shortest_edge, each {_SIDE.words}",
    lambda value: _is_size(value, {"height", "width"}, {"shortest_edge"}),
)
_CHANNELS = Rule(
    "a number, or a list of three, one a colour",
    lambda value: optional(number(-1e6, 1e6)).allows(value) or list_of(number(-1e6, 1e6), 3, least=3).allows(value),
)


@checked
@dataclass
class _Fields:
    """What a file may say of a processor; nothing is the default."""

    size: Any = ruled(_SIZE, None)
    crop_size: Any = ruled(_CROP, None)
    resample: int | None = ruled(Rule("0, 2 or 3", lambda value: value in (None, *_MODES)), None)
    do_resize: bool | None = ruled(optional(flag()), None)
    do_center_crop: bool | None = ruled(optional(flag()), None)
    do_rescale: bool | None = ruled(optional(flag()), None)
    do_normalize: bool | None = ruled(optional(flag()), None)
    do_sample_frames: bool | None = ruled(optional(flag()), None)
    do_pad: bool | None = ruled(optional(flag()), None)
    rescale_factor: int | float | None = ruled(optional(number(0, 1e6, above=True)), None)
    image_mean: Any = ruled(_CHANNELS, None)
    image_std: Any = ruled(_CHANNELS, None)
    num_frames: int | None = ruled(optional(whole(1, 8192)), None)
    fps: int | float | None = ruled(optional(number(0, 1_000_000, above=True)), None)


class EvatokVideoProcessor(OwnCard, BaseVideoProcessor):
    r"""
    Samples, resizes, centre-crops and normalises videos. Every frame is processed on its own, so a video may be given
    whole or in chunks with the same result.

    Args:
        size (`dict`, defaults to `{"shortest_edge": 64}`): the shortest edge after resizing, the aspect is kept; or
            `{"height": .., "width": ..}` for an exact size.
        crop_size (`dict`, defaults to `{"height": 64, "width": 64}`): the centre crop.
        resample (`int`, defaults to 2): PIL's code of the filter: 2 bilinear, 3 bicubic (both with antialiasing),
            0 nearest. Bilinear, then a centre crop, is the protocol of LARP, which the paper's tables follow.
        do_resize, do_center_crop, do_rescale, do_normalize, do_sample_frames (`bool`, default to `True`): the steps.
        rescale_factor (`float`, defaults to 1/255): for uint8 input; float input is in [0, 1] already.
        image_mean, image_std (`list[float]`, default to `[0.5, 0.5, 0.5]`): [0, 1] -> [-1, 1].
        num_frames (`int` or `None`, defaults to 16): frames of a clip; `None` keeps all.
        fps (`float` or `None`): the rate that a video is sampled to; `None` (default) keeps its own rate.
        do_pad (`bool`, defaults to `False`): repeat the last frame of a video shorter than `num_frames` instead of
            refusing it.
    """

    model_input_names = ["pixel_values_videos"]
    resample = 2
    size = {"shortest_edge": 64}
    default_to_square = False
    crop_size = {"height": 64, "width": 64}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_sample_frames = True
    num_frames = 16
    fps = None
    do_pad = False

    _STEPS = (
        "do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean image_std "
        "do_sample_frames num_frames do_pad"
    ).split()

    def __init__(self, **kwargs: Any) -> None:
        refuse_hidden(kwargs, type(self), self.valid_kwargs.__annotations__)
        check(_Fields, kwargs)
        super().__init__(**kwargs)
        if kwargs.get("num_frames", 0) is None:  # the base class reads None as "not given"
            self.num_frames = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' method. Raises ValueError for values that cannot be, naming file and field."""
        subfolder = kwargs.get("subfolder") or ""
        place = os.path.join(pretrained_model_name_or_path, subfolder, "video_preprocessor_config.json")
        with named(place):
            if os.path.isfile(place):
                read_json(place)
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def preprocess(
        self,
        videos: Any,
        fps: float | Sequence[float] | None = None,
        start: int = 0,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn videos into the model's input; calling the processor does the same.

        Args:
            videos: one video or a list of videos. A video is a uint8 or float ([0, 1]) numpy array or torch tensor,
                (F, H, W, 3) or (F, 3, H, W), or a list of PIL images.
            fps: the frame rate that the videos *have*, one number or one a video; needed where the processor's own
                `fps`, the rate to sample *to*, is set.
            start: first frame of the clip, counted after the change of rate; the clip is consecutive from there.
            return_tensors: "pt" or "np" for one stacked array, `None` for a list with a tensor a video.
            input_data_format: "channels_last" or "channels_first", needed only where the shape leaves it open.
            device: where to compute and leave the result.
            kwargs: any field of the processor but `fps`, for this call alone.

        Returns:
            `BatchFeature` with `pixel_values_videos` (B, F, 3, H, W), float32 in [-1, 1] with the default fields.

        Raises:
            ValueError: for a shape, type or value that is not as above, a video shorter than `num_frames` (unless
                `do_pad`), a missing rate, videos that come out in different shapes, or an unknown option.
        """
        if unknown := sorted(set(kwargs) - set(self._STEPS)):
            raise ValueError(f"unknown option {', '.join(unknown)}: choose from {', '.join(self._STEPS)}")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors is {return_tensors!r}: give 'pt', 'np' or None")
        options = {name: getattr(self, name) if kwargs.get(name) is None else kwargs[name] for name in self._STEPS}
        for name in ("num_frames", "crop_size", "size"):  # None is a value of its own for these
            options[name] = kwargs.get(name, getattr(self, name))
        batch = _as_list(videos)
        rates = list(fps) if isinstance(fps, Sequence | np.ndarray | torch.Tensor) else [fps] * len(batch)
        if len(rates) != len(batch):
            raise ValueError(f"{len(rates)} values of fps for {len(batch)} videos: give one number, or one a video")

        done = []
        for video, rate in zip(batch, rates, strict=True):
            frames = frames_tensor(video, input_data_format)  # (F, 3, H, W)
            if options["do_sample_frames"]:
                frames = self._sample(frames, rate, start, options["num_frames"], options["do_pad"])
            done.append(self._transform(frames.to(device) if device is not None else frames, options))
        if return_tensors is None:
            return BatchFeature(data={"pixel_values_videos": done})
        if len({video.shape for video in done}) > 1:
            shapes = ", ".join(str(tuple(video.shape)) for video in done)
            raise ValueError(f"videos of different shapes {shapes} do not stack: crop them, or set return_tensors=None")
        return BatchFeature(data={"pixel_values_videos": torch.stack(done)}, tensor_type=return_tensors)

    def postprocess(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Undo normalising and rescaling: (B, F, 3, H, W) float -> (B, F, H, W, 3) uint8, rounded and clamped.

        Raises:
            ValueError: if the input is not a floating (B, F, 3, H, W) tensor, or holds a value that is not finite.
        """
        video = torch.as_tensor(pixel_values_videos)
        if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point():
            raise ValueError(
                f"postprocess got {video.dtype} {tuple(video.shape)}: give a float (B, F, 3, H, W); "
                "for one video add the batch with video[None]"
            )
        video = video.detach().float()
        if not torch.isfinite(video).all():
            raise ValueError("postprocess got NaN or infinity: the model's output is broken, check its weights")
        if self.do_normalize:
            video = video * _channels(self.image_std, video) + _channels(self.image_mean, video)
        if self.do_rescale:
            video = video / self.rescale_factor
        return video.round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()  # (B, F, H, W, 3)

    def _sample(
        self, frames: torch.Tensor, rate: float | None, start: int, num_frames: int | None, do_pad: bool
    ) -> torch.Tensor:
        """Change the rate to `self.fps`, then take `num_frames` consecutive frames from `start` on."""
        if self.fps is not None:
            if rate is None:
                raise ValueError(
                    f"the processor samples to {self.fps:g} fps and needs the video's own rate: pass fps=, "
                    "or set the processor's fps to None to keep every frame"
                )
            frames = frames[nearest_frame_indices(len(frames), float(rate), float(self.fps))]
        if not isinstance(start, int) or not 0 <= start < len(frames):
            raise ValueError(f"start is {start!r}: the video has {len(frames)} frames, give 0 to {len(frames) - 1}")
        frames = frames[start:]
        if num_frames is None:
            return frames
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}: give 1 or more, or None for every frame")
        missing = num_frames - len(frames)
        if missing <= 0:
            return frames[:num_frames]
        if not do_pad:
            raise ValueError(
                f"the video has {len(frames)} frames and a clip needs {num_frames}: give a longer video, "
                "or do_pad=True to repeat its last frame"
            )
        return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])

    @staticmethod
    def _transform(frames: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """(F, 3, H, W) uint8 or float in [0, 1] -> (F, 3, H', W') float32."""
        was_uint8 = frames.dtype == torch.uint8
        crop = _height_width(options["crop_size"], "crop_size") if options["do_center_crop"] else None
        if options["do_resize"]:
            size = options["size"]
            size = dict(size) if hasattr(size, "keys") else get_size_dict(size, default_to_square=False)
            edge = size.get("shortest_edge")
            if edge is not None and crop is not None:
                frames = _cut_thin(frames, edge, crop)
            frames = frames.to(torch.float32)  # uint8 would be rounded once more by the resize
            height, width = frames.shape[-2:]
            if edge is None:
                target = _height_width(size, "size")
            else:  # the long side is cut down to a whole pixel, as torchvision's Resize does
                short = min(height, width)
                target = (edge, edge * width // short) if height <= width else (edge * height // short, edge)
            frames = _resize(frames, target, options["resample"], 255.0 if was_uint8 else 1.0)
        frames = frames.to(torch.float32)
        if crop is not None:
            height, width = frames.shape[-2:]
            if height < crop[0] or width < crop[1]:
                raise ValueError(
                    f"frames of {height}x{width} are smaller than the crop {crop[0]}x{crop[1]}: "
                    "turn do_resize on with a size of at least the crop, or make the crop smaller"
                )
            top, left = round((height - crop[0]) / 2), round((width - crop[1]) / 2)
            frames = frames[..., top : top + crop[0], left : left + crop[1]]
        if options["do_rescale"] and was_uint8:
            frames = frames * options["rescale_factor"]
        if options["do_normalize"]:
            frames = (frames - _channels(options["image_mean"], frames)) / _channels(options["image_std"], frames)
        return frames.contiguous()


def nearest_frame_indices(num_frames: int, source_fps: float, target_fps: float) -> list[int]:
    """Frames of a video at `source_fps` that make it a video at `target_fps`: output k shows the frame nearest to its
    time, floor(k * source_fps / target_fps + 1/2), for as long as there is one. The same rule as
    `VideoReader.iter_chunks`, written again here because this file travels alone with a checkpoint.

    Raises:
        ValueError: if a rate is not a positive, finite number.
    """
    for name, rate in (("fps", source_fps), ("the processor's fps", target_fps)):
        if not (np.isfinite(rate) and rate > 0):
            raise ValueError(f"{name} is {rate}: give a positive number of frames a second")
    ratio = source_fps / target_fps
    count = int(np.ceil((num_frames - 0.5) / ratio)) + 1
    indices = np.floor(np.arange(count) * ratio + 0.5).astype(np.int64)
    return indices[indices < num_frames].tolist()


def _as_list(videos: Any) -> list[Any]:
    """One video or many -> a list of videos."""
    if isinstance(videos, np.ndarray | torch.Tensor):
        return [videos]
    if isinstance(videos, Sequence) and not isinstance(videos, str | bytes):
        if len(videos) == 0:
            raise ValueError("got an empty list: give at least one video with at least one frame")
        return [videos] if is_pil_image(videos[0]) else list(videos)
    raise ValueError(
        f"a video cannot be a {type(videos).__name__}: decode files first (evatok_hf.video.read.read_video) and give "
        "uint8 frames (F, H, W, 3)"
    )


def frames_tensor(video: Any, data_format: str | None = None) -> torch.Tensor:
    """One video of any accepted kind -> (F, 3, H, W) tensor, uint8 or float in [0, 1]."""
    if isinstance(video, Sequence) and not isinstance(video, str | bytes):
        if video and all(is_pil_image(frame) for frame in video):
            data_format = "channels_last"
            video = [np.asarray(image.convert("RGB")) for image in video]
        if not video or not all(getattr(frame, "ndim", None) == 3 for frame in video):
            raise ValueError("a list of frames must hold PIL images, or arrays of 3 axes each: give at least one")
        if len({frame.shape for frame in video}) > 1:
            raise ValueError("the frames of one video differ in size: resize them to one size first")
        video = torch.stack(list(video)) if isinstance(video[0], torch.Tensor) else np.stack(video)
    if isinstance(video, np.ndarray):
        # negative strides and read-only buffers are common in frames from decoders, torch takes neither quietly
        video = torch.from_numpy(video if video.flags.c_contiguous and video.flags.writeable else video.copy())
    if not isinstance(video, torch.Tensor):
        raise ValueError(f"a video cannot be a {type(video).__name__}: give uint8 frames (F, H, W, 3)")
    shape = tuple(video.shape)
    if video.ndim != 4:
        raise ValueError(
            f"a video of shape {shape} has {video.ndim} axes and needs 4, (F, H, W, 3) or (F, 3, H, W): "
            "add an axis to a single frame, give several videos as a list"
        )
    if 0 in shape:
        raise ValueError(f"a video of shape {shape} is empty: give at least one frame of at least one pixel")
    last, first = shape[3] == 3, shape[1] == 3
    if data_format not in (None, "channels_last", "channels_first"):
        raise ValueError(f"input_data_format is {data_format!r}: give 'channels_last' or 'channels_first'")
    if data_format is None and last and first:
        raise ValueError(
            f"a video of shape {shape} may be (F, H, W, 3) or (F, 3, H, W): "
            "say input_data_format='channels_last' or 'channels_first'"
        )
    channels_last = last if data_format is None else data_format == "channels_last"
    if not (last if channels_last else first):
        raise ValueError(f"a video of shape {shape} has no axis of 3 colours: give RGB, (F, H, W, 3) or (F, 3, H, W)")
    if channels_last:
        video = video.permute(0, 3, 1, 2)
    if video.dtype == torch.uint8:
        return video
    if not video.is_floating_point():
        raise ValueError(f"a video of {video.dtype} has no known range: give uint8 (0 to 255) or float (0 to 1)")
    video = video.detach().to(torch.float32)
    low, high = video.aminmax()
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(
            f"a float video must lie in [0, 1], this one spans [{low:.4g}, {high:.4g}]: "
            "divide by 255, or convert it to uint8"
        )
    return video


def _resize(frames: torch.Tensor, target: tuple[int, int], resample: int, top: float) -> torch.Tensor:
    """(F, 3, H, W) float -> (F, 3, *target), within [0, top]."""
    mode = _MODES.get(2 if resample is None else int(resample))
    if mode is None:
        raise ValueError(f"resample is {resample}: give 0 (nearest), 2 (bilinear) or 3 (bicubic)")
    if tuple(frames.shape[-2:]) == target:
        return frames
    if mode == "nearest-exact":
        return F.interpolate(frames, size=target, mode=mode)
    frames = F.interpolate(frames, size=target, mode=mode, antialias=True, align_corners=False)
    return frames.clamp(0, top) if mode == "bicubic" else frames


def _cut_thin(frames: torch.Tensor, edge: int, crop: tuple[int, int]) -> torch.Tensor:
    """Drop what the centre crop would throw away anyhow from a very thin video: one of 1 x 1000 pixels would otherwise
    be resized to 64 x 64000. Whole multiples of the short side go from both ends, which keeps the pixel grid in place.
    """
    height, width = frames.shape[-2:]
    short, long = min(height, width), max(height, width)
    keep = max(_THIN, 2 * -(-max(crop) // edge)) * short
    drop = (long - keep) // 2 // short * short
    if long <= keep or drop == 0:
        return frames
    return frames[..., drop:-drop] if width == long else frames[..., drop:-drop, :]


def _height_width(size: Any, name: str) -> tuple[int, int]:
    size = dict(size) if hasattr(size, "keys") else get_size_dict(size, param_name=name)
    height, width = size.get("height"), size.get("width")
    if not height or not width:
        raise ValueError(f"{name} is {size}: give a positive height and width")
    return int(height), int(width)


def _channels(values: float | Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A number, or one a colour -> (3, 1, 1) beside `like`."""
    values = [float(values)] * 3 if isinstance(values, int | float) else [float(value) for value in values]
    if len(values) != 3:
        raise ValueError(f"image_mean and image_std need 3 values, one a colour, got {values}")
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)


EvatokVideoProcessor.register_for_auto_class("AutoVideoProcessor")


# --- frame prediction -------------------------------------------------------------------------------------------------


def hold_last_frame(video: torch.Tensor, known_frames: int) -> torch.Tensor:
    """The condition of frame prediction: the clip stands still from its last known frame on, as in LARP.

    Args:
        video: (B, F, C, H, W).
        known_frames: how many frames are known, from 1 to F - 1 (5 of 16 on K600).

    Returns:
        (B, F, C, H, W); frames from number `known_frames` on are frame `known_frames - 1`.

    Raises:
        ValueError: a number of known frames outside that range.
    """
    check_known_frames(known_frames, video.shape[1])
    frames = torch.arange(video.shape[1], device=video.device).clamp_max(known_frames - 1)
    return video[:, frames]


def check_known_frames(known_frames: int, num_frames: int) -> None:
    """Raises ValueError unless some frames of a clip of `num_frames` are known and some are not."""
    if not 1 <= known_frames < num_frames:
        raise ValueError(
            f"known_frames must be from 1 to {num_frames - 1} of the {num_frames} frames of a clip, got {known_frames}."
        )


def held_clip(known: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Known frames (B, n, C, H, W) as the clip (B, num_frames, C, H, W) that `hold_last_frame` makes of a whole one.

    Raises:
        ValueError: no known frame, or so many that nothing is left to predict.
    """
    check_known_frames(known.shape[1], num_frames)
    return known[:, torch.arange(num_frames, device=known.device).clamp_max(known.shape[1] - 1)]


def keep_still(
    decoded: torch.Tensor, frame: torch.Tensor, index: int, sigma: float = STILL_SIGMA, blur: float | None = None
) -> torch.Tensor:
    """Puts a known frame as it truly is in place of later decoded ones where these did not change (our choice).

    With D the decoded clip, n the known frame's place and x its true picture, frame t becomes w_t x + (1 - w_t) D_t
    with w_t = exp(-c_t / sigma) and c_t the mean over channels of |D_s - D_n|, blurred, at its largest of n < s <= t.
    So what stands still keeps its sharpness and does not flicker, and what has once moved is the decoder's.

    Args:
        decoded: (B, F, C, H, W) in [-1, 1].
        frame: (B, C, H, W), frame `index` as it truly is.
        index: n, from 0 to F - 1.
        sigma: change at which a weight has fallen to 1/e, in units of the values.
        blur: standard deviation of the Gaussian that smooths the change, pixels; 0 for none, a quarter of the frame's
            height by default.

    Returns:
        (B, F, C, H, W) in [-1, 1]; frames up to `index` as they were.

    Raises:
        ValueError: shapes that do not fit, an index outside the clip, a sigma or blur out of range.
    """
    if decoded.ndim != 5 or frame.shape != decoded[:, 0].shape or not 0 <= index < decoded.shape[1]:
        raise ValueError(
            f"a frame of shape {tuple(frame.shape)} is not frame {index} of clips of {tuple(decoded.shape)}; give "
            "(B, C, H, W) and (B, F, C, H, W)."
        )
    blur = decoded.shape[-2] / 4 if blur is None else blur
    if not (sigma > 0 and blur >= 0):
        raise ValueError(f"sigma must be positive and blur 0 or more, got {sigma} and {blur}.")
    before, after = decoded[:, : index + 1], decoded[:, index + 1 :]
    if not after.shape[1]:
        return decoded
    change = (after - before[:, -1:]).abs().mean(2, keepdim=True).cummax(1).values  # (B, f, 1, H, W)
    weight = torch.exp(-blurred(change, blur) / sigma)
    return torch.cat([before, after + weight * (frame[:, None] - after)], dim=1)


def check_hold(hold: float) -> None:
    """Raises ValueError for a share that is no share."""
    if not 0 <= hold <= 1:
        raise ValueError(f"hold is {hold}; give a share of the last known frame from 0 to 1.")


def fade_from_known(predicted: torch.Tensor, frame: torch.Tensor, hold: float = HOLD) -> torch.Tensor:
    """Fades from the last known frame to what is predicted after it (our choice).

    A prediction is one of many ways in which a video may go on, so that between it and the frame that is known lies
    what is nearer to the truth on average. Frame k after the known one has `hold` 2^(-k / 16) of that.

    Args:
        predicted: (B, f, C, H, W), the frames right after the known one.
        frame: (B, C, H, W), the last known one.
        hold: share of the known frame at first, from 0 (the prediction itself) to 1.

    Returns:
        (B, f, C, H, W).

    Raises:
        ValueError: a share out of range.
    """
    check_hold(hold)
    after = torch.arange(1, predicted.shape[1] + 1, device=predicted.device).view(1, -1, 1, 1, 1)
    return predicted + hold * 0.5 ** (after / HOLD_HALF_LIFE) * (frame[:, None] - predicted)


def blurred(maps: torch.Tensor, std: float) -> torch.Tensor:
    """(B, f, 1, H, W) through a Gaussian; at the border the outermost values go on."""
    radius = round(3 * std)
    if radius == 0:
        return maps
    weights = torch.exp(-(torch.arange(-radius, radius + 1, device=maps.device) ** 2) / (2 * std**2)).to(maps)
    weights = weights / weights.sum()
    flat = F.pad(maps.flatten(0, 1), (radius,) * 4, mode="replicate")  # (B * f, 1, H + 2 r, W + 2 r)
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return flat.view(maps.shape)
