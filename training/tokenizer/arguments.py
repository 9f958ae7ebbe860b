"""Options of tokenizer training."""

from __future__ import annotations

from dataclasses import dataclass

from evatok_hf import EvatokConfig
from evatok_hf.metrics.perceptual import PERCEPTUAL_NAMES
from evatok_hf.models.modeling_evatok_router import check_quality
from training.common.arguments import parse_overrides
from training.common.fields import option
from training.common.optimizers import OPTIMIZERS
from training.common.options import ClipOptions, ModelOptions
from training.tokenizer.adversarial import KINDS


@dataclass(kw_only=True)
class TokenizerArguments(ClipOptions, ModelOptions):
    """Options of tokenizer training. Defaults of the optimisation are GigaTok's."""

    val_data: str | None = option("Source of validation clips; none: no validation.", None)
    val_split: str = option("Split of the validation source.", "val")
    # Model
    init_from: str | None = option("Checkpoint or Hub id whose weights to start from.", None)
    linear_start: int = option(
        "Training clips from which a new model with token_patches gets its linear codec and its codebook.",
        0,
    )
    trained_parts: str = option(
        "all, or decoder: encoder and codebook of --init_from stay as they are, so that tokens, routers "
        "and generators made with it go on being good for the new tokenizer. With token_patches always so.",
        "all",
    )
    attn_implementation: str = option("sdpa or eager (faster in bf16 on some CPUs).", "sdpa")
    gradient_checkpointing: bool = option("Recompute layers to save memory.", False)
    compile: bool = option("torch.compile the layers (for long runs on a GPU).", False)
    # Assignments
    assignment: str = option(
        "random (stage 1: uniform over all assignments), uniform:N, or router:PATH (stage 4: what a "
        "router chooses for each clip).",
        "random",
    )
    quality: float | None = option(
        "router: the preference w_q; none: the router's own, or drawn anew for each clip.", None
    )
    quality_range: list[float] = option("router: w_q are drawn between these: lo hi.", [0.8, 1.6])
    random_fraction: float = option(
        "router: share of clips that get a random assignment all the same, so that all stay usable.", 0.0
    )
    shared_assignment: bool = option(
        "One random assignment, or one preference of the router, for all clips of a step, drawn anew each "
        "step: no or little padding, unbiased.",
        False,
    )
    # Clips
    freeze_probability: float = option("How often a clip stands still from a random frame of it on.", 0.0)
    channel_shuffle: float = option(
        "Probability that the colour channels of a clip change places (small data sets).", 0.0
    )
    splice_probability: float = option(
        "How often a clip is cut, at a random frame, to what the next clip of its batch shows then.", 0.0
    )
    # Losses
    l1_weight: float = option("Weight of the mean absolute error.", 1.0)
    l2_weight: float = option("Weight of the mean squared error.", 0.0)
    psnr_weight: float = option(
        "Weight of the mean log10 of the clips' mean squared errors: minus a tenth of their mean PSNR, to "
        "which easy clips count as much as hard ones.",
        0.0,
    )
    spectral_weight: float = option(
        "Weight of the squared error of patches' cosine transforms over usual amplitudes.", 0.0
    )
    spectral_end: int = option("The spectral weight falls linearly to 0 at this step; 0: it stays.", 0)
    perceptual: str = option(f"none or one of {', '.join(PERCEPTUAL_NAMES)}.", "lpips-vgg")
    perceptual_weight: float = option("Weight of the perceptual term.", 1.0)
    perceptual_start: int = option("Step from which the perceptual term counts.", 0)
    perceptual_frames: int = option("Random frames a clip that it sees; 0: all.", 0)
    perceptual_weights: str | None = option("Local torchvision backbone for LPIPS.", None)
    # Adversarial losses
    adversarial: str = option(
        "none, patch (PatchGAN), semantic (heads on a frozen VideoMAE; paper: final tokenizer) or both.", "none"
    )
    adversarial_weight: float = option("Weight of each discriminator's generator loss.", 0.5)
    discriminator_start: int = option("First step of the adversarial game.", 20_000)
    discriminator_learning_rate: float | None = option(
        "Peak learning rate of the discriminators; none: the tokenizer's.", None
    )
    adaptive_weight: bool = option("Scale generator losses by the ratio of gradient norms (VQGAN).", False)
    lecam_weight: float = option("Weight of the LeCAM regulariser (LARP: 0.001).", 0.0)
    augment_probability: float = option("How often a clip is augmented before discriminators see it.", 1.0)
    patch_channels: int = option("Channels of PatchGAN's first layer.", 64)
    semantic_teacher: str = option("VideoMAE of the semantic discriminator: folder or Hub id.", "MCG-NJU/videomae-base")
    # Alignment of the decoder's features
    alignment: str = option(
        "none, or the frozen V-JEPA2 (the paper: facebook/vjepa2-vitl-fpc64-256) or VideoMAE.", "none"
    )
    alignment_weight: float = option("Weight of the alignment loss.", 0.7)
    alignment_direction: str = option(
        "Which side is projected to the other: teacher (the paper) or decoder (REPA, GigaTok).", "teacher"
    )
    alignment_layer: int = option("Decoder layer whose output is aligned, from 1.", 3)
    # Schedule of the quantiser
    blend_start: int = option("Step from which quantisation is blended in.", 0)
    blend_end: int = option("Step from which quantisation is complete.", 0)
    # Optimisation
    steps: int = 1_000_000
    gradient_accumulation_steps: int = option("Forward passes an optimiser step.", 1)
    optimizer: str = option("adamw, or muon: Muon for the matrices of the layers and AdamW for all else.", "adamw")
    muon_learning_rate: float = option("Peak learning rate of Muon.", 0.02)
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 0
    cooldown_steps: int = option(
        "The learning rate stays at its peak until so many steps before the end, then falls linearly; a "
        "run stopped before can be resumed with more --steps. 0: a cosine over all steps.",
        0,
    )
    weight_decay: float = 1e-4
    max_grad_norm: float = 10.0
    # Bookkeeping
    save_every: int = 5000
    val_clips_per_video: int = option("Validation clips of a video.", 2)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "val_clips_per_video", "patch_channels")
        kind, _, value = self.assignment.partition(":")
        if not (self.assignment == "random" or (kind == "uniform" and value.isdigit()) or (kind == "router" and value)):
            raise ValueError(f"--assignment must be random, uniform:N or router:PATH, got {self.assignment!r}.")
        if kind == "uniform" and self.shared_assignment:
            raise ValueError(f"--shared_assignment is for random and router assignments, not {self.assignment}.")
        if kind != "router" and self.quality is not None:
            raise ValueError("--quality needs --assignment router:PATH.")
        if self.quality is not None:
            check_quality(self.quality)
        self.at_least(0, "adversarial_weight", "discriminator_start", "lecam_weight")
        self.fractions("random_fraction", "splice_probability", "augment_probability", "channel_shuffle")
        if self.splice_probability and self.batch_size < 2:
            raise ValueError("--splice_probability needs a --batch_size of 2 or more: clips are cut to one another.")
        self.one_of(trained_parts=("all", "decoder"), alignment_direction=("teacher", "decoder"))
        self.one_of(optimizer=OPTIMIZERS, adversarial=KINDS, perceptual=("none", *PERCEPTUAL_NAMES))
        if not 0 <= self.cooldown_steps <= self.steps:
            raise ValueError(f"--cooldown_steps must lie in 0..{self.steps} (--steps), got {self.cooldown_steps}.")
        if len(self.quality_range) != 2 or not 0 <= self.quality_range[0] <= self.quality_range[1] <= 2:
            raise ValueError(f"--quality_range must be lo hi with 0 <= lo <= hi <= 2, got {self.quality_range}.")
        if self.trained_parts == "decoder" and self.init_from is None:
            raise ValueError("--trained_parts decoder needs --init_from, whose encoder and codebook it keeps.")
        if self.linear_start < 0 or (self.linear_start and (self.init_from or not self.model_config().token_patches)):
            raise ValueError(
                f"--linear_start is {self.linear_start}; it takes a number of clips, for a new model (no --init_from) "
                "with token_patches."
            )
        depth = self.model_config().decoder_num_layers
        if self.alignment != "none" and not 1 <= self.alignment_layer <= depth:
            raise ValueError(f"--alignment_layer must lie in 1..{depth}, got {self.alignment_layer}.")
        if self.blend_end < self.blend_start:
            raise ValueError("--blend_end must not lie before --blend_start.")

    def model_config(self) -> EvatokConfig:
        return EvatokConfig.from_preset(self.preset, **parse_overrides(self.model_overrides, EvatokConfig))
