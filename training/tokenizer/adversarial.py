"""The adversarial part of tokenizer training: discriminators with their teacher, their losses, when and how they count.

In a training loop, `adversarial.networks` prepared by accelerate as `networks`, with an optimiser of its own:

    draws = adversarial.draw(batch_size, generator)             # of all processes' clips; rows(..) for this one's
    loss, terms = adversarial.generator_terms(reconstruction, step, draws)
    total = total + loss                                        # unless it is None: before the start
    ...
    loss, terms = adversarial.discriminator_terms(video, reconstruction, networks, step, draws)
    accelerator.backward(loss)

Both are means over the given clips, so that gradients averaged over processes are those of all clips together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from training.tokenizer.augmentation import ClipAugmentation, augment, draw_augmentation
from training.tokenizer.discriminators import (
    LeCam,
    PatchDiscriminator,
    SemanticHeads,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from training.tokenizer.teachers import VideoMAETeacher

KINDS = {"none": (), "patch": ("patch",), "semantic": ("semantic",), "both": ("patch", "semantic")}


@dataclass(frozen=True)
class AdversarialConfig:
    """Which discriminators there are, and how they count.

    Attributes:
        kind: none, patch (PatchGAN on pixels), semantic (heads on a frozen VideoMAE, as in the paper) or both.
        patch_weight, semantic_weight: of each one's generator loss (GigaTok: 0.5; the paper gives none).
        start_step: first step in which either side is trained.
        lecam_weight: of LeCAM in the discriminator's loss (LARP: 0.001); 0 leaves it out.
        adaptive: multiply each generator loss with VQGAN's ratio of gradient norms.
        augment_probability: of a clip being augmented before any discriminator sees it (GigaTok: 1).
        patch_channels, patch_layers: size of the PatchGAN.
    """

    kind: str = "none"
    patch_weight: float = 0.5
    semantic_weight: float = 0.5
    start_step: int = 0
    lecam_weight: float = 0.0
    adaptive: bool = False
    augment_probability: float = 1.0
    patch_channels: int = 64
    patch_layers: int = 3

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"the adversarial kind must be one of {list(KINDS)}, got {self.kind!r}.")
        for name in ("patch_weight", "semantic_weight", "start_step", "lecam_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not 0 <= self.augment_probability <= 1:
            raise ValueError(f"augment_probability must lie in [0, 1], got {self.augment_probability}.")

    @property
    def parts(self) -> tuple[str, ...]:
        return KINDS[self.kind]


class DiscriminatorNetworks(nn.Module):
    """All that is trained of the discriminators, in one module that is called once for a backward pass."""

    def __init__(self, config: AdversarialConfig, teacher: VideoMAETeacher | None = None):
        super().__init__()
        if "patch" in config.parts:
            self.patch = PatchDiscriminator(config.patch_channels, config.patch_layers)
        if "semantic" in config.parts:
            self.semantic = SemanticHeads(teacher.width, len(teacher.layers))
        self.parts = config.parts

    def forward(self, video: torch.Tensor, readouts: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """(B, F, 3, H, W) and the teacher's features of it, a (B, L, C) a readout -> logits (B, L) of each part."""
        inputs = {"patch": video, "semantic": readouts}
        return {part: getattr(self, part)(inputs[part]) for part in self.parts}


class AdversarialLoss:
    """Both sides' losses.

    Args:
        config: which, and how they count.
        teacher: of the semantic discriminator; not part of any checkpoint.

    Attributes:
        networks: what is trained, None for the kind "none". Prepare it with accelerate and pass the outcome to
            `discriminator_terms`; keep `state_dict` of this object beside its weights (LeCAM's moving means).

    Raises:
        ValueError: the semantic kind without a teacher.
    """

    def __init__(self, config: AdversarialConfig, teacher: VideoMAETeacher | None = None):
        if "semantic" in config.parts and teacher is None:
            raise ValueError(
                f"the adversarial kind {config.kind!r} needs a VideoMAE teacher; name one, or choose patch."
            )
        self.config = config
        self.teacher = teacher if "semantic" in config.parts else None
        self.networks = DiscriminatorNetworks(config, teacher) if config.parts else None
        self.lecam = {part: LeCam(config.lecam_weight) for part in config.parts} if config.lecam_weight else {}

    def to(self, device: torch.device | str) -> AdversarialLoss:
        """Moves networks and teacher."""
        for part in (self.networks, self.teacher):
            if part is not None:
                part.to(device)
        return self

    def state_dict(self) -> dict:
        return {part: lecam.state_dict() for part, lecam in self.lecam.items()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when the state is of other discriminators."""
        if set(state) != set(self.lecam):
            raise ValueError(
                f"the checkpoint has LeCAM's means for {sorted(state)}, this run needs them for {sorted(self.lecam)}; "
                "resume with the settings that it was made with."
            )
        for part, lecam in self.lecam.items():
            lecam.load_state_dict(state[part])

    def active(self, step: int) -> bool:
        """Whether either side is trained in this step."""
        return bool(self.config.parts) and step >= self.config.start_step

    def draw(self, batch_size: int, generator: torch.Generator) -> ClipAugmentation:
        """The augmentation of a step's clips, for both sides. See `draw_augmentation`."""
        return draw_augmentation(batch_size, generator, self.config.augment_probability)

    def generator_terms(
        self,
        reconstruction: torch.Tensor,
        step: int,
        augmentation: ClipAugmentation,
        reconstruction_loss: torch.Tensor | None = None,
        last_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The tokenizer's loss: high where the discriminators tell its clips from real ones.

        It runs `self.networks` themselves rather than a wrapped copy, frozen and in evaluation mode, so that no
        gradient reaches them and their state (spectral norms) changes in their own step only.

        Args:
            reconstruction: (B, F, 3, H, W), with its graph.
            step: of training.
            augmentation: of these B clips.
            reconstruction_loss, last_weight: for the adaptive weight, see `adaptive_weight`.

        Returns:
            The weighted loss and its unweighted terms, detached; None and nothing before the start.
        """
        if not self.active(step):
            return None, {}
        video = augment(reconstruction.float(), augmentation)
        readouts = None if self.teacher is None else self.teacher.features(video)
        with _frozen(self.networks):
            logits = self.networks(video, readouts)
        total, terms = torch.zeros((), device=video.device), {}
        for part, values in logits.items():
            loss = hinge_generator_loss(values.float())
            weight = getattr(self.config, f"{part}_weight")
            if self.config.adaptive:
                ratio = adaptive_weight(reconstruction_loss, loss, last_weight)
                terms[f"{part}_adaptive_weight"] = ratio
                weight = weight * ratio
            total = total + weight * loss
            terms[f"{part}_generator"] = loss.detach()
        return total, terms

    def discriminator_terms(
        self, real: torch.Tensor, fake: torch.Tensor, networks: nn.Module, step: int, augmentation: ClipAugmentation
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The discriminators' loss: hinge, and LeCAM.

        Real and fake clips go through `networks` in one call, as DistributedDataParallel needs it.

        Args:
            real: (B, F, 3, H, W) in [-1, 1].
            fake: their reconstructions; no gradient reaches them.
            networks: `self.networks`, or what accelerate made of them.
            step: of training.
            augmentation: of these B clips, the same for real and fake.

        Returns:
            The loss and its terms, detached, with the mean logits; None and nothing before the start.
        """
        if not self.active(step):
            return None, {}
        with torch.no_grad():
            video = torch.cat([augment(clips.float(), augmentation) for clips in (real, fake.detach())])
            readouts = None if self.teacher is None else self.teacher.features(video)
        logits = networks(video, readouts)
        total, terms = torch.zeros((), device=video.device), {}
        for part, values in logits.items():
            real_logits, fake_logits = values.float().chunk(2)
            loss = hinge_discriminator_loss(real_logits, fake_logits)
            terms[f"{part}_discriminator"] = loss.detach()
            terms[f"{part}_real_logit"] = real_logits.detach().mean()
            terms[f"{part}_fake_logit"] = fake_logits.detach().mean()
            total = total + loss
            if part in self.lecam:
                term = self.lecam[part](real_logits, fake_logits)
                terms[f"{part}_lecam"] = term.detach()
                total = total + term
        return total, terms


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients to the module's parameters, and in evaluation mode; afterwards as before."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    training = module.training
    module.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        module.train(training)
