"""Video processor of EVATok: raw frames -> `pixel_values_videos`, and back to uint8 frames.

Also what frame prediction does to pixels: the clip that a generator is shown of which only the first frames are known,
and mends of its answer.

Only torch operations are used, so nothing here needs torchvision. The base class is imported from its own module
because `transformers.BaseVideoProcessor` is a placeholder wherever torchvision is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import is_pil_image
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, is_valid_video_frame

from .base_evatok import OwnCard
from .files_evatok import Rule, flag, list_of, named, number, read_json, refuse_hidden, whole

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
    if _SIDE.allows(value):
        return True
    sides = dict(value) if isinstance(value, Mapping) or hasattr(value, "keys") else {}
    given = {name: side for name, side in sides.items() if side is not None}
    return set(given) in shapes and all(map(_SIDE.allows, given.values()))


_CHANNELS = Rule(
    "a number, or a list of three, one a colour",
    lambda value: number(-1e6, 1e6).allows(value) or list_of(number(-1e6, 1e6), 3, least=3).allows(value),
)
# What a file or a call may say of a field; None is always allowed.
_RULES = {
    "size": Rule(
        f"a table with height and width or with shortest_edge, each {_SIDE.words}",
        lambda value: _is_size(value, {"height", "width"}, {"shortest_edge"}),
    ),
    "crop_size": Rule(
        f"a table with height and width, each {_SIDE.words}", lambda value: _is_size(value, {"height", "width"})
    ),
    "resample": Rule("0, 2 or 3", lambda value: value in _MODES),
    "rescale_factor": number(0, 1e6, above=True),
    "image_mean": _CHANNELS,
    "image_std": _CHANNELS,
    "num_frames": whole(1, 8192),
    "fps": number(0, 1_000_000, above=True),
} | {f"do_{step}": flag() for step in ("resize", "center_crop", "rescale", "normalize", "sample_frames", "pad")}

# Fields that a step cannot do without.
_NEEDED = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}


def _check(values: Mapping[str, Any]) -> None:
    for name, rule in _RULES.items():
        if values.get(name) is not None:
            rule.hold(name, values[name])


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

    def __init__(self, **kwargs: Any) -> None:
        refuse_hidden(kwargs, type(self), self.valid_kwargs.__annotations__)
        _check(kwargs)
        super().__init__(**kwargs)
        for name in [name for name, value in kwargs.items() if value is None]:
            setattr(self, name, None)  # the base class reads None as "not given"
        for step, fields in _NEEDED.items():
            for name in fields:
                if getattr(self, step) and getattr(self, name) is None:
                    raise ValueError(f"{name} must not be None where {step} is on; give it, or turn {step} off.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a processor as transformers does. Raises ValueError for impossible values, naming file and field."""
        subfolder = kwargs.get("subfolder") or ""
        place = os.path.join(pretrained_model_name_or_path, subfolder, "video_preprocessor_config.json")
        with named(place):
            if os.path.isfile(place):
                read_json(place)
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Turns videos into the model's input; calling the processor does the same.

        Args:
            videos: one video or a list of videos. A video is a uint8 or float ([0, 1]) numpy array or torch tensor,
                (F, H, W, 3) or (F, 3, H, W), or a list of PIL images or of single frames. A path or URL is decoded by
                torchcodec, where that is installed; `VideoTokenizer` takes files without it.
            kwargs: fields of the processor for this call alone, and as in every video processor of transformers
                `video_metadata`, one for all videos or one each, of which `fps`, the rate that a video has, is needed
                where it is sampled to another; `return_tensors`, "pt" or "np" for one stacked array, else a list with a
                tensor a video; `input_data_format`, "channels_last" or "channels_first", needed only where the shape
                leaves it open; `device`, where to compute and leave the result; `return_metadata`.

        Returns:
            `BatchFeature` with `pixel_values_videos` (B, F, 3, H, W), float32 in [-1, 1] with the default fields.

        Raises:
            ValueError: for a shape, type or value that is not as above, a video shorter than `num_frames` (unless
                `do_pad`), a missing rate, videos that come out in different shapes, or an unknown option.
        """
        known = self.valid_kwargs.__annotations__
        if unknown := sorted(set(kwargs) - set(known)):
            raise ValueError(f"unknown option {', '.join(unknown)}: choose from {', '.join(known)}")
        _check(kwargs)
        videos = list_videos(videos)
        if not isinstance(videos[0], str):
            layout = kwargs.pop("input_data_format", None)
            videos = [frames_tensor(video, layout) for video in videos]  # (F, 3, H, W)
            kwargs |= {
                "input_data_format": "channels_first",
                "video_metadata": _all_metadata(kwargs.get("video_metadata"), videos),
            }
        try:
            return super().preprocess(videos, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        do_pad: bool | None = False,
        **kwargs: Any,
    ) -> np.ndarray:
        """The numbers of the frames that make a clip: the rate is changed, then the first frames are taken.

        Args:
            metadata: `total_num_frames` of the video, and its own rate `fps`, needed where the rate changes.
            num_frames: frames of the clip; None for all.
            fps: the rate to sample to; None for the video's own.
            do_pad: whether to repeat the last frame where there are fewer.

        Raises:
            ValueError: a rate that is missing, or a video that is too short.
        """
        indices = np.arange(metadata.total_num_frames)
        if fps is not None:
            if metadata.fps is None:
                raise ValueError(
                    f"to sample to {fps:g} fps the processor needs the video's own rate: pass "
                    'video_metadata={"fps": ..}, or set fps to None to keep every frame'
                )
            indices = np.array(nearest_frame_indices(len(indices), float(metadata.fps), float(fps)))
        if num_frames is None:
            return indices
        if len(indices) < num_frames and not do_pad:
            raise ValueError(
                f"the video has {len(indices)} frames and a clip needs {num_frames}: give a longer video, "
                "or do_pad=True to repeat its last frame"
            )
        return indices[np.arange(num_frames).clip(max=len(indices) - 1)]

    def postprocess(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Undoes normalising and rescaling: (B, F, 3, H, W) float -> (B, F, H, W, 3) uint8, rounded and clamped.

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

    def _preprocess(
        self, videos: list[torch.Tensor], return_tensors: str | None = None, **options: Any
    ) -> BatchFeature:
        done = [self._transform(frames, options) for frames in videos]
        if return_tensors is None:
            return BatchFeature(data={"pixel_values_videos": done})
        if len({video.shape for video in done}) > 1:
            shapes = ", ".join(str(tuple(video.shape)) for video in done)
            raise ValueError(f"videos of different shapes {shapes} do not stack: crop them, or set return_tensors=None")
        return BatchFeature(data={"pixel_values_videos": torch.stack(done)}, tensor_type=return_tensors)

    @staticmethod
    def _transform(frames: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """(F, 3, H, W) uint8 or float in [0, 1] -> (F, 3, H', W') float32."""
        was_uint8 = frames.dtype == torch.uint8
        crop = (options["crop_size"].height, options["crop_size"].width) if options["do_center_crop"] else None
        if options["do_resize"]:
            size, mode = options["size"], _MODES[int(options["resample"])]
            edge = size.shortest_edge
            if edge is not None and crop is not None:
                frames = _cut_thin(frames, edge, crop)
            frames = frames.to(torch.float32)  # uint8 would be rounded once more by the resize
            height, width = frames.shape[-2:]
            if edge is None:
                target = size.height, size.width
            else:  # the long side is cut down to a whole pixel, as torchvision's Resize does
                short = min(height, width)
                target = (edge, edge * width // short) if height <= width else (edge * height // short, edge)
            frames = _resize(frames, target, mode, 255.0 if was_uint8 else 1.0)
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


def list_videos(videos: Any) -> list[Any]:
    """One video or many, however nested -> a list of videos."""
    if isinstance(videos, np.ndarray | torch.Tensor):
        return list(videos) if videos.ndim == 5 else [videos]
    if isinstance(videos, str):  # a path or URL
        return [videos]
    if not isinstance(videos, Sequence) or isinstance(videos, bytes):
        raise ValueError(f"a video cannot be a {type(videos).__name__}: give uint8 frames (F, H, W, 3)")
    if not videos:
        raise ValueError("got an empty list: give at least one video with at least one frame")
    if is_valid_video_frame(videos[0]):
        return [videos]
    return [video for group in videos for video in list_videos(group)]


def _all_metadata(given: Any, videos: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    """The metadata of each video, given for all or one each; their frames are counted."""
    each = [given or {}] * len(videos) if given is None or isinstance(given, Mapping) else _flat(given)
    if len(each) != len(videos):
        raise ValueError(f"{len(each)} video_metadata for {len(videos)} videos: give one for all, or one each")
    known = VideoMetadata.__dataclass_fields__
    if unknown := {key for one in each for key in one if key not in known}:
        raise ValueError(f"video_metadata has no {', '.join(unknown)}: choose from {', '.join(known)}")
    return [{**one, "total_num_frames": len(video)} for one, video in zip(each, videos, strict=True)]


def _flat(nested: Any) -> list[Any]:
    return [nested] if isinstance(nested, Mapping) else [entry for group in nested for entry in _flat(group)]


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
            f"a video of shape {shape} may be (F, H, W, 3) or (F, 3, H, W): give a list of PIL images, "
            "or to the processor input_data_format='channels_last' or 'channels_first'"
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


def _resize(frames: torch.Tensor, target: tuple[int, int], mode: str, top: float) -> torch.Tensor:
    """(F, 3, H, W) float -> (F, 3, *target), within [0, top]."""
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


def _channels(values: float | Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A number, or one a colour -> (1, 1, 1) or (3, 1, 1) beside `like`."""
    return torch.as_tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


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
    return held_clip(video[:, :known_frames], video.shape[1])


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


def keep_still(decoded: torch.Tensor, frame: torch.Tensor, index: int) -> torch.Tensor:
    """Puts a known frame as it truly is in place of later decoded ones where these did not change (our choice).

    With D the decoded clip, n the known frame's place and x its true picture, frame t becomes w_t x + (1 - w_t) D_t
    with w_t = exp(-c_t / STILL_SIGMA) and c_t the mean over channels of |D_s - D_n| at its largest of n < s <= t,
    blurred by a Gaussian of a quarter of the frame's height. So what stands still keeps its sharpness and does not
    flicker, and what has once moved is the decoder's.

    Args:
        decoded: (B, F, C, H, W) in [-1, 1].
        frame: (B, C, H, W), frame `index` as it truly is.
        index: n, from 0 to F - 1.

    Returns:
        (B, F, C, H, W) in [-1, 1]; frames up to `index` as they were.

    Raises:
        ValueError: shapes that do not fit, or an index outside the clip.
    """
    if decoded.ndim != 5 or frame.shape != decoded[:, 0].shape or not 0 <= index < decoded.shape[1]:
        raise ValueError(
            f"a frame of shape {tuple(frame.shape)} is not frame {index} of clips of {tuple(decoded.shape)}; give "
            "(B, C, H, W) and (B, F, C, H, W)."
        )
    before, after = decoded[:, : index + 1], decoded[:, index + 1 :]
    if not after.shape[1]:
        return decoded
    change = (after - before[:, -1:]).abs().mean(2, keepdim=True).cummax(1).values  # (B, f, 1, H, W)
    weight = torch.exp(-blurred(change, decoded.shape[-2] / 4) / STILL_SIGMA)
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
