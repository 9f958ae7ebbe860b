"""Options of generator training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evatok_hf import EvatokGeneratorConfig
from evatok_hf.models.configuration_evatok import LAYOUTS
from training.common.arguments import parse_overrides
from training.common.options import ClipOptions, ModelOptions
from training.tokenize_dataset import TokenizeArguments

# What the tokens say, or an option of its own.
_NOT_OVERRIDDEN = ("layout", "num_classes", "class_names", "known_frames", "tokenizer_fingerprint")


@dataclass(kw_only=True)
class GeneratorArguments(ClipOptions, ModelOptions):
    """Options of generator training. Defaults of the optimisation are LARP's."""

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
    batch_size: int = field(default=16, metadata={"help": "Clips a process and forward pass, in any number of rows."})
    random_position: bool = field(default=False, metadata={"help": "Crop anywhere rather than at the centre."})
    flip_probability: float = field(default=0.5, metadata={"help": "How often a view is mirrored left to right."})
    random_start: bool = field(default=True, metadata={"help": "Start anywhere rather than evenly spaced."})
    strategy: str | None = field(default=None, metadata={"help": "How lengths are chosen; by default by the router."})
    quality: float | None = field(default=None, metadata={"help": "Weight of quality, 0 to 2, of the router (1.2)."})
    uniform: int | None = field(default=None, metadata={"help": "The same tokens for every block."})
    lengths: str | None = field(default=None, metadata={"help": "Tokens of each block, such as 128,32,16,64."})
    budget_per_clip: int | None = field(default=None, metadata={"help": "At most so many tokens for each clip."})
    known_frames: int | None = field(default=None, metadata={"help": "Known frames of frame prediction (LARP: 5)."})
    # Optimisation
    steps: int = 100_000
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes an optimiser step."})
    learning_rate: float = 6e-4
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta 1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW beta 2."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay, of linear layers alone."})
    # Bookkeeping
    save_every: int = 2000
    val_clips: int = field(default=512, metadata={"help": "Validation clips, evenly spaced over --val_tokens."})
    sample_every: int = field(default=1000, metadata={"help": "Steps between pictures of generated clips; 0: none."})
    samples: int = field(default=16, metadata={"help": "Clips of such a picture, their classes evenly spaced."})
    export_dtype: str = "bfloat16"

    def __post_init__(self):
        super().__post_init__()
        self.at_least_one("rows", "val_clips", "samples")
        if self.sample_every < 0:
            raise ValueError(f"--sample_every must be at least 0, got {self.sample_every}.")
        self.fractions("label_dropout", "prediction", "prediction_label_dropout", "condition_dropout")
        if (self.train_tokens is None) == (self.train_data is None):
            raise ValueError("give either --train_tokens, which training/tokenize_dataset.py makes, or --train_data.")
        self.one_of(layout=LAYOUTS)
        if self.attn_implementation not in ("sdpa", "eager", "split"):  # those that packed rows work with
            raise ValueError(f"--attn_implementation must be sdpa, eager or split, got {self.attn_implementation!r}.")
        if self.compile and self.attn_implementation == "split":
            raise ValueError("--compile works with --attn_implementation sdpa or eager.")
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
