"""Losses and schedules of tokenizer training that lie outside the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from evatok_hf import EvatokConfig, EvatokOutput
from evatok_hf.metrics.perceptual import PerceptualDistance
from evatok_hf.models.modeling_evatok import Quantized, VectorQuantizer, cosine_transform, patch_spectrum, patchify

# A clip whose mean squared error is less than this (of values in [-1, 1]: 66 dB) is as good as it can be.
_LEAST_ERROR = 1e-6


class TokenizerLoss:
    """L1 (+ squared error) (+ its logarithm) (+ spectral) + perceptual + codebook + commitment + entropy.

    The spectral term is the squared error of a patch's cosine transform, each frequency divided by the amplitude that
    it usually has (`patch_spectrum`): the squared error alone hardly has a gradient for fine detail (our choice).
    The logarithm is of each clip's mean squared error, as PSNR has it; the mean squared error itself is mostly that of
    the hardest clips (our choice).

    Args:
        config: of the model, for the weights of the quantiser's terms.
        weights: of the others, "l1", "l2", "log_l2", "spectral" and "perceptual"; 0 where one is missing.
        perceptual: a frozen metric, or None.
        perceptual_frames: how many random frames of each clip the metric sees in a step, the same count for all;
            0 means all. Its expectation does not change.
    """

    def __init__(
        self,
        config: EvatokConfig,
        weights: Mapping[str, float],
        perceptual: PerceptualDistance | None = None,
        perceptual_frames: int = 0,
    ):
        if perceptual_frames < 0 or perceptual_frames > config.num_frames:
            raise ValueError(f"perceptual_frames must lie in 0..{config.num_frames}, got {perceptual_frames}.")
        self.config = config
        of_quantizer = {"commitment": config.commitment_weight, "entropy": config.entropy_weight}
        self.weights = {"codebook": 1.0, **of_quantizer, **weights}
        self.transform = cosine_transform(*config.patch_shape) / patch_spectrum(*config.patch_shape[:3])[:, None].sqrt()
        self.perceptual = perceptual
        self.perceptual_frames = perceptual_frames or config.num_frames

    def __call__(
        self,
        output: EvatokOutput,
        video: torch.Tensor,
        generator: torch.Generator,
        with_perceptual: bool = True,
        spectral_factor: float = 1.0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the total and its unweighted terms, detached.

        Args:
            output: of the model for `video`.
            video: (B, F, 3, H, W) in [-1, 1].
            generator: CPU generator for the choice of frames.
            with_perceptual: False leaves the perceptual term out of this step.
            spectral_factor: factor of the spectral term's weight in this step.
        """
        reconstruction = output.reconstruction.float()
        weights = self.weights | {"spectral": spectral_factor * self.weights.get("spectral", 0.0)}
        terms = {
            "l1": output.reconstruction_loss,
            "l2": F.mse_loss(reconstruction, video),
            "codebook": output.codebook_loss,
            "commitment": output.commitment_loss,
            "entropy": output.entropy_loss,
        }
        if weights.get("log_l2"):
            errors = (reconstruction - video).square().flatten(1).mean(1)  # (B,)
            terms["log_l2"] = errors.clamp_min(_LEAST_ERROR).log10().mean()
        if weights["spectral"]:
            self.transform = self.transform.to(video.device)
            error = patchify(reconstruction - video, self.config.num_blocks, self.config.patch_size)
            terms["spectral"] = F.linear(error, self.transform).square().mean()
        if self.perceptual is not None and with_perceptual:
            frames = torch.randperm(self.config.num_frames, generator=generator)[: self.perceptual_frames].sort().values
            frames = frames.to(video.device, non_blocking=True)
            pair = (clips[:, frames].flatten(0, 1) for clips in (reconstruction, video))
            with torch.autocast(video.device.type, enabled=False):
                terms["perceptual"] = self.perceptual(*pair).mean()
        total = sum(weights.get(name, 0.0) * term for name, term in terms.items())
        return total, {name: term.detach() for name, term in {**terms, "total": total}.items()}


class QuantizationBlend:
    """Fades quantisation in, so that a small model learns to reconstruct before it bites (our choice).

    The decoder gets `z + share * (code - z)`: features at share 0, codes at 1.

    Args:
        quantizer: of the tokenizer in training; what it gives out is changed from now on.
        start, end: steps between which the share rises linearly from 0 to 1; always 1 if both are 0.
    """

    def __init__(self, quantizer: VectorQuantizer, start: int = 0, end: int = 0):
        self.start, self.end, self.share = start, end, 1.0
        quantizer.register_forward_hook(self._blend)

    def at(self, step: int) -> float:
        """Sets the share for a step and returns it."""
        self.share = 1.0 if step >= self.end else max(0.0, (step - self.start) / max(1, self.end - self.start))
        return self.share

    def _blend(self, quantizer: VectorQuantizer, inputs: tuple[torch.Tensor, ...], quantized: Quantized) -> None:
        if quantizer.training and self.share < 1:
            z = F.normalize(inputs[0].float(), dim=-1)
            quantized.codes = z + self.share * (quantizer.to_codes(quantized.ids) - z).detach()


def spectral_factor(step: int, end: int) -> float:
    """Linear from 1 at step 0 to 0 at `end`, so that training ends on the plain terms. 1 always if `end` is 0."""
    return max(0.0, 1 - step / end) if end else 1.0
