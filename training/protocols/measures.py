"""The metrics of an evaluation, summed over clips in constant memory and over processes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from evatok_hf import EvatokModel, VideoTokens
from evatok_hf.metrics import load_perceptual, psnr
from evatok_hf.metrics.features import VIDEO_FEATURE_NAMES, load_video_features
from evatok_hf.metrics.frechet import FrechetStatistics, frechet_distance
from evatok_hf.metrics.perceptual import PERCEPTUAL_NAMES
from evatok_hf.metrics.pixels import CodebookUse, ssim


class Measures:
    """The measurements of the clips seen so far.

    Args:
        names: out of `protocols.METRIC_NAMES`.
        model: the tokenizer that is measured; metrics are computed on its device.
        feature_resolution: pixels that frames are brought to before video features, None for none.
        i3d: the I3D file, for fvd.
        lpips_weights: a torchvision state dict of the backbone, for LPIPS.

    Attributes:
        clips, tokens: seen so far.

    Raises:
        ValueError: weights of a metric that cannot be had.
    """

    def __init__(
        self,
        names: list[str],
        model: EvatokModel,
        feature_resolution: int | None = None,
        i3d: str | None = None,
        lpips_weights: str | None = None,
    ):
        self.names = names
        self.perceptual = {
            name: load_perceptual(name, lpips_weights if name.startswith("lpips") else None).to(model.device)
            for name in names
            if name in PERCEPTUAL_NAMES
        }
        self.features = {
            name: load_video_features(name, i3d if name == "fvd" else None, feature_resolution).to(model.device)
            for name in names
            if name in VIDEO_FEATURE_NAMES
        }
        self.clips = self.tokens = 0
        self.sums = {name: 0.0 for name in names if name in ("psnr", "ssim", *self.perceptual)}
        # Real clips, reconstructed clips.
        self.frechet = {name: [FrechetStatistics(one.dim) for _ in range(2)] for name, one in self.features.items()}
        self.codebook = CodebookUse(model.config.codebook_size)

    @torch.no_grad()
    def update(self, real: torch.Tensor, made: torch.Tensor, tokens: VideoTokens) -> None:
        """Adds clips.

        Args:
            real, made: (B, F, 3, H, W) float32 in [-1, 1].
            tokens: that the made ones were decoded from.
        """
        self.clips += len(real)
        self.tokens += int(tokens.ids.numel())
        self.codebook.update(tokens.ids)
        # Apple's GPUs have no float64.
        pair = [video.cpu() if video.device.type == "mps" else video for video in (real, made)]
        for name in self.sums:
            if name in self.perceptual:
                values = self.perceptual[name].video(real, made).cpu()
            else:
                values = {"psnr": psnr, "ssim": ssim}[name](*pair)
            self.sums[name] += float(values.double().sum())
        for name, features in self.features.items():
            for statistics, video in zip(self.frechet[name], (real, made), strict=True):
                statistics.update(features(video))

    def gather(self) -> None:
        """Has the main process measured what all processes did together; all of them must call it."""
        mine = (self.clips, self.tokens, self.sums, self.frechet, self.codebook)
        for clips, tokens, sums, frechet, codebook in gather_object([mine])[1:]:
            self.clips += clips
            self.tokens += tokens
            self.codebook += codebook
            for name, value in sums.items():
                self.sums[name] += value
            for name, pair in frechet.items():
                for statistics, other in zip(self.frechet[name], pair, strict=True):
                    statistics.merge(other)

    def results(self) -> dict[str, dict[str, Any]]:
        """By metric its figures, the clips that they are of, and the hash of its weights.

        `value` is the mean over clips, or the Frechet distance between real and made clips; of the codebook there are
        `use` (share of its entries), `entropy` (bits a token) and `perplexity`, of the tokens the mean number a clip.
        """
        results: dict[str, dict[str, Any]] = {}
        for name in self.names:
            if name in self.frechet:
                figures = {"value": frechet_distance(*self.frechet[name])}
            elif name == "codebook":
                figures = {figure: getattr(self.codebook, figure) for figure in ("use", "entropy", "perplexity")}
            else:
                figures = {"value": (self.tokens if name == "tokens" else self.sums[name]) / self.clips}
            weights = {}
            if name in self.features:
                weights = {"weights_sha256": self.features[name].weights_sha256, "weights_of": "file"}
            elif name in self.perceptual:
                weights = {"weights_sha256": hash_tensors(self.perceptual[name]), "weights_of": "tensors"}
            results[name] = {**figures, "clips": self.clips, **weights}
        return results


def hash_tensors(module: nn.Module) -> str:
    """sha256 of names and values of all tensors of a module, 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
