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
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evatok_hf.models.checkpoint_evatok import one_line
from evatok_hf.models.files_evatok import read_json
from evatok_hf.tokenize.ahead import to_device

if TYPE_CHECKING:
    from typing import Self

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


def _unavailable(what: str, name: str, error: BaseException) -> ValueError:
    return ValueError(
        f"cannot load {what} from {name!r} ({one_line(error)}); check the name and the network, or name a local "
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


class AlignmentTeacher:
    """A frozen video network: features to align with, without a gradient.

    Args:
        model: the network, frozen.
        preparation: of clips.
        num_frames: frames that it sees of a clip, evenly spaced (`resample_frames`).

    Attributes:
        width: C.
        grid: (T', h, w).

    Raises:
        ValueError: frames that do not fill whole cells.
    """

    kind: ClassVar[str]  # `model_type` of its configuration
    named: ClassVar[str]
    side: ClassVar[str]  # field of the configuration
    options: ClassVar[dict[str, bool]] = {}  # of a call

    def __init__(self, model: PreTrainedModel, preparation: Preparation, num_frames: int):
        config = model.config
        if num_frames < 1 or num_frames % config.tubelet_size:
            raise ValueError(f"num_frames must be a multiple of {config.tubelet_size}, got {num_frames}.")
        self.model, self.preparation = model, preparation
        self.width, self.num_frames = config.hidden_size, num_frames
        side = preparation.side // config.patch_size
        self.grid = (num_frames // config.tubelet_size, side, side)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> Self:
        """From a folder or Hub id; options are those of the class.

        Raises:
            ValueError: weights that cannot be had or are no complete ones of this kind, or wrong options.
        """
        model, processor = _load(name_or_path, cls.kind, f"the weights of a {cls.named} teacher")
        return cls(model, Preparation.from_processor(processor, getattr(model.config, cls.side)), **options)

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        return self

    def prepare(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, 3, S, S) in [-1, 1] -> what the network takes."""
        return self.preparation(resample_frames(video, self.num_frames))

    @torch.no_grad()
    def grid_features(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, 3, S, S) in [-1, 1] -> (B, T', h, w, C) of the last layer, after its norm."""
        return self.model(self.prepare(video), **self.options).last_hidden_state.unflatten(1, self.grid)


class VideoMAETeacher(AlignmentTeacher):
    """A frozen VideoMAE (Tong et al. 2022), e.g. `MCG-NJU/videomae-base`: features of several layers, too, with a
    gradient to the clip. A pretraining checkpoint's decoder is left out.

    It takes exactly the `num_frames` of its configuration; clips of other lengths go through `resample_frames`.

    Args:
        model: a `VideoMAEModel`, frozen.
        preparation: of clips.
        layers: after how many blocks features are read, 0 being the embeddings. By default five, evenly spaced: 0, 3,
            6, 9, 12 of twelve, as GigaTok reads its DINO (fewer where there are fewer blocks than four).
    """

    kind, named, side = "videomae", "VideoMAE", "image_size"

    def __init__(self, model: VideoMAEModel, preparation: Preparation, layers: Sequence[int] | None = None):
        super().__init__(model, preparation, model.config.num_frames)
        depth = model.config.num_hidden_layers
        if layers is None:
            layers = dict.fromkeys((depth * quarter + 2) // 4 for quarter in range(5))
        self.layers = tuple(layers)
        if not self.layers or not all(0 <= layer <= depth for layer in self.layers):
            raise ValueError(f"layers must lie in 0..{depth}, got {list(self.layers)}.")

    def features(self, video: torch.Tensor) -> list[torch.Tensor]:
        """(B, F, 3, S, S) in [-1, 1] -> a (B, L, C) for each of `layers`."""
        states = self.model(self.prepare(video), output_hidden_states=True).hidden_states
        return [states[layer] for layer in self.layers]


class VJEPA2Teacher(AlignmentTeacher):
    """The frozen encoder of a V-JEPA2 (Assran et al. 2025), e.g. `facebook/vjepa2-vitl-fpc64-256`, the paper's.

    Its positions are rotary, so that it takes any number of frames that is a multiple of its tubelet (2), whatever
    `frames_per_clip` it was trained with. It saw frames at a fixed rate in training and knows nothing of a clip's own;
    `num_frames` above the clip's repeats frames, as if it were slower, below leaves frames out, as if it were quicker.
    """

    kind, named, side, options = "vjepa2", "V-JEPA2", "crop_size", {"skip_predictor": True}

    def __init__(self, model: VJEPA2Model, preparation: Preparation, num_frames: int = 16):
        super().__init__(model, preparation, num_frames)


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
        return VJEPA2Teacher.from_pretrained(name_or_path, num_frames=num_frames)
    if model_type == "videomae":
        return VideoMAETeacher.from_pretrained(name_or_path)
    raise ValueError(f"{name_or_path} holds a model of type {model_type!r}; alignment needs a vjepa2 or a videomae.")
