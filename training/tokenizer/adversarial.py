"""The adversarial part of tokenizer training: discriminators with their teacher, and both sides' losses.

In a training loop, from the step on in which it is `active`, with `adversarial.networks` prepared by accelerate as
`networks` and an optimiser of its own:

    draws = torch.rand(clips, DRAWS)                            # of all processes; each takes its own rows
    loss, terms = adversarial.generator_terms(reconstruction, draws)
    total = total + loss
    ...
    loss, terms = adversarial.discriminator_terms(video, reconstruction, networks, draws)
    accelerator.backward(loss)

Both are means over the given clips, so that gradients averaged over processes are those of all clips together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from training.tokenizer.augmentation import augment
from training.tokenizer.discriminators import (
    LeCam,
    PatchDiscriminator,
    SemanticHeads,
    adaptive_weight,
    hinge_discriminator_loss,
)
from training.tokenizer.teachers import Teacher

if TYPE_CHECKING:
    from training.tokenizer.arguments import TokenizerArguments

KINDS = {"none": (), "patch": ("patch",), "semantic": ("semantic",), "both": ("patch", "semantic")}
Terms = tuple[torch.Tensor, dict[str, torch.Tensor]]


class Discriminators(nn.Module):
    """All that is trained of the discriminators, in one module that is called once for a backward pass.

    It is no `ModuleDict`, which earlier releases of torch refuse to shard.
    """

    def __init__(self, networks: dict[str, nn.Module]):
        super().__init__()
        for part, network in networks.items():
            self.add_module(part, network)

    def forward(self, video: torch.Tensor, readouts: list[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """(B, F, 3, H, W) and the teacher's features of it, a (B, L, C) a readout -> logits (B, L) of each part."""
        return {part: network(readouts if part == "semantic" else video) for part, network in self.named_children()}


class AdversarialLoss:
    """Both sides' losses.

    Args:
        args: which discriminators there are, and how they count.
        teacher: of the semantic discriminator, None where there is none; not part of any checkpoint.

    Attributes:
        networks: what is trained, None without discriminators. Prepare it with accelerate and pass the outcome to
            `discriminator_terms`; keep `state_dict` of this object beside its weights (LeCAM's moving means).
    """

    def __init__(self, args: TokenizerArguments, teacher: Teacher | None = None):
        self.args, self.teacher, parts = args, teacher, KINDS[args.adversarial]
        networks = {}
        if "patch" in parts:
            networks["patch"] = PatchDiscriminator(args.patch_channels)
        if "semantic" in parts:
            networks["semantic"] = SemanticHeads(teacher.width, len(teacher.layers))
        self.networks = Discriminators(networks) if networks else None
        self.lecam = {part: LeCam(args.lecam_weight) for part in parts} if args.lecam_weight else {}

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
        """True for a step in which both sides are trained."""
        return self.networks is not None and step >= self.args.discriminator_start

    def generator_terms(
        self,
        reconstruction: torch.Tensor,
        draws: torch.Tensor,
        reconstruction_loss: torch.Tensor | None = None,
        last_weight: torch.Tensor | None = None,
    ) -> Terms:
        """The tokenizer's loss: high where the discriminators tell its clips from real ones.

        It runs `self.networks` themselves rather than a wrapped copy, frozen and in evaluation mode, so that no
        gradient reaches them and their state (spectral norms) changes in their own step only.

        Args:
            reconstruction: (B, F, 3, H, W), with its graph.
            draws: of the augmentation of these clips, (B, DRAWS).
            reconstruction_loss, last_weight: for the adaptive weight, see `adaptive_weight`.

        Returns:
            The weighted loss and its unweighted terms, detached.
        """
        # Listed before the pass: sharding shows other parameters during and after it.
        trained = list(self.networks.parameters())
        for parameter in trained:
            parameter.requires_grad_(False)
        self.networks.eval()
        logits = self._logits(self.networks, self._augmented(reconstruction, draws))
        self.networks.train()
        for parameter in trained:
            parameter.requires_grad_(True)
        total, terms = 0.0, {}
        for part, values in logits.items():
            loss, weight = -values.mean(), self.args.adversarial_weight
            if self.args.adaptive_weight:
                ratio = adaptive_weight(reconstruction_loss, loss, last_weight)
                terms[f"{part}_adaptive_weight"] = ratio
                weight = weight * ratio
            total = total + weight * loss
            terms[f"{part}_generator"] = loss.detach()
        return total, terms

    def discriminator_terms(
        self, real: torch.Tensor, fake: torch.Tensor, networks: nn.Module, draws: torch.Tensor
    ) -> Terms:
        """The discriminators' loss: hinge, and LeCAM.

        Real and fake clips go through `networks` in one call, as DistributedDataParallel needs it.

        Args:
            real: (B, F, 3, H, W) in [-1, 1].
            fake: their reconstructions; no gradient reaches them.
            networks: `self.networks`, or what accelerate made of them.
            draws: of the augmentation of these clips, (B, DRAWS), the same for real and fake.

        Returns:
            The loss and its terms, detached, with the mean logits.
        """
        logits = self._logits(networks, torch.cat([self._augmented(clips, draws) for clips in (real, fake.detach())]))
        total, terms = 0.0, {}
        for part, values in logits.items():
            real_logits, fake_logits = values.chunk(2)
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

    def _augmented(self, clips: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        return augment(clips.float(), draws, self.args.augment_probability)

    def _logits(self, networks: nn.Module, video: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = networks(video, None if self.teacher is None else self.teacher.features(video))
        return {part: values.float() for part, values in logits.items()}
