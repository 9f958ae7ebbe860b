"""Options of generator training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evatok_hf import EvatokGeneratorConfig
from evatok_hf.models.configuration_evatok import LAYOUTS
from training.common.arguments import parse_overrides
from training.common.fields import option
from training.common.options import ClipOptions, ModelOptions, ViewOptions

# What the tokens say, or an option of its own.
_NOT_OVERRIDDEN = ("layout", "num_classes", "class_names", "known_frames", "tokenizer_fingerprint")


@dataclass(kw_only=True)
class GeneratorArguments(ViewOptions, ClipOptions, ModelOptions):
    """Options of generator training. Defaults of the optimisation are LARP's."""

    train_tokens: str | None = option("Tokens to learn: folder of training/tokenize_dataset.py, or Hub data set.", None)
    train_data: list[str] | None = option(
        "Instead of tokens, videos that are tokenized on the way (folders, WebDataset globs or Hub data "
        "sets; SOURCE=WEIGHT mixes several by weight).",
        None,
    )
    val_tokens: str | None = option("Tokens of the validation split; none: none.", None)
    tokenizer: str | None = option(
        "Checkpoint or Hub id that the tokens are of, with its router; the bundled one.", None
    )
    # Model
    layout: str = option(f"How blocks are marked: {' or '.join(LAYOUTS)}.", "length-first")
    init_from: str | None = option("Generator (folder or Hub id) to start from.", None)
    attn_implementation: str = option(
        "sdpa, eager, or split (one sequence at a time; by far the quickest on CPUs).", "sdpa"
    )
    gradient_checkpointing: bool = option("Recompute layers to save memory.", False)
    compile: bool = option("torch.compile the layers (for long runs on a GPU).", False)
    # Sequences
    row_length: int | None = option("Places of a row, into which sequences are packed; the longest possible one.", None)
    rows: int = option("Rows a process and forward pass.", 8)
    label_dropout: float = option("How often a clip loses its class.", 0.1)
    prediction: float = option("Share of the sequences that are frame prediction; the tokens need conditions.", 0.0)
    prediction_label_dropout: float = option("How often a clip of frame prediction loses its class.", 0.5)
    condition_dropout: float = option(
        "How often a clip of frame prediction loses condition and class both, for guidance.", 0.1
    )
    # Videos that are tokenized on the way, as by training/tokenize_dataset.py
    batch_size: int = option("Clips a process and forward pass, in any number of rows.", 16)
    # Optimisation
    steps: int = 100_000
    gradient_accumulation_steps: int = option("Forward passes an optimiser step.", 1)
    learning_rate: float = 6e-4
    weight_decay: float = option("AdamW weight decay, of linear layers alone.", 0.05)
    # Bookkeeping
    save_every: int = 2000
    val_clips: int = option("Validation clips, evenly spaced over --val_tokens.", 512)
    sample_every: int = option("Steps between pictures of generated clips; 0: none.", 1000)
    samples: int = option("Clips of such a picture, their classes evenly spaced.", 16)
    export_dtype: str = "bfloat16"

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "rows", "val_clips", "samples")
        self.at_least(0, "sample_every")
        self.fractions("label_dropout", "prediction", "prediction_label_dropout", "condition_dropout")
        if (self.train_tokens is None) == (self.train_data is None):
            raise ValueError("give either --train_tokens, which training/tokenize_dataset.py makes, or --train_data.")
        # Packed rows work with these.
        self.one_of(layout=LAYOUTS, attn_implementation=("sdpa", "eager", "split"))
        if self.compile and self.attn_implementation == "split":
            raise ValueError("--compile works with --attn_implementation sdpa or eager.")
        self._overrides()
        if self.train_data is not None:
            self.allocation()

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
