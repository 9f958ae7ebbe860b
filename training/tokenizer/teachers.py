"""Frozen video networks that training learns from: VideoMAE for the semantic discriminator, V-JEPA2 for the alignment.

A teacher is no `nn.Module`, so whatever holds one does not carry its weights into checkpoints. It takes clips as the
tokenizer has them, (B, F, 3, S, S) in [-1, 1], and prepares them itself with tensor operations that pass gradients.

Prepared means: resized to the teacher's side, bilinear and with antialiasing, then normalised as its own processor
configuration says. The whole clip is resized and nothing is cropped (our choice; for square clips VideoMAE's processor
does the same, V-JEPA2's would cut off 12 % of the side), so that the teacher's grid lies over the tokenizer's.

Shapes: B clips, F frames, T' x h x w cells of the teacher's grid, C width, L = T' * h * w.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.video_processing_auto import get_video_processor_config
from transformers.utils import logging
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evatok_hf.models.checkpoint_evatok import one_line
from evatok_hf.tokenize.ahead import to_device

_MODES = {2: "bilinear", 3: "bicubic"}  # by the numbers of PIL's filters
_SIDES = {"vjepa2": "crop_size", "videomae": "image_size"}  # by `model_type`, the field of the configuration


class Preparation:
    """The size and the normalisation that a teacher's processor gives pixels.

    What overshoots black or white in bicubic resizing stays, so that it has a gradient.

    Args:
        side: height and width that the teacher sees, in pixels.
        resample, ..: the processor's JSON; by default as the published VideoMAE and V-JEPA2 checkpoints have it.

    Raises:
        ValueError: a filter that is neither bilinear nor bicubic.
    """

    def __init__(
        self,
        side: int,
        resample: int = 2,
        do_normalize: bool = True,
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        **others: Any,
    ):
        if resample not in _MODES:
            raise ValueError(
                f"the teacher's processor resizes with PIL's filter {resample}; only 2 and 3 are known here."
            )
        self.side, self.mode = side, _MODES[resample]
        self.mean, self.std = (image_mean, image_std) if do_normalize else ([0.0] * 3, [1.0] * 3)
        self.white = 255 * rescale_factor if do_rescale else 255.0  # before it is normalised

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, 3, S, S) in [-1, 1] -> (B, F, 3, side, side), normalised, float32.

        Raises:
            ValueError: clips of another shape, or not square.
        """
        if video.ndim != 5 or video.shape[2] != 3 or video.shape[3] != video.shape[4]:
            raise ValueError(f"clips must be (B, F, 3, S, S), got {tuple(video.shape)}; crop them to squares.")
        frames = video.float().flatten(0, 1)  # (B * F, 3, S, S)
        if video.shape[-1] != self.side:
            size = (self.side, self.side)
            frames = F.interpolate(frames, size, mode=self.mode, align_corners=False, antialias=True)
        mean, std = (to_device(torch.tensor(values), frames.device).view(3, 1, 1) for values in (self.mean, self.std))
        frames = ((frames + 1) * (self.white / 2) - mean) / std
        return frames.unflatten(0, video.shape[:2])


def resample_frames(video: torch.Tensor, num_frames: int) -> torch.Tensor:
    """(B, F, ...) -> (B, num_frames, ...), evenly spaced: frames are left out of longer clips and repeated in shorter.

    Left-out frames get no gradient.
    """
    if video.shape[1] == num_frames:
        return video
    index = (2 * torch.arange(num_frames, device=video.device) + 1) * video.shape[1] // (2 * num_frames)
    return video[:, index]


class Teacher:
    """A frozen video network, and its features of clips.

    A VideoMAE (Tong et al. 2022), e.g. `MCG-NJU/videomae-base`, takes exactly the `num_frames` of its configuration. A
    pretraining checkpoint's decoder is left out.

    Of a V-JEPA2 (Assran et al. 2025), e.g. `facebook/vjepa2-vitl-fpc64-256`, the paper's, it is the encoder. Its
    positions are rotary, so that it takes any number of frames that is a multiple of its tubelet (2), whatever
    `frames_per_clip` it was trained with. It saw frames at a fixed rate in training and knows nothing of a clip's own;
    `num_frames` above the clip's repeats frames, as if it were slower, below leaves frames out, as if it were quicker.

    Args:
        model: a `VideoMAEModel` or a `VJEPA2Model`, frozen.
        preparation: of clips.
        num_frames: that a V-JEPA2 sees of a clip, evenly spaced (`resample_frames`).

    Attributes:
        width: C.
        grid: (T', h, w).
        layers: after how many blocks `features` are read, 0 being the embeddings: five, evenly spaced, 0, 3, 6, 9, 12
            of twelve, as GigaTok reads its DINO (fewer where there are fewer blocks than four).

    Raises:
        ValueError: frames that do not fill whole cells.
    """

    def __init__(self, model: PreTrainedModel, preparation: Preparation, num_frames: int = 16):
        self.model, self.preparation, config = model, preparation, model.config
        self.options = {"skip_predictor": True} if config.model_type == "vjepa2" else {}
        self.num_frames = config.num_frames if config.model_type == "videomae" else num_frames
        if self.num_frames % config.tubelet_size:
            raise ValueError(f"num_frames must be a multiple of {config.tubelet_size}, got {self.num_frames}.")
        side, depth = preparation.side // config.patch_size, config.num_hidden_layers
        self.width, self.grid = config.hidden_size, (self.num_frames // config.tubelet_size, side, side)
        self.layers = tuple(dict.fromkeys((depth * quarter + 2) // 4 for quarter in range(5)))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, kinds: Sequence[str] = tuple(_SIDES), num_frames: int = 16
    ) -> Teacher:
        """From a folder or Hub id.

        Args:
            kinds: what it may be, by `model_type`.

        Raises:
            ValueError: weights that cannot be had or are no complete ones of these kinds.
        """
        name, verbosity = str(name_or_path), logging.get_verbosity()
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            if kind in kinds:
                logging.set_verbosity_error()  # no table of the weights of a decoder that nothing needs here
                model, info = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
                processor = get_video_processor_config(name)
        except (OSError, RuntimeError, ValueError, SafetensorError, HFValidationError) as error:
            raise ValueError(
                f"cannot load a teacher from {name!r} ({one_line(error)}); check the name and the network, or name a "
                "local folder that holds config.json and the weights."
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        if kind not in kinds:
            raise ValueError(f"{name} holds a model of type {kind!r}; this teacher must be a {' or a '.join(kinds)}.")
        if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
            raise ValueError(
                f"{name} lacks {len(missing)} weights of a teacher, {missing[0]} for one; get a complete copy."
            )
        model.eval().requires_grad_(False)
        return cls(model, Preparation(getattr(model.config, _SIDES[kind]), **processor), num_frames)

    def to(self, device: torch.device | str) -> Teacher:
        self.model.to(device)
        return self

    def features(self, video: torch.Tensor) -> list[torch.Tensor]:
        """(B, F, 3, S, S) in [-1, 1] -> a (B, L, C) for each of `layers`, with a gradient to the clips."""
        states = self.model(self._prepare(video), output_hidden_states=True, return_dict=True).hidden_states
        return [states[layer] for layer in self.layers]

    @torch.no_grad()
    def grid_features(self, video: torch.Tensor) -> torch.Tensor:
        """(B, F, 3, S, S) in [-1, 1] -> (B, T', h, w, C) of the last layer, after its norm, without a gradient."""
        output = self.model(self._prepare(video), **self.options, return_dict=True)
        return output.last_hidden_state.unflatten(1, self.grid)

    def _prepare(self, video: torch.Tensor) -> torch.Tensor:
        return self.preparation(resample_frames(video, self.num_frames))
