"""Options of generator training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evatok_hf import EvatokGeneratorConfig
from evatok_hf.models.configuration_evatok import LAYOUTS
from training.common.arguments import choose_precision, parse_overrides
from training.common.hub_push import HubArguments
from training.tokenize_dataset import TokenizeArguments

# What the tokens say, or an option of its own.
_NOT_OVERRIDDEN = ("layout", "num_classes", "class_names", "known_frames", "tokenizer_fingerprint")


@dataclass
class GeneratorArguments(HubArguments):
    """Options of generator training. Defaults of the optimisation are LARP's."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints, samples, logs and the trained generator."})
    train_tokens: str | None = field(
        default=None, metadata={"help": "Tokens to learn: folder of training/tokenize_dataset.py, or Hub data set."}
    )
    train_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Instead of tokens, videos that are tokenized on the way (folders, WebDataset globs or Hub data "
            "sets; SOURCE=WEIGHT mixes several by weight)."
        },
    )
    val_tokens: str | None = field(default=None, metadata={"help": "Tokens of the validation split; none: none."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Checkpoint or Hub id that the tokens are of, with its router; the bundled one."},
    )
    # Model
    preset: str = field(default="tiny", metadata={"help": "Model size: tiny, small, 327m or 633m."})
    model_overrides: str = field(
        default="{}", metadata={"help": "JSON of EvatokGeneratorConfig fields; they replace the preset's."}
    )
    layout: str = field(default="length-first", metadata={"help": f"How blocks are marked: {' or '.join(LAYOUTS)}."})
    init_from: str | None = field(default=None, metadata={"help": "Generator (folder or Hub id) to start from."})
    attn_implementation: str = field(
        default="sdpa",
        metadata={"help": "sdpa, eager, or split (one sequence at a time; by far the quickest on CPUs)."},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers to save memory."})
    compile: bool = field(default=False, metadata={"help": "torch.compile the layers (for long runs on a GPU)."})
    # Sequences
    row_length: int | None = field(
        default=None, metadata={"help": "Places of a row, into which sequences are packed; the longest possible one."}
    )
    rows: int = field(default=8, metadata={"help": "Rows a process and forward pass."})
    label_dropout: float = field(default=0.1, metadata={"help": "How often a clip loses its class."})
    prediction: float = field(
        default=0.0, metadata={"help": "Share of the sequences that are frame prediction; the tokens need conditions."}
    )
    prediction_label_dropout: float = field(
        default=0.5, metadata={"help": "How often a clip of frame prediction loses its class."}
    )
    condition_dropout: float = field(
        default=0.1,
        metadata={"help": "How often a clip of frame prediction loses condition and class both, for guidance."},
    )
    # Videos that are tokenized on the way, as by training/tokenize_dataset.py
    train_split: str = field(default="train", metadata={"help": "Split of the sources of videos."})
    batch_size: int = field(default=16, metadata={"help": "Clips a process and forward pass, in any number of rows."})
    strides: list[int] = field(default_factory=lambda: [1], metadata={"help": "Frame strides to draw from."})
    scale: list[float] = field(
        default_factory=lambda: [1.0, 1.0], metadata={"help": "Side of the square crop over the short side: lo hi."}
    )
    random_position: bool = field(default=False, metadata={"help": "Crop anywhere rather than at the centre."})
    flip_probability: float = field(default=0.5, metadata={"help": "How often a view is mirrored left to right."})
    random_start: bool = field(default=True, metadata={"help": "Start anywhere rather than evenly spaced."})
    clips_per_video: int = field(default=1, metadata={"help": "Views of a video each time it comes up."})
    shuffle_buffer: int = field(default=256, metadata={"help": "Undecoded examples that streams are shuffled among."})
    num_workers: int = field(default=1, metadata={"help": "Loader processes a training process."})
    strategy: str | None = field(default=None, metadata={"help": "How lengths are chosen; by default by the router."})
    quality: float | None = field(default=None, metadata={"help": "Weight of quality, 0 to 2, of the router (1.2)."})
    uniform: int | None = field(default=None, metadata={"help": "The same tokens for every block."})
    lengths: str | None = field(default=None, metadata={"help": "Tokens of each block, such as 128,32,16,64."})
    budget_per_clip: int | None = field(default=None, metadata={"help": "At most so many tokens for each clip."})
    known_frames: int | None = field(default=None, metadata={"help": "Known frames of frame prediction (LARP: 5)."})
    # Optimisation
    steps: int = field(default=100_000, metadata={"help": "Optimiser steps."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes an optimiser step."})
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate."})
    min_learning_rate_ratio: float = field(default=0.01, metadata={"help": "Final over peak learning rate."})
    warmup_steps: int = field(default=500, metadata={"help": "Linear warm-up steps."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta 1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW beta 2."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay, of linear layers alone."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm clipping."})
    ema_decay: float = field(default=0.9999, metadata={"help": "Decay of the averaged weights."})
    mixed_precision: str = field(
        default="auto", metadata={"help": "no, fp16 or bf16; auto: bf16 where the device computes in it."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, order, tasks and all else."})
    # Bookkeeping
    resume: str | None = field(default=None, metadata={"help": "'latest', or the path of a checkpoint-N folder."})
    save_every: int = field(default=2000, metadata={"help": "Steps between checkpoints."})
    keep_checkpoints: int = field(default=2, metadata={"help": "How many checkpoints to keep."})
    log_every: int = field(default=20, metadata={"help": "Steps between log lines."})
    validate_every: int = field(default=1000, metadata={"help": "Steps between validations."})
    val_clips: int = field(default=512, metadata={"help": "Validation clips, evenly spaced over --val_tokens."})
    sample_every: int = field(default=1000, metadata={"help": "Steps between pictures of generated clips; 0: none."})
    samples: int = field(default=16, metadata={"help": "Clips of such a picture, their classes evenly spaced."})
    tracker: str = field(default="none", metadata={"help": "none, or a tracker of accelerate: tensorboard, wandb, .."})
    export_dtype: str = field(default="bfloat16", metadata={"help": "dtype of the final weights: float32 or bfloat16."})
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is a GPU."})

    def __post_init__(self):
        super().__post_init__()
        counts = ("steps", "rows", "gradient_accumulation_steps", "save_every", "keep_checkpoints", "log_every")
        for name in (*counts, "validate_every", "val_clips", "samples", "batch_size", "clips_per_video"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.sample_every < 0:
            raise ValueError(f"--sample_every must be at least 0, got {self.sample_every}.")
        for name in ("label_dropout", "prediction", "prediction_label_dropout", "condition_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in [0, 1], got {getattr(self, name)}.")
        if (self.train_tokens is None) == (self.train_data is None):
            raise ValueError("give either --train_tokens, which training/tokenize_dataset.py makes, or --train_data.")
        if self.num_workers < 0 or self.batch_size % max(1, self.num_workers):
            raise ValueError(
                f"--batch_size {self.batch_size} must be a multiple of --num_workers {self.num_workers}, each of which "
                "gives an equal part of it."
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"--layout must be one of {list(LAYOUTS)}, got {self.layout!r}.")
        if self.attn_implementation not in ("sdpa", "eager", "split"):  # those that packed rows work with
            raise ValueError(f"--attn_implementation must be sdpa, eager or split, got {self.attn_implementation!r}.")
        if self.compile and self.attn_implementation == "split":
            raise ValueError("--compile works with --attn_implementation sdpa or eager.")
        self.mixed_precision = choose_precision(self.mixed_precision, self.cpu)
        if self.export_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--export_dtype must be float32 or bfloat16, got {self.export_dtype!r}.")
        self._overrides()
        if self.train_data is not None:
            self.views()

    def views(self) -> TokenizeArguments:
        """The options of tokenizing on the way. Raises ValueError as those of training/tokenize_dataset.py."""
        shared = (
            *("train_data", "output_dir", "tokenizer", "strides", "scale", "random_position", "flip_probability"),
            *("random_start", "clips_per_video", "shuffle_buffer", "num_workers", "strategy", "quality", "uniform"),
            *("lengths", "budget_per_clip", "known_frames", "batch_size", "seed"),
        )
        given = {name: getattr(self, name) for name in shared}
        return TokenizeArguments(**given, split=self.train_split, clips=1)  # a number of clips, which nothing asks for

    def _overrides(self) -> dict[str, Any]:
        overrides = parse_overrides(self.model_overrides, EvatokGeneratorConfig)
        if fixed := [name for name in _NOT_OVERRIDDEN if name in overrides]:
            raise ValueError(f"--model_overrides cannot set {fixed}: --layout and the tokens do.")
        return overrides

    def model_config(self, facts: Mapping[str, Any]) -> EvatokGeneratorConfig:
        """The configuration for tokens, or clips, with these facts.

        Args:
            facts: "codebook_size", "block_lengths", "num_blocks", "tokenizer_fingerprint", "known_frames" (or None),
                "fps" (or None), "class_names" (or None) and "num_classes".

        Raises:
            ValueError: overrides that ask for another vocabulary than the tokens have.
        """
        overrides, facts = self._overrides(), dict(facts)
        for name in ("codebook_size", "block_lengths", "num_blocks"):
            if name in overrides and overrides[name] != facts[name]:
                raise ValueError(
                    f"the tokens have {name} {facts[name]}, --model_overrides asks for {overrides[name]}; leave it "
                    "out, or make tokens with the other tokenizer."
                )
        if facts["known_frames"] is None:
            del facts["known_frames"]
        return EvatokGeneratorConfig.from_preset(self.preset, **{**facts, **overrides, "layout": self.layout})
