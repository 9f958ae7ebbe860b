"""Configuration of the EVATok generator: a plain Llama whose vocabulary is video."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .assignment import AssignmentSpace

LAYOUTS = ("length-first", "end-of-block")

# "327m" and "633m" are the paper's: LlamaGen's GPT-L and LARP's LP, an untied head, 8192 codes, UCF-101's 101 classes.
# Both have rotary positions, as any Llama, where the paper's counts speak for a learned table of about 2M parameters.
_GENERATOR_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "codebook_size": 1024,
        "block_lengths": [8, 16, 32, 64, 128],
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    },
    "small": {
        "codebook_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
    },
    "327m": {"num_classes": 101},
    "633m": {
        "num_classes": 101,
        "hidden_size": 1280,
        "intermediate_size": 3584,
        "num_hidden_layers": 30,
        "num_attention_heads": 20,
    },
}


@strict
class EvatokGeneratorConfig(LlamaConfig):
    """Configuration of `EvatokGenerator`. The defaults are the sizes of the `327m` preset, without classes.

    The vocabulary is, in this order: `codebook_size` codes; the markers of blocks (a length id for each candidate, or
    the one end-of-block id); BOS, EOS, padding, the separator, the null class; `num_classes` classes.

    Args:
        codebook_size: codes of the tokenizer (paper: 8192 on UCF-101 and K600).
        block_lengths: the tokenizer's ascending candidates for the tokens of a block.
        num_blocks: temporal blocks T of a clip.
        layout: "length-first" (every block begins with the id of its length, our reading of the paper), or
            "end-of-block" (every block ends with one shared id, as in AdapTok; the grammar lets it come only where a
            candidate length is reached).
        num_classes: classes that a video may be asked for; 0 for none. With `class_names` it follows from them.
        class_names: their names, in the order of labels.
        known_frames: frames that frame prediction is given by default (LARP on K600: 5 of 16).
        tokenizer_fingerprint: of the tokenizer whose ids it learned, or None.
        fps: frames a second of the clips that it learned (the videos' rate over the stride), None where they differ.

    All other fields are those of `LlamaConfig`; `vocab_size`, `max_position_embeddings` and the special ids follow from
    the fields above.

    Raises:
        ValueError: sizes that do not fit, an unknown layout, names that are not one a class.
    """

    model_type = "evatok_generator"
    _auto_class = "AutoConfig"

    vocab_size: int | None = None
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int | None = None
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    codebook_size: int = 8192
    block_lengths: list[int] | tuple[int, ...] = (32, 64, 128, 256, 512)
    num_blocks: int = 4
    layout: str = "length-first"
    num_classes: int | None = None
    class_names: list[str] | None = None
    known_frames: int = 5
    tokenizer_fingerprint: str | None = None
    fps: int | float | None = None

    def __post_init__(self, **kwargs):
        self.block_lengths = [int(length) for length in self.block_lengths]
        if self.codebook_size < 1 or self.known_frames < 1:
            raise ValueError(
                f"codebook_size and known_frames must be at least 1, got {self.codebook_size} and {self.known_frames}."
            )
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be a positive rate or None, got {self.fps}.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {self.layout!r}.")
        names = len(self.class_names or [])
        if self.num_classes is None:
            self.num_classes = names
        if self.num_classes < 0 or (self.class_names is not None and self.num_classes != names):
            raise ValueError(f"num_classes is {self.num_classes}, but class_names holds {names}; give a name a class.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        space = self.assignment_space
        markers = len(space.block_lengths) if self.layout == "length-first" else 1
        first = self.codebook_size + markers
        derived = {
            "bos_token_id": first,
            "eos_token_id": first + 1,
            "pad_token_id": first + 2,
            "vocab_size": first + 5 + self.num_classes,
            # BOS, class, a whole clip as the condition, separator, a whole clip, EOS
            "max_position_embeddings": 4 + 2 * (space.max_tokens + space.num_blocks),
        }
        for name, value in derived.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{name} follows from codes, blocks and classes: {value}, not {getattr(self, name)}.")
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> EvatokGeneratorConfig:
        """A named size, "tiny", "small", "327m" or "633m"; `overrides` replace single fields.

        Raises:
            ValueError: an unknown name, or fields that do not fit together.
        """
        if name not in _GENERATOR_PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {sorted(_GENERATOR_PRESETS)}.")
        fields = {**_GENERATOR_PRESETS[name], **overrides}
        if overrides.get("class_names") is not None and "num_classes" not in overrides:
            fields.pop("num_classes", None)
        return cls(**fields)

    @property
    def assignment_space(self) -> AssignmentSpace:
        return AssignmentSpace(self.block_lengths, self.num_blocks)

    @property
    def first_marker_id(self) -> int:
        """The id of the shortest length, or the end-of-block id."""
        return self.codebook_size

    @property
    def separator_token_id(self) -> int:
        """Between the condition of frame prediction and the clip."""
        return self.bos_token_id + 3

    @property
    def null_class_id(self) -> int:
        """Where a class id would stand, for no class."""
        return self.bos_token_id + 4

    def class_id(self, label: int | None) -> int:
        """The id of a class, or of no class for None. Raises ValueError for a label outside 0..num_classes - 1."""
        if label is None:
            return self.null_class_id
        if not 0 <= label < self.num_classes:
            raise ValueError(f"label {label} is none of the {self.num_classes} classes 0 to {self.num_classes - 1}.")
        return self.null_class_id + 1 + label
