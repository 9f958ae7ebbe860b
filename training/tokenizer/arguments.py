"""Options of tokenizer training."""

from __future__ import annotations

from dataclasses import dataclass, field

from evatok_hf import EvatokConfig
from evatok_hf.data.clip_cutting import ClipConfig
from evatok_hf.metrics.perceptual import PERCEPTUAL_NAMES
from evatok_hf.models.modeling_evatok_router import check_quality
from training.common.arguments import parse_overrides
from training.common.optimizers import OPTIMIZERS
from training.common.options import ClipOptions, ModelOptions
from training.tokenizer.adversarial import AdversarialConfig
from training.tokenizer.alignment import DIRECTIONS

TRAINED_PARTS = ("all", "decoder")


@dataclass(kw_only=True)
class TokenizerArguments(ClipOptions, ModelOptions):
    """Options of tokenizer training. Defaults of the optimisation are GigaTok's."""

    val_data: str | None = field(default=None, metadata={"help": "Source of validation clips; none: no validation."})
    val_split: str = field(default="val", metadata={"help": "Split of the validation source."})
    # Model
    init_from: str | None = field(default=None, metadata={"help": "Checkpoint or Hub id whose weights to start from."})
    trained_parts: str = field(
        default="all",
        metadata={
            "help": "all, or decoder: encoder and codebook of --init_from stay as they are, so that tokens, routers "
            "and generators made with it go on being good for the new tokenizer."
        },
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa or eager (faster in bf16 on some CPUs)."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers to save memory."})
    compile: bool = field(default=False, metadata={"help": "torch.compile the layers (for long runs on a GPU)."})
    # Assignments
    assignment: str = field(
        default="random",
        metadata={
            "help": "random (stage 1: uniform over all assignments), uniform:N, or router:PATH (stage 4: what a "
            "router chooses for each clip)."
        },
    )
    quality: float | None = field(
        default=None,
        metadata={"help": "router: the preference w_q; none: the router's own, or drawn anew for each clip."},
    )
    quality_range: list[float] = field(
        default_factory=lambda: [0.8, 1.6], metadata={"help": "router: w_q are drawn between these: lo hi."}
    )
    random_fraction: float = field(
        default=0.0,
        metadata={"help": "router: share of clips that get a random assignment all the same, so that all stay usable."},
    )
    shared_assignment: bool = field(
        default=False,
        metadata={
            "help": "One random assignment, or one preference of the router, for all clips of a step, drawn anew each "
            "step: no or little padding, unbiased."
        },
    )
    # Clips
    freeze_probability: float = field(
        default=0.0, metadata={"help": "How often a clip stands still from a random frame of it on."}
    )
    channel_shuffle: float = field(
        default=0.0,
        metadata={"help": "Probability that the colour channels of a clip change places (small data sets)."},
    )
    splice_probability: float = field(
        default=0.0,
        metadata={"help": "How often a clip is cut, at a random frame, to what the next clip of its batch shows then."},
    )
    # Losses
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of the mean absolute error."})
    l2_weight: float = field(default=0.0, metadata={"help": "Weight of the mean squared error."})
    psnr_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mean log10 of the clips' mean squared errors: minus a tenth of their mean PSNR, to "
            "which easy clips count as much as hard ones."
        },
    )
    spectral_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the squared error of patches' cosine transforms over usual amplitudes."},
    )
    spectral_end: int = field(
        default=0, metadata={"help": "The spectral weight falls linearly to 0 at this step; 0: it stays."}
    )
    perceptual: str = field(default="lpips-vgg", metadata={"help": f"none or one of {', '.join(PERCEPTUAL_NAMES)}."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of the perceptual term."})
    perceptual_start: int = field(default=0, metadata={"help": "Step from which the perceptual term counts."})
    perceptual_frames: int = field(default=0, metadata={"help": "Random frames a clip that it sees; 0: all."})
    perceptual_weights: str | None = field(default=None, metadata={"help": "Local torchvision backbone for LPIPS."})
    # Adversarial losses
    adversarial: str = field(
        default="none",
        metadata={
            "help": "none, patch (PatchGAN), semantic (heads on a frozen VideoMAE; paper: final tokenizer) or both."
        },
    )
    adversarial_weight: float = field(default=0.5, metadata={"help": "Weight of each discriminator's generator loss."})
    discriminator_start: int = field(default=20_000, metadata={"help": "First step of the adversarial game."})
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the discriminators; none: the tokenizer's."}
    )
    adaptive_weight: bool = field(
        default=False, metadata={"help": "Scale generator losses by the ratio of gradient norms (VQGAN)."}
    )
    lecam_weight: float = field(default=0.0, metadata={"help": "Weight of the LeCAM regulariser (LARP: 0.001)."})
    augment_probability: float = field(
        default=1.0, metadata={"help": "How often a clip is augmented before discriminators see it."}
    )
    patch_channels: int = field(default=64, metadata={"help": "Channels of PatchGAN's first layer."})
    semantic_teacher: str = field(
        default="MCG-NJU/videomae-base", metadata={"help": "VideoMAE of the semantic discriminator: folder or Hub id."}
    )
    # Alignment of the decoder's features
    alignment: str = field(
        default="none",
        metadata={"help": "none, or the frozen V-JEPA2 (the paper: facebook/vjepa2-vitl-fpc64-256) or VideoMAE."},
    )
    alignment_weight: float = field(default=0.7, metadata={"help": "Weight of the alignment loss."})
    alignment_direction: str = field(
        default="teacher",
        metadata={"help": "Which side is projected to the other: teacher (the paper) or decoder (REPA, GigaTok)."},
    )
    alignment_layer: int = field(default=3, metadata={"help": "Decoder layer whose output is aligned, from 1."})
    # Schedule of the quantiser
    blend_start: int = field(default=0, metadata={"help": "Step from which quantisation is blended in."})
    blend_end: int = field(default=0, metadata={"help": "Step from which quantisation is complete."})
    # Optimisation
    steps: int = 1_000_000
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes an optimiser step."})
    optimizer: str = field(
        default="adamw",
        metadata={"help": "adamw, or muon: Muon for the matrices of the layers and AdamW for all else."},
    )
    muon_learning_rate: float = field(default=0.02, metadata={"help": "Peak learning rate of Muon."})
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 0
    cooldown_steps: int = field(
        default=0,
        metadata={
            "help": "The learning rate stays at its peak until so many steps before the end, then falls linearly; a "
            "run stopped before can be resumed with more --steps. 0: a cosine over all steps."
        },
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta 1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW beta 2."})
    weight_decay: float = 1e-4
    max_grad_norm: float = 10.0
    # Bookkeeping
    save_every: int = 5000
    val_clips_per_video: int = field(default=2, metadata={"help": "Validation clips of a video."})

    def __post_init__(self):
        super().__post_init__()
        self.at_least_one("val_clips_per_video")
        kind, _, value = self.assignment.partition(":")
        if not (self.assignment == "random" or (kind == "uniform" and value.isdigit()) or (kind == "router" and value)):
            raise ValueError(f"--assignment must be random, uniform:N or router:PATH, got {self.assignment!r}.")
        if kind == "uniform" and self.shared_assignment:
            raise ValueError(f"--shared_assignment is for random and router assignments, not {self.assignment}.")
        if kind != "router" and self.quality is not None:
            raise ValueError("--quality needs --assignment router:PATH.")
        if self.quality is not None:
            check_quality(self.quality)
        self.fractions("random_fraction", "splice_probability")
        if self.splice_probability and self.batch_size < 2:
            raise ValueError("--splice_probability needs a --batch_size of 2 or more: clips are cut to one another.")
        self.one_of(optimizer=OPTIMIZERS, trained_parts=TRAINED_PARTS, alignment_direction=DIRECTIONS)
        if not 0 <= self.cooldown_steps <= self.steps:
            raise ValueError(f"--cooldown_steps must lie in 0..{self.steps} (--steps), got {self.cooldown_steps}.")
        if len(self.quality_range) != 2 or not 0 <= self.quality_range[0] <= self.quality_range[1] <= 2:
            raise ValueError(f"--quality_range must be lo hi with 0 <= lo <= hi <= 2, got {self.quality_range}.")
        if self.trained_parts == "decoder" and self.init_from is None:
            raise ValueError("--trained_parts decoder needs --init_from, whose encoder and codebook it keeps.")
        if self.perceptual != "none" and self.perceptual not in PERCEPTUAL_NAMES:
            raise ValueError(f"--perceptual must be none or one of {list(PERCEPTUAL_NAMES)}, got {self.perceptual!r}.")
        depth = self.model_config().decoder_num_layers
        if self.alignment != "none" and not 1 <= self.alignment_layer <= depth:
            raise ValueError(f"--alignment_layer must lie in 1..{depth}, got {self.alignment_layer}.")
        self.adversarial_config()
        if self.blend_end < self.blend_start:
            raise ValueError("--blend_end must not lie before --blend_start.")

    def adversarial_config(self) -> AdversarialConfig:
        return AdversarialConfig(
            kind=self.adversarial,
            patch_weight=self.adversarial_weight,
            semantic_weight=self.adversarial_weight,
            start_step=self.discriminator_start,
            lecam_weight=self.lecam_weight,
            adaptive=self.adaptive_weight,
            augment_probability=self.augment_probability,
            patch_channels=self.patch_channels,
        )

    def model_config(self) -> EvatokConfig:
        return EvatokConfig.from_preset(self.preset, **parse_overrides(self.model_overrides, EvatokConfig))

    def clip_config(self, config: EvatokConfig) -> ClipConfig:
        """How clips are cut to train a model of these sizes."""
        return ClipConfig(
            num_frames=config.num_frames,
            image_size=config.image_size,
            strides=tuple(self.strides),
            scale=tuple(self.scale),
            freeze_probability=self.freeze_probability,
            clips_per_video=self.clips_per_video,
        )
