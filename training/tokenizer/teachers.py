"""Frozen video networks that training learns from: VideoMAE for the semantic discriminator, V-JEPA2 for the alignment.

A teacher is no `nn.Module`, so whatever holds one does not carry its weights into checkpoints. It takes clips as the
tokenizer has them, (B, F, 3, H, W) in [-1, 1], and prepares them itself with tensor operations that pass gradients.

Prepared means: resized to the teacher's side, bilinear and with antialiasing, then normalised as its own processor
configuration says. The whole clip is resized and nothing is cropped (our choice; for square clips VideoMAE's processor
does the same, V-JEPA2's would cut off 12 % of the side), so that the teacher's grid lies over the tokenizer's.

Shapes: B clips, F frames, T' x h x w cells of the teacher's grid, C width, L = T' * h * w.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evatok_hf.models.files_evatok import read_json
from evatok_hf.tokenize.ahead import to_device

if TYPE_CHECKING:
    from transformers import VideoMAEModel, VJEPA2Model

_PROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_BILINEAR, _BICUBIC = 2, 3  # numbers of PIL's filters in processor configurations


# --- preparing clips --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preparation:
    """What a teacher's processor does to pixels.

    Attributes:
        side: height and width that the teacher sees, in pixels.
        mean, std: of each colour, for pixel values in [0, scale].
        scale: what white is mapped to before that.
        bicubic: resize so, instead of bilinear; what overshoots black or white stays, so that it has a gradient.
    """

    side: int
    mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD)
    scale: float = 1.0
    bicubic: bool = False

    @classmethod
    def from_processor(cls, processor: dict | None, side: int) -> Preparation:
        """As a processor's JSON says; without one as the published VideoMAE and V-JEPA2 checkpoints have it (ImageNet).

        Raises:
            ValueError: a filter that is neither bilinear nor bicubic.
        """
        if processor is None:
            return cls(side)
        resample = processor.get("resample", _BILINEAR)
        if resample not in (_BILINEAR, _BICUBIC):
            raise ValueError(
                f"the teacher's processor resizes with PIL's filter {resample}; only 2 and 3 are known here."
            )
        normalises = processor.get("do_normalize", True)
        scales = processor.get("do_rescale", True)
        return cls(
            side,
            tuple(processor.get("image_mean", IMAGENET_DEFAULT_MEAN)) if normalises else (0.0, 0.0, 0.0),
            tuple(processor.get("image_std", IMAGENET_DEFAULT_STD)) if normalises else (1.0, 1.0, 1.0),
            255 * processor.get("rescale_factor", 1 / 255) if scales else 255.0,
            resample == _BICUBIC,
        )

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, 3, S, S) in [-1, 1] -> (B, F, 3, side, side), normalised, float32.

        Raises:
            ValueError: clips of another shape, or not square.
        """
        if video.ndim != 5 or video.shape[2] != 3 or video.shape[3] != video.shape[4]:
            raise ValueError(f"clips must be (B, F, 3, S, S), got {tuple(video.shape)}; crop them to squares.")
        frames = video.float().flatten(0, 1)  # (B * F, 3, S, S)
        if video.shape[-1] != self.side:
            mode = "bicubic" if self.bicubic else "bilinear"
            frames = F.interpolate(frames, (self.side, self.side), mode=mode, align_corners=False, antialias=True)
        mean, std = (to_device(torch.tensor(values), frames.device).view(3, 1, 1) for values in (self.mean, self.std))
        frames = ((frames + 1) * (self.scale / 2) - mean) / std
        return frames.unflatten(0, video.shape[:2])


def resample_frames(video: torch.Tensor, num_frames: int) -> torch.Tensor:
    """(B, F, ...) -> (B, num_frames, ...), evenly spaced: frames are left out of longer clips and repeated in shorter.

    Left-out frames get no gradient.
    """
    if video.shape[1] == num_frames:
        return video
    index = (2 * torch.arange(num_frames, device=video.device) + 1) * video.shape[1] // (2 * num_frames)
    return video[:, index]


# --- loading ----------------------------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def _unavailable(what: str, name: str, error: BaseException) -> ValueError:
    return ValueError(
        f"cannot load {what} from {name!r} ({_first_line(error)}); check the name and the network, or name a local "
        "folder that holds config.json and the weights."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of the weights of a decoder that nothing needs here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_config(name: str, what: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, HFValidationError) as error:
        raise _unavailable(what, name, error) from error


def _load(name_or_path: str | Path, model_type: str, what: str) -> tuple[PreTrainedModel, dict | None]:
    """A frozen float32 model in evaluation mode, and its processor's configuration where there is one."""
    name = str(name_or_path)
    config = _load_config(name, what)
    if config.model_type != model_type:
        raise ValueError(f"{name} holds a model of type {config.model_type!r}; {what} is needed here.")
    try:
        with _quiet():
            model, info = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        processor = None
        for file in _PROCESSOR_FILES:
            path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
            if path is not None:
                processor = read_json(path)
                break
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _unavailable(what, name, error) from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{name} lacks {len(missing)} weights of {what}, {missing[0]} for one; get a complete copy.")
    return model.eval().requires_grad_(False), processor


# --- teachers ---------------------------------------------------------------------------------------------------------


class VideoMAETeacher:
    """A frozen VideoMAE (Tong et al. 2022): features of several layers with a gradient to the clip.

    It takes exactly `num_frames` frames; clips of other lengths go through `resample_frames`.

    Args:
        model: a `VideoMAEModel`, frozen.
        preparation: of clips.
        layers: after how many blocks features are read, 0 being the embeddings. By default five, evenly spaced: 0, 3,
            6, 9, 12 of twelve, as GigaTok reads its DINO (fewer where there are fewer blocks than four).

    Attributes:
        width: C.
        grid: (T', h, w).
    """

    def __init__(self, model: VideoMAEModel, preparation: Preparation, layers: Sequence[int] | None = None):
        config = model.config
        depth = config.num_hidden_layers
        if layers is None:
            layers = dict.fromkeys((depth * quarter + 2) // 4 for quarter in range(5))
        self.layers = tuple(layers)
        if not self.layers or not all(0 <= layer <= depth for layer in self.layers):
            raise ValueError(f"layers must lie in 0..{depth}, got {list(self.layers)}.")
        self.model, self.preparation = model, preparation
        self.width, self.num_frames = config.hidden_size, config.num_frames
        side = preparation.side // config.patch_size
        self.grid = (config.num_frames // config.tubelet_size, side, side)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, layers: Sequence[int] | None = None) -> VideoMAETeacher:
        """From a folder or Hub id, e.g. `MCG-NJU/videomae-base`; a pretraining checkpoint's decoder is left out.

        Raises:
            ValueError: weights that cannot be had or are no complete VideoMAE, or layers that it does not have.
        """
        model, processor = _load(name_or_path, "videomae", "the weights of a VideoMAE teacher")
        return cls(model, Preparation.from_processor(processor, model.config.image_size), layers)

    def to(self, device: torch.device | str) -> VideoMAETeacher:
        self.model.to(device)
        return self

    def features(self, video: torch.Tensor) -> list[torch.Tensor]:
        """(B, F, 3, S, S) in [-1, 1] -> a (B, L, C) for each of `layers`."""
        pixels = self.preparation(resample_frames(video, self.num_frames))
        states = self.model(pixels, output_hidden_states=True).hidden_states
        return [states[layer] for layer in self.layers]

    @torch.no_grad()
    def grid_features(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, 3, S, S) in [-1, 1] -> (B, T', h, w, C) of the last layer, without a gradient."""
        pixels = self.preparation(resample_frames(video, self.num_frames))
        return self.model(pixels).last_hidden_state.unflatten(1, self.grid)


class VJEPA2Teacher:
    """The frozen encoder of a V-JEPA2 (Assran et al. 2025): features to align with, without a gradient.

    Its positions are rotary, so that it takes any number of frames that is a multiple of its tubelet (2), whatever
    `frames_per_clip` it was trained with. It saw frames at a fixed rate in training and knows nothing of a clip's own;
    `num_frames` above the clip's repeats frames, as if it were slower, below leaves frames out, as if it were quicker.

    Args:
        model: a `VJEPA2Model`, frozen.
        preparation: of clips.
        num_frames: frames that the encoder sees of a clip, evenly spaced (`resample_frames`).

    Attributes:
        width: C.
        grid: (T', h, w).
    """

    def __init__(self, model: VJEPA2Model, preparation: Preparation, num_frames: int = 16):
        config = model.config
        if num_frames < 1 or num_frames % config.tubelet_size:
            raise ValueError(f"num_frames must be a multiple of {config.tubelet_size}, got {num_frames}.")
        self.model, self.preparation = model, preparation
        self.width, self.num_frames = config.hidden_size, num_frames
        side = preparation.side // config.patch_size
        self.grid = (num_frames // config.tubelet_size, side, side)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, num_frames: int = 16) -> VJEPA2Teacher:
        """From a folder or Hub id, e.g. `facebook/vjepa2-vitl-fpc64-256`, the paper's V-JEPA2-L.

        Raises:
            ValueError: weights that cannot be had or are no complete V-JEPA2, or an odd number of frames.
        """
        model, processor = _load(name_or_path, "vjepa2", "the weights of a V-JEPA2 teacher")
        return cls(model, Preparation.from_processor(processor, model.config.crop_size), num_frames)

    def to(self, device: torch.device | str) -> VJEPA2Teacher:
        self.model.to(device)
        return self

    @torch.no_grad()
    def features(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, 3, S, S) in [-1, 1] -> (B, T', h, w, C), after the encoder's last norm."""
        pixels = self.preparation(resample_frames(video, self.num_frames))
        return self.model(pixels, skip_predictor=True).last_hidden_state.unflatten(1, self.grid)

    grid_features = features  # the name that all alignment teachers share


AlignmentTeacher = VJEPA2Teacher | VideoMAETeacher


def load_alignment_teacher(name_or_path: str | Path, num_frames: int = 16) -> AlignmentTeacher:
    """The teacher that a folder or Hub id holds, by the `model_type` of its configuration.

    Args:
        name_or_path: of a V-JEPA2 (as in the paper) or a VideoMAE.
        num_frames: of a clip; a VideoMAE always sees as many as its configuration says.

    Raises:
        ValueError: neither of the two, or weights that cannot be had.
    """
    model_type = _load_config(str(name_or_path), "an alignment teacher").model_type
    if model_type == "vjepa2":
        return VJEPA2Teacher.from_pretrained(name_or_path, num_frames)
    if model_type == "videomae":
        return VideoMAETeacher.from_pretrained(name_or_path)
    raise ValueError(f"{name_or_path} holds a model of type {model_type!r}; alignment needs a vjepa2 or a videomae.")
