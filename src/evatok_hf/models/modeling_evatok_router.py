"""EvatokRouter: one look at a clip decides how many tokens each of its temporal blocks gets.

A vision transformer over the tokenizer's 3D patches with a [CLS] token, and a linear head with one number for each
assignment (paper, section 3). Trained for one preference w_q, as in the paper, these numbers are logits. A router for
every preference (our choice) lets them be qualities Q and computes rewards as they are defined,
`R = w_q Q - (2 - w_q) L`: the cost L is known and need not be learned, and a larger w_q can never choose fewer tokens.

Shapes: B clips, T blocks, G x G cells of a block, A assignments, D width.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.utils import ModelOutput

from .base_evatok import EvatokBaseModel
from .configuration_evatok import AssignmentSpace, EvatokRouterConfig
from .modeling_evatok import EvatokEncoderModel, cosine_transform, patch_analysis, patchify, sincos_positions

DEFAULT_QUALITY = 1.2  # w_q of the paper
QUALITY_RANGE = (0.8, 1.6)  # that the paper shows
_FLOOR = 0.03  # of magnitudes, in pixel values of [-1, 1]: below it lies what 8-bit rounding makes of a flat patch
_LOG_OF_NOTHING = math.log(_FLOOR) / 2 + 1  # what `_log_magnitude` makes of zeros


def check_quality(quality: float | torch.Tensor) -> torch.Tensor:
    """Returns w_q as a float64 tensor. Raises ValueError unless every value lies in 0..2, where both weights count."""
    values = torch.as_tensor(quality, dtype=torch.float64)
    # A number is compared without torch, which matters to a router whose whole pass takes a few milliseconds.
    within = 0 <= quality <= 2 if isinstance(quality, int | float) else bool(((values >= 0) & (values <= 2)).all())
    if not within:
        raise ValueError(
            f"quality must lie between 0 (only tokens count) and 2 (only quality counts), got {values.tolist()}; "
            f"{DEFAULT_QUALITY} is the default, {QUALITY_RANGE[0]} to {QUALITY_RANGE[1]} the usual range."
        )
    return values


def token_cost(space: AssignmentSpace) -> torch.Tensor:
    """L of every assignment in index order, (A,) in 0..1; all 0 where there is only one total."""
    total = space.all().sum(-1).double()
    return (total - space.min_tokens) / max(1, space.max_tokens - space.min_tokens)


def _log_magnitude(x: torch.Tensor, grid: int, side: int) -> torch.Tensor:
    """Means of log(|x| + floor), shifted and scaled to about -1 .. 1 on ordinary video, of (.., grid^2, P).

    They are over squares of `side` x `side` cells, -> (.., (grid / side)^2, P).
    """
    x = x.abs().add_(_FLOOR).float().unflatten(-2, (grid // side, side, grid // side, side))
    # A product of a row's few magnitudes is far from the limits of float32, and its logarithm is the sum of theirs.
    logs = x.prod(-2).log().sum(-3)
    return logs.flatten(-3, -2).div_(side**2).add_(2).div_(2)


@dataclass
class EvatokRouterOutput(ModelOutput):
    """Output of `EvatokRouter.forward`.

    Attributes:
        loss: cross-entropy with the labels, where they were given.
        logits: (B, A) fp32, of the assignments in index order.
        qualities: (B, A) fp32, the predicted Q of each assignment; None for a router of one preference.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    qualities: torch.Tensor | None = None


class EvatokRouter(EvatokBaseModel):
    """The router. See the module docstring for the method and `EvatokRouterConfig` for sizes."""

    config_class = EvatokRouterConfig
    base_model_prefix = "evatok_router"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ViTLayer"]
    _auto_class = "AutoModel"

    def __init__(self, config: EvatokRouterConfig):
        super().__init__(config)
        self.assignment_space = config.assignment_space
        dim, grid = config.hidden_size, config.grid_size // config.pooling
        positions = config.num_blocks * grid**2
        patch_dim = config.num_channels * config.frames_per_block * config.patch_size**2
        spectral = config.patch_basis == "log-spectrum"
        self.patch_embedding = nn.Linear((3 if spectral else 1) * patch_dim, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if config.position_embedding == "learned":
            self.positions = nn.Parameter(torch.empty(1 + positions, dim))
        else:
            self.register_buffer("positions", torch.empty(1 + positions, dim), persistent=False)
        if config.patch_basis != "pixels":
            self.register_buffer("scale", torch.empty(patch_dim), persistent=False)
            channels, frames, rows, columns = config.patch_shape
            for name, size in (("depth", channels * frames), ("area", rows * columns)):
                self.register_buffer(f"transform_{name}", torch.empty(size, size), persistent=False)
        if config.pooling > 1:
            shape = grid**2, config.grid_size**2
            self.register_buffer("pool", torch.empty(shape), persistent=False)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.head = nn.Linear(dim, len(self.assignment_space))
        self.register_buffer("cost", torch.empty(len(self.assignment_space)), persistent=False)
        self.post_init()

    def forward(
        self,
        pixel_values_videos: torch.Tensor,
        quality: float | torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        targets: torch.Tensor | None = None,
    ) -> EvatokRouterOutput | tuple:
        """Scores all assignments of each clip.

        Args:
            pixel_values_videos: (B, F, C, H, W) in [-1, 1].
            quality: w_q, one for all clips or (B,); by default the configuration's, or 1.2.
            labels: (B,) assignment indices, the paper's labels, or (B, A) probabilities.
            return_dict: False returns a tuple.
            targets: the name that `labels` had.

        Raises:
            ValueError: a wrong video shape, a quality outside 0..2 or not the one that the router was trained for.
        """
        if targets is not None:
            warnings.warn("targets is labels now; call it that.", FutureWarning, stacklevel=2)
            labels = targets
        video = self.check_video(pixel_values_videos)
        output = self._score(video, self.check_quality(quality).to(video.device, non_blocking=True))
        if labels is not None:
            loss = F.cross_entropy(output.logits, labels.to(video.device, non_blocking=True))
            output = EvatokRouterOutput(loss, output.logits, output.qualities)
        return self._returned(output, return_dict)

    def _score(self, video: torch.Tensor, quality: torch.Tensor) -> EvatokRouterOutput:
        """`forward` of what has been checked."""
        patches = self._describe(video).flatten(1, 2)
        x = torch.cat([self.cls_token.expand(len(video), -1, -1), self.patch_embedding(patches)], dim=1)
        x = x + self.positions  # (B, 1 + T * G^2, D)
        for layer in self.layers:
            x = layer(x)
        scores = self.head(self.norm(x[:, 0])).float()  # (B, A)
        qualities = None
        if self.config.quality is None:
            qualities, weight = scores, quality.float().reshape(-1, 1)
            scores = (weight * qualities - (2 - weight) * self.cost.float()) / self.config.reward_temperature
        return EvatokRouterOutput(logits=scores, qualities=qualities)

    def _describe(self, video: torch.Tensor) -> torch.Tensor:
        """Clips (B, F, C, H, W) to patches as the embedding takes them, (B, T, (G / pooling)^2, P or 3 P)."""
        if self.config.patch_basis == "pixels":
            return self._pooled(patchify(video, self.config.num_blocks, self.config.patch_size))
        spectrum = self._spectrum(video)
        scaled = self._pooled(spectrum) * self.scale
        if self.config.patch_basis != "log-spectrum":
            return scaled
        sizes = self.config.grid_size, self.config.pooling
        logs = _log_magnitude(spectrum, *sizes)
        changes = _log_magnitude(spectrum[:, 1:] - spectrum[:, :-1], *sizes)
        changes = F.pad(changes, (0, 0, 0, 0, 1, 0), value=_LOG_OF_NOTHING)  # none before the first block
        return torch.cat([scaled, logs.to(scaled.dtype), changes.to(scaled.dtype)], dim=-1)

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.config.pooling == 1 else self.pool @ x

    def _spectrum(self, video: torch.Tensor) -> torch.Tensor:
        """`cosine_transform` of all patches of clips (B, F, C, H, W), -> (B, T, G^2, P).

        In two products, which take a tenth of the one large product: one over frames and channels where they lie, one
        over the area of the patches.
        """
        c = self.config
        x = video.unflatten(1, (c.num_blocks, c.frames_per_block)).flatten(2, 3).flatten(3)  # (B, T, F / T * C, H * W)
        x = (self.transform_depth @ x).unflatten(-1, (c.grid_size, c.patch_size) * 2)  # (B, T, .., G, p, G, p)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(-2).flatten(2, 3)  # (B, T, G^2, C * F / T, p * p)
        return F.linear(x, self.transform_area).flatten(-2)

    def assign(
        self, pixel_values_videos: torch.Tensor, quality: float | torch.Tensor | None = None, exact: bool | None = None
    ) -> torch.Tensor:
        """The lengths that each clip gets.

        Args:
            pixel_values_videos: (B, F, C, H, W) in [-1, 1].
            quality: w_q, one for all clips or (B,); by default the configuration's, or 1.2.
            exact: True takes each clip on its own, so that a clip's lengths do not depend on its batch-mates; False all
                in one pass, where scores that are equal within rounding may change places. By default True on a CPU,
                False elsewhere.

        Returns:
            (B, T) int64 on the CPU.

        Raises:
            ValueError: as `forward`.
        """
        scores = self._scores(pixel_values_videos, quality, exact)
        return self._assignments[self.choose(scores.logits)]

    def predict(self, pixel_values_videos: torch.Tensor, exact: bool | None = None) -> torch.Tensor:
        """The qualities of all assignments of each clip, (B, F, C, H, W) -> (B, A) on the CPU; `exact` as of `assign`.

        Raises:
            ValueError: a wrong video shape.
        """
        return self._scores(pixel_values_videos, None, exact).qualities.cpu()

    @torch.inference_mode()  # 4 to 9 % quicker than without gradients alone, for a small router
    def _scores(
        self, pixel_values_videos: torch.Tensor, quality: float | torch.Tensor | None, exact: bool | None
    ) -> EvatokRouterOutput:
        video = self.check_video(pixel_values_videos)
        weights = self.check_quality(quality).to(video.device, non_blocking=True).expand(len(video))
        if not len(video):
            nothing = torch.empty(0, len(self.assignment_space))
            return EvatokRouterOutput(logits=nothing, qualities=nothing)
        if not self._exact(exact):
            return self._score(video, weights)
        found = [self._score(video[clip : clip + 1], weights[clip]) for clip in range(len(video))]
        return EvatokRouterOutput(
            **{name: torch.cat([one[name] for one in found]) for name in found[0]}  # of tensors that are there
        )

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The assignments of the largest logits, (B, A) -> (B,) int64 on the CPU; of equal ones the shortest."""
        return self._by_tokens[logits.cpu()[:, self._by_tokens].argmax(-1)]

    @cached_property
    def _assignments(self) -> torch.Tensor:
        with torch.inference_mode(False):  # they outlive the first call, whatever that is
            return self.assignment_space.all()

    @cached_property
    def _by_tokens(self) -> torch.Tensor:
        with torch.inference_mode(False):
            return self._assignments.sum(-1).argsort(stable=True)

    def check_quality(self, quality: float | torch.Tensor | None) -> torch.Tensor:
        """The w_q to use, float64; None is the router's own or the default. Raises ValueError for an unfit one."""
        own = self.config.quality
        if quality is None:
            return check_quality(DEFAULT_QUALITY if own is None else own)
        quality = check_quality(quality)
        if own is not None and not torch.allclose(quality, quality.new_tensor(own)):
            raise ValueError(
                f"this router was trained for quality {own} alone, got {quality.tolist()}; leave quality out, or use a "
                "router that was trained for every quality."
            )
        return quality

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EvatokRouter):
            self._draw(module.cls_token, self.config.initializer_range)
            self._reset_tables()

    def _reset_tables(self) -> None:
        """Fills what no checkpoint holds, and learned positions."""
        config = self.config
        if config.position_embedding == "learned":
            self._draw(self.positions, config.initializer_range)
        else:
            grid = config.grid_size // config.pooling
            cells = sincos_positions(config.num_blocks, grid, config.hidden_size).flatten(0, 1)
            init.copy_(self.positions, torch.cat([torch.zeros(1, config.hidden_size), cells]))
        if config.patch_basis != "pixels":
            # The analysis is the transform with its rows scaled.
            transform = cosine_transform(*config.patch_shape)
            init.copy_(self.scale, (patch_analysis(config.patch_shape) * transform).sum(1))
            channels, frames, rows, columns = config.patch_shape
            depth = cosine_transform(channels, frames).unflatten(1, (channels, frames))
            init.copy_(self.transform_depth, depth.transpose(1, 2).flatten(1))  # as frames come, channels within them
            init.copy_(self.transform_area, cosine_transform(rows, columns))
        if config.pooling > 1:
            side = torch.eye(config.grid_size // config.pooling).repeat_interleave(config.pooling, 1) / config.pooling
            init.copy_(self.pool, torch.kron(side, side))  # means over squares of cells
        init.copy_(self.cost, token_cost(self.assignment_space).float())


def check_same_space(model: EvatokEncoderModel, router: EvatokRouter) -> None:
    """Raises ValueError unless the router scores the clips and the assignments of the tokenizer."""
    for field in ("block_lengths", "num_blocks", "num_frames", "image_size"):
        mine, other = getattr(model.config, field), getattr(router.config, field)
        if mine != other:
            raise ValueError(
                f"tokenizer and router disagree: {field} is {mine} in the tokenizer and {other} in the router; use the "
                "router that was trained for this tokenizer."
            )
