"""The set of token assignments, and the configurations of tokenizer, router and generator.

An assignment says how many tokens each temporal block of a clip gets: T block lengths, each from an ascending tuple of
m candidates, so there are m**T of them (625 for five candidates and four blocks, paper section 3). Assignments are
numbered in lexicographic order of their block lengths, the first block being the most significant digit in base m. The
generator is a plain Llama whose vocabulary is video.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar

import torch
from transformers import LlamaConfig, PretrainedConfig
from transformers.activations import ACT2FN

from .files_evatok import (
    Rule,
    checked,
    flag,
    list_of,
    named,
    number,
    one_of,
    optional,
    read_json,
    record,
    refuse_hidden,
    ruled,
    text,
    whole,
)

ClassLabel = str | int | None
LengthsLike = int | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor
LAYOUTS = ("length-first", "end-of-block")
_TINY_CLIPS = {"image_size": 64, "block_lengths": (8, 16, 32, 64, 128)}


def _small(
    codebook: int, encoder: tuple[int, int, int], decoder: tuple[int, int, int], **fields: Any
) -> dict[str, Any]:
    """A tokenizer by the codes and by width, layers and heads, with what runs shorter than the paper's need in order to
    learn within hours."""
    sizes = {
        f"{part}_{field}": size
        for part, given in (("encoder", encoder), ("decoder", decoder))
        for field, size in zip(("hidden_size", "num_layers", "num_heads"), given, strict=True)
    }
    choices = {
        "position_embedding": "pooled",
        "position_scale": 2.0,
        "interlaced_positions": True,
        "patch_norm": False,
        "initialization": "scaled",
        "attention_init": "shifted",
        "patch_basis": "cosine",
    }
    return {"codebook_size": codebook, **sizes, **choices, **fields}


# Under `token_patches` the codebook is not trained: the entropy term is logged, of a few tokens, and counts nothing.
_TOKEN_PATCHES = {"token_patches": True, "interlaced_positions": False, "entropy_weight": 0.0, "entropy_tokens": 64}

# Sizes, as what differs from the defaults. These are "paper", the reading of the paper's 145M "S-B" tokenizer (small
# encoder, base decoder, separate learned tables of positions) and of its 19.9M "ViT-S size" router. "base" is for half
# an hour of one GPU; "small" trains on a CPU in some hours, "tiny" within one.
_TOKENIZER_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _small(1024, encoder=(192, 3, 6), decoder=(256, 6, 8), **_TINY_CLIPS),
    "small": _small(16_384, encoder=(128, 2, 4), decoder=(128, 2, 4), **_TOKEN_PATCHES),
    "base": _small(16_384, encoder=(320, 5, 5), decoder=(384, 7, 6), **_TOKEN_PATCHES),
    "paper": {},
}
_SMALL_ROUTER = {"position_embedding": "fixed", "patch_basis": "log-spectrum", "pooling": 4}
_ROUTER_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, **_SMALL_ROUTER, **_TINY_CLIPS},
    "small": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, **_SMALL_ROUTER},
    "paper": {"quality": 1.2},
}


def _llama(width: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, inner, layers, heads), strict=True))


# "327m" (the defaults) and "633m" are the paper's: LlamaGen's GPT-L and LARP's LP, an untied head, 8192 codes and the
# 101 classes of UCF-101. Both have rotary positions, as any Llama, where the paper's counts speak for a learned table
# of about 2M parameters.
_GENERATOR_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"codebook_size": 1024, "block_lengths": [8, 16, 32, 64, 128], **_llama(256, 688, 6, 4)},
    "small": {"codebook_size": 16_384, **_llama(512, 1408, 12, 8)},
    "327m": {"num_classes": 101},
    "633m": {"num_classes": 101, **_llama(1280, 3584, 30, 20)},
}


# --- assignments ------------------------------------------------------------------------------------------------------


class AssignmentSpace:
    """All assignments of `block_lengths` candidates to `num_blocks` temporal blocks.

    Args:
        block_lengths: ascending candidate lengths of one block, tokens.
        num_blocks: temporal blocks T of a clip.

    Raises:
        ValueError: candidates are empty, not positive, or not strictly ascending; `num_blocks` is not positive.
    """

    def __init__(self, block_lengths: Sequence[int], num_blocks: int):
        lengths = [int(length) for length in block_lengths]
        if not lengths or lengths[0] < 1 or any(b <= a for a, b in pairwise(lengths)):
            raise ValueError(f"block_lengths must be positive and strictly ascending, got {list(block_lengths)}.")
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}.")
        self.block_lengths = tuple(lengths)
        self.num_blocks = int(num_blocks)

    def __len__(self) -> int:
        return len(self.block_lengths) ** self.num_blocks

    def __repr__(self) -> str:
        return f"AssignmentSpace(block_lengths={self.block_lengths}, num_blocks={self.num_blocks})"

    @property
    def min_tokens(self) -> int:
        """Tokens of the shortest assignment."""
        return self.block_lengths[0] * self.num_blocks

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest assignment."""
        return self.block_lengths[-1] * self.num_blocks

    def validate(self, lengths: LengthsLike, batch_size: int | None = None) -> torch.Tensor:
        """Checks lengths and returns them as an int64 tensor on the CPU.

        Args:
            lengths: one int (uniform), T ints (one assignment for every clip), or (B, T).
            batch_size: when given, one assignment is repeated to (batch_size, T).

        Returns:
            (T,) or (B, T) int64; always (batch_size, T) when `batch_size` is given.

        Raises:
            ValueError: a wrong number of blocks or clips, or a length that is no candidate; the message lists the set.
        """
        try:
            values = torch.as_tensor(lengths).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"lengths must be integers in rows of {self.num_blocks}: {error}") from error
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            given = f"a tensor of {lengths.dtype}" if isinstance(lengths, torch.Tensor) else repr(lengths)
            raise ValueError(f"lengths must be integers, got {given}.")
        values = values.to(torch.int64)
        if values.ndim == 0:
            values = values.expand(self.num_blocks)
        if values.ndim > 2 or values.shape[-1] != self.num_blocks:
            raise ValueError(
                f"a clip has {self.num_blocks} temporal blocks, but lengths has shape {tuple(values.shape)}; "
                f"give {self.num_blocks} lengths a clip, each one of {list(self.block_lengths)}."
            )
        known = torch.isin(values, torch.tensor(self.block_lengths))
        if not known.all():
            wrong = sorted({int(value) for value in values[~known]})
            raise ValueError(f"block lengths {wrong} are not among the candidates; use {list(self.block_lengths)}.")
        if batch_size is not None:
            values = values.expand(batch_size, -1) if values.ndim == 1 else values
            if len(values) != batch_size:
                raise ValueError(f"lengths has {len(values)} rows for {batch_size} clips; give one row a clip.")
        return values.clone()

    def to_index(self, lengths: LengthsLike) -> torch.Tensor:
        """The index of assignments, lengths (T,) or (B, T) -> () or (B,) int64. Raises ValueError as `validate`."""
        digits = torch.searchsorted(torch.tensor(self.block_lengths), self.validate(lengths))
        return (digits * self._place_values()).sum(-1)

    def to_lengths(self, index: int | torch.Tensor) -> torch.Tensor:
        """The block lengths of assignments, index () or (B,) -> (T,) or (B, T) int64.

        Raises:
            ValueError: an index outside [0, len(self)).
        """
        index = torch.as_tensor(index).to("cpu", torch.int64)
        if ((index < 0) | (index >= len(self))).any():
            raise ValueError(f"assignment indices run from 0 to {len(self) - 1}, got {index.tolist()}.")
        digits = index.unsqueeze(-1) // self._place_values() % len(self.block_lengths)
        return torch.tensor(self.block_lengths)[digits]

    def all(self, min_tokens: int | None = None, max_tokens: int | None = None) -> torch.Tensor:
        """Every assignment in index order, (A, T) int64, optionally only those with a total within the limits.

        Raises:
            ValueError: no assignment is within the limits.
        """
        lengths = self.to_lengths(torch.arange(len(self)))
        total = lengths.sum(-1)
        low = self.min_tokens if min_tokens is None else min_tokens
        high = self.max_tokens if max_tokens is None else max_tokens
        keep = (low <= total) & (total <= high)
        if not keep.any():
            raise ValueError(
                f"no assignment has between {low} and {high} tokens; "
                f"totals run from {self.min_tokens} to {self.max_tokens}."
            )
        return lengths[keep]

    def random(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """Assignments drawn uniformly (within the limits), (batch_size, T) int64."""
        pool = self.all(min_tokens, max_tokens)
        return pool[torch.randint(len(pool), (batch_size,), generator=generator)]

    def uniform(self, length: int, batch_size: int | None = None) -> torch.Tensor:
        """The assignment of one candidate to every block, (T,) or (batch_size, T) int64."""
        return self.validate(int(length), batch_size)

    def _place_values(self) -> torch.Tensor:
        m = len(self.block_lengths)
        return m ** torch.arange(self.num_blocks - 1, -1, -1)


# --- tokenizer and router ---------------------------------------------------------------------------------------------


# Numbers in one table that a model computes for itself, whatever its weights are: 256 MB.
_MAX_TABLE = 1 << 26
_MAX_ASSIGNMENTS = 1_000_000
# What transformers reads of every configuration.
_GENERAL = {
    "architectures": optional(list_of(text(), 100)),
    "num_labels": optional(whole(0, 10_000)),
    "output_attentions": optional(flag()),
    "dtype": Rule("a dtype of torch", lambda value: value is None or _is_dtype(value)),
    "torch_dtype": Rule("a dtype of torch", lambda value: value is None or _is_dtype(value)),
    # Others are code that transformers would fetch.
    "attn_implementation": Rule(
        "a name of letters, digits and _",
        lambda value: value is None or (isinstance(value, str) and value.isidentifier() and len(value) < 64),
    ),
    "experts_implementation": Rule("left out", lambda value: value is None),
    "per_layer_config": Rule("left out", lambda value: value is None),
}

CLIP_SIZE, WIDTH, LAYERS, HEADS = whole(1, 8192), whole(1, 32_768), whole(1, 512), whole(1, 512)
BLOCK_LENGTHS, CODES, FINGERPRINT = list_of(whole(1, 1 << 16), 64, least=1), whole(1, 1 << 24), text(128)
POSITIVE, WEIGHT = number(0, 1e9, above=True), number(0, 1e9)


def _is_dtype(value: Any) -> bool:
    return isinstance(getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype)


class CheckedConfig(PretrainedConfig):
    """A configuration whose values are checked, also those that transformers takes from a file for itself."""

    _presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @property
    def assignment_space(self) -> AssignmentSpace:
        """All assignments that a clip can have."""
        return AssignmentSpace(self.block_lengths, self.num_blocks)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Any:
        """A configuration of a named size; `overrides` replace single fields.

        Args:
            name: "tiny", "small", "base" or "paper" of a tokenizer; "tiny", "small" or "paper" of a router; "tiny",
                "small", "327m" or "633m" of a generator.

        Raises:
            ValueError: an unknown name, or fields that do not fit together.
        """
        if name not in cls._presets:
            raise ValueError(f"unknown preset {name!r}; choose one of {sorted(cls._presets)}.")
        return cls(**{**cls._presets[name], **overrides})

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_hidden(kwargs, type(self), ("model_type",))
        for name, rule in _GENERAL.items():
            rule.hold(name, kwargs.get(name, vars(self).get(name)))
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a configuration as transformers does.

        Raises:
            ValueError: a folder without a configuration, which transformers takes for the default one; values that
                cannot be, naming file and field.
        """
        place = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "config.json")
        if os.path.isdir(pretrained_model_name_or_path) and not os.path.isfile(place):
            raise ValueError(f"there is no {place}; name the folder of one model, or a checkpoint's and `subfolder`.")
        with named(place):
            if os.path.isfile(place):
                read_json(place)
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        if "name_or_path" not in kwargs:  # `from_pretrained` knows the file
            return super().from_dict(config_dict, **kwargs)
        with named(os.path.join(kwargs["name_or_path"], "config.json")):  # the auto classes
            return super().from_dict(config_dict, **kwargs)


class ClipGeometry(CheckedConfig):
    """The fields of a model of clips that say how these are cut into patches and blocks, and what follows from them."""

    image_size: int = ruled(CLIP_SIZE, 128)
    num_frames: int = ruled(CLIP_SIZE, 16)
    num_blocks: int = ruled(whole(1, 1024), 4)
    patch_size: int = ruled(CLIP_SIZE, 8)
    num_channels: int = ruled(whole(1, 64), 3)
    block_lengths: list[int] | tuple[int, ...] = ruled(BLOCK_LENGTHS, (32, 64, 128, 256, 512))

    @property
    def frames_per_block(self) -> int:
        return self.num_frames // self.num_blocks

    @property
    def grid_size(self) -> int:
        """Patches along a side of a frame."""
        return self.image_size // self.patch_size

    @property
    def embeddings_per_block(self) -> int:
        return self.grid_size**2

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """The shape of a 3D patch: channels, frames, rows, columns."""
        return self.num_channels, self.frames_per_block, self.patch_size, self.patch_size

    def _check_clip(self, width: int) -> None:
        """Raises ValueError unless the sizes of clips fit together; `width` is that of the widest transformer."""
        if self.num_frames % self.num_blocks:
            raise ValueError(f"num_frames {self.num_frames} is not a multiple of num_blocks {self.num_blocks}.")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        grid = self.grid_size
        if grid & (grid - 1):
            raise ValueError(
                f"image_size / patch_size must be a power of two (query pooling halves the grid), got {grid}."
            )
        AssignmentSpace(self.block_lengths, self.num_blocks)
        if max(self.block_lengths) > 2 * grid * grid:
            raise ValueError(
                f"the largest candidate {max(self.block_lengths)} exceeds {2 * grid * grid}, twice the "
                f"{grid * grid} embeddings of a block; use shorter block_lengths or a larger image_size."
            )
        patch = math.prod(self.patch_shape)
        for fields, size in (
            ("image_size and patch_size", 2 * grid**4),
            ("num_channels, num_frames and patch_size", patch**2),
            ("num_blocks, image_size and hidden sizes", self.num_blocks * 3 * grid**2 * width),
        ):
            if size > _MAX_TABLE:
                raise ValueError(
                    f"{fields} make a table of {size:,} numbers, more than {_MAX_TABLE:,}; choose smaller ones."
                )


@checked
class EvatokConfig(ClipGeometry):
    """Configuration of `EvatokModel`, the adaptive-length video tokenizer. The defaults are the `paper` preset.

    Args:
        image_size: height and width of a frame, pixels; `image_size / patch_size` must be a power of two.
        num_frames: frames of a clip (paper: 16).
        num_blocks: temporal blocks T of a clip (paper: 4); a block is one 3D patch deep in time.
        patch_size: spatial size of a 3D patch, pixels (paper: 8).
        num_channels: colour channels.
        block_lengths: ascending candidates for the tokens of a block (paper: 32 to 512). The largest may be at most
            twice the embeddings of a block, the number of cells of all pooling levels together.
        codebook_size: entries of the codebook (paper: 16384, or 8192 on UCF-101 and K600).
        codebook_dim: dimension of the l2-normalised codes (GigaTok: 8).
        embed_dim: channels between patches and transformer, and between transformer and quantiser (GigaTok: 256).
        encoder_hidden_size, encoder_num_layers, encoder_num_heads: the Q-Former encoder.
        decoder_hidden_size, decoder_num_layers, decoder_num_heads: the Q-Former decoder.
        mlp_ratio: hidden over outer width of the feed-forward layers.
        position_embedding: "learned" (independent tables, as GigaTok), or "pooled" (fixed sine-cosine positions of the
            3D grid; a 1D query has the mean position of the cells that it pools, plus a learned index embedding; our
            choice, which small runs need in order to learn within hours).
        attention_init: "independent", or "shifted" (the query projection of a head starts as its key projection, moved
            by the head's own offset in space and time, so that attention starts as a small convolution; needs "pooled"
            positions; our choice for small runs).
        position_scale: factor of the fixed positions of "pooled"; above 1, "shifted" attention starts sharper.
        interlaced_positions: with "pooled", place a 1D query at one of the cells that it pools rather than at their
            mean, in each of four consecutive blocks at another, so that attention starts by reading different detail
            into neighbouring tokens and blocks, and by finding it there (our choice for small runs).
        token_patches: a token codes a patch of the block's frames, resized so that they have as many patches as the
            block has tokens, or what the last frame before lacks of it, in a linear codec (`LinearCodec`) that takes
            the place of the Q-Former encoder, of which no size counts then. A query of the decoder is a patch of what
            this codec makes of the codes rather than the first token (paper), and the decoder adds what is missing.
            What a transformer changed of the codes would not be in the loop that the codec predicts in, and trials
            lost by it (our choice). Needs "pooled" positions that are not interlaced, and candidates
            that are powers of two (our choice for small runs). Training sets the codec once, from a few clips.
        patch_basis: "pixels" (GigaTok), or "cosine" (a patch goes in and comes out as its cosine transform in colour,
            time and space, scaled by the amplitudes that video usually has, so that fine detail, which has little
            variance, is learned as quickly as brightness; our choice for small runs).
        patch_norm: normalise the embedding of a patch (GigaTok). The norm takes away how bright a patch is but for what
            the bias keeps, and the presets of small runs leave it out (our choice).
        initialization: "normal" (every linear layer with the same standard deviation, as GigaTok), or "scaled" (by the
            inverse root of its inputs, residual branches quieter, codes at the scale of features; our choice for small
            runs).
        initializer_range: standard deviation of the truncated normal of "normal".
        commitment_weight: weight of the commitment term (GigaTok: 0.25).
        entropy_weight: weight of the codebook entropy term (paper: 0.02).
        entropy_temperature: temperature of the soft assignment inside the entropy term (GigaTok: 0.01).
        entropy_tokens: how many tokens of a training step, in each process, the entropy term is computed of; 0: all
            (our choice: for a large codebook it is a third of a CPU's step, and some hundred estimate it as well).
        layer_norm_eps: epsilon of the layer norms.
        same_ids_as: fingerprints of checkpoints with the same encoder and codebook, whose decoder was trained on to
            become this one's: their tokens, and generators of them, are good for this one.

    Raises:
        ValueError: sizes that do not divide, or candidates beyond what a block can hold.
    """

    model_type = "evatok"
    _presets = _TOKENIZER_PRESETS
    _auto_class = "AutoConfig"  # save_pretrained copies the code beside the weights for trust_remote_code

    codebook_size: int = ruled(CODES, 16384)
    codebook_dim: int = ruled(WIDTH, 8)
    embed_dim: int = ruled(WIDTH, 256)
    encoder_hidden_size: int = ruled(WIDTH, 512)
    encoder_num_layers: int = ruled(LAYERS, 6)
    encoder_num_heads: int = ruled(HEADS, 8)
    decoder_hidden_size: int = ruled(WIDTH, 768)
    decoder_num_layers: int = ruled(LAYERS, 12)
    decoder_num_heads: int = ruled(HEADS, 12)
    mlp_ratio: int = ruled(whole(1, 64), 4)
    position_embedding: str = ruled(one_of("learned", "pooled"), "learned")
    position_scale: int | float = ruled(WEIGHT, 1.0)
    interlaced_positions: bool = ruled(flag(), False)
    token_patches: bool = ruled(flag(), False)
    patch_basis: str = ruled(one_of("pixels", "cosine"), "pixels")
    patch_norm: bool = ruled(flag(), True)
    initialization: str = ruled(one_of("normal", "scaled"), "normal")
    attention_init: str = ruled(one_of("independent", "shifted"), "independent")
    initializer_range: int | float = ruled(WEIGHT, 0.02)
    commitment_weight: int | float = ruled(WEIGHT, 0.25)
    entropy_weight: int | float = ruled(WEIGHT, 0.02)
    entropy_temperature: int | float = ruled(POSITIVE, 0.01)
    entropy_tokens: int = ruled(whole(0, 1 << 24), 0)
    layer_norm_eps: int | float = ruled(WEIGHT, 1e-5)
    same_ids_as: list[str] | tuple[str, ...] = ruled(list_of(FINGERPRINT, 1000), ())
    fingerprint: str | None = ruled(optional(FINGERPRINT), None)

    def __post_init__(self, **kwargs: Any) -> None:
        self.block_lengths, self.same_ids_as = list(self.block_lengths), list(self.same_ids_as)
        self._check_clip(max(self.encoder_hidden_size, self.decoder_hidden_size))
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_hidden_size"), getattr(self, f"{part}_num_heads")
            if width % heads:
                raise ValueError(f"{part}_hidden_size {width} is not a multiple of {part}_num_heads {heads}.")
            if width % 16:
                raise ValueError(f"{part}_hidden_size {width} is not a multiple of 16, which positions need.")
        if self.position_embedding != "pooled":
            for field, unfit in (
                ('attention_init "shifted"', self.attention_init == "shifted"),
                ("interlaced_positions", self.interlaced_positions),
                ("token_patches", self.token_patches),
            ):
                if unfit:
                    raise ValueError(f'{field} needs position_embedding "pooled", not {self.position_embedding!r}.')
        if self.token_patches and self.interlaced_positions:
            raise ValueError("token_patches places the queries itself; set interlaced_positions to false.")
        if self.token_patches and any(length & (length - 1) for length in self.block_lengths):
            raise ValueError(f"token_patches needs block_lengths that are powers of two, not {self.block_lengths}.")
        super().__post_init__(**kwargs)

    def bits(self, lengths: Sequence[int]) -> float:
        """Bits of a clip with those lengths: log2 of the codebook an id, and log2 of the candidates a block."""
        return sum(lengths) * math.log2(self.codebook_size) + len(lengths) * math.log2(len(self.block_lengths))


@checked
class EvatokRouterConfig(ClipGeometry):
    """Configuration of `EvatokRouter`. The defaults are the `paper` preset, but for one router for every preference.

    Args:
        image_size, num_frames, num_blocks, patch_size, num_channels, block_lengths: as in `EvatokConfig`; a router
            fits the tokenizers that share its clip and its assignments.
        hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio: the vision transformer (paper: 19.9M
            parameters).
        position_embedding: "learned", or "fixed" (sine-cosine of the 3D grid; our choice for small runs).
        patch_basis: "pixels", "cosine" (patches as their scaled cosine transforms, as in `EvatokConfig`), or
            "log-spectrum": these, and the logarithms of the magnitudes of the transform and of its change since the
            block before. How hard a clip is shows in magnitudes, which a network finds slowly from few clips (our
            choice for small runs).
        pooling: side of the squares of patches that are averaged before they are embedded (our choice; 1: none).
        quality: None for one router for every preference w_q, or the only w_q that it was trained for (the paper's way,
            1.2 there).
        reward_temperature: rewards over this are the logits of a router for every preference (our choice).
        distance: name of the perceptual distance that the training rewards were made of, or None.
        distance_low, distance_high: bounds between which that distance became quality 1 to 0, or None.
        proxy_fingerprint: of the tokenizer whose reconstructions it learned from, or None.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: epsilon of the layer norms.
        fingerprint: as in `EvatokConfig`.

    Raises:
        ValueError: sizes that do not divide, unknown choices, a quality outside 0..2.
    """

    model_type = "evatok_router"
    _presets = _ROUTER_PRESETS
    _auto_class = "AutoConfig"

    hidden_size: int = ruled(WIDTH, 512)
    num_hidden_layers: int = ruled(LAYERS, 6)
    num_attention_heads: int = ruled(HEADS, 8)
    mlp_ratio: int = ruled(whole(1, 64), 4)
    position_embedding: str = ruled(one_of("learned", "fixed"), "learned")
    patch_basis: str = ruled(one_of("pixels", "cosine", "log-spectrum"), "pixels")
    pooling: int = ruled(CLIP_SIZE, 1)
    quality: int | float | None = ruled(optional(number(0, 2)), None)
    reward_temperature: int | float = ruled(POSITIVE, 0.02)
    distance: str | None = ruled(optional(text()), None)
    distance_low: int | float | None = ruled(optional(number(-1e9, 1e9)), None)
    distance_high: int | float | None = ruled(optional(number(-1e9, 1e9)), None)
    proxy_fingerprint: str | None = ruled(optional(FINGERPRINT), None)
    initializer_range: int | float = ruled(WEIGHT, 0.02)
    layer_norm_eps: int | float = ruled(WEIGHT, 1e-6)
    fingerprint: str | None = ruled(optional(FINGERPRINT), None)
    # What transformers' ViT layers read.
    intermediate_size: int | None = None
    hidden_act: str = ruled(one_of("gelu"), "gelu")
    qkv_bias: bool = ruled(Rule("true", lambda value: value is True), True)
    hidden_dropout_prob: int | float = ruled(number(0, 0), 0.0)
    attention_probs_dropout_prob: int | float = ruled(number(0, 0), 0.0)

    def __post_init__(self, **kwargs: Any) -> None:
        self.block_lengths = list(self.block_lengths)
        inner = self.mlp_ratio * self.hidden_size
        if self.intermediate_size not in (None, inner):
            raise ValueError(
                f"intermediate_size follows from mlp_ratio and hidden_size: {inner}, not {self.intermediate_size}."
            )
        self.intermediate_size = inner
        self._check_clip(self.hidden_size)
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 16:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads} "
                "and of 16, which positions need."
            )
        if self.grid_size % self.pooling:
            raise ValueError(f"pooling {self.pooling} does not divide the {self.grid_size} patches along a side.")
        if len(self.assignment_space) > _MAX_ASSIGNMENTS:
            raise ValueError(
                f"block_lengths and num_blocks make {len(self.assignment_space):,} assignments, more than "
                f"{_MAX_ASSIGNMENTS:,}, of which a router scores each; choose fewer."
            )
        super().__post_init__(**kwargs)


# --- generator --------------------------------------------------------------------------------------------------------


@checked
@dataclass
class _Rope:
    rope_type: str = ruled(one_of("default"), "default")
    rope_theta: int | float = ruled(number(1, 1e12), 10_000.0)


@checked
class EvatokGeneratorConfig(CheckedConfig, LlamaConfig):
    """Configuration of `EvatokForCausalLM`. The defaults are the sizes of the `327m` preset, without classes.

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
        fingerprint: as in `EvatokConfig`.

    All other fields are those of `LlamaConfig`; `vocab_size`, `max_position_embeddings` and the special ids follow from
    the fields above.

    Raises:
        ValueError: sizes that do not fit, an unknown layout, names that are not one a class.
    """

    model_type = "evatok_generator"
    _presets = _GENERATOR_PRESETS
    _auto_class = "AutoConfig"

    vocab_size: int | None = None
    hidden_size: int = ruled(WIDTH, 1024)
    intermediate_size: int = ruled(whole(1, 1 << 17), 2816)
    num_hidden_layers: int = ruled(LAYERS, 24)
    num_attention_heads: int = ruled(HEADS, 16)
    num_key_value_heads: int | None = ruled(optional(HEADS), None)
    head_dim: int | None = ruled(optional(WIDTH), None)
    hidden_act: str = ruled(one_of(*ACT2FN), "silu")
    max_position_embeddings: int | None = None
    rms_norm_eps: int | float = ruled(WEIGHT, 1e-5)
    rope_parameters: dict | None = ruled(optional(record(_Rope)), None)
    attention_dropout: int | float = ruled(number(0, 1), 0.0)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    codebook_size: int = ruled(CODES, 8192)
    block_lengths: list[int] | tuple[int, ...] = ruled(BLOCK_LENGTHS, (32, 64, 128, 256, 512))
    num_blocks: int = ruled(whole(1, 1024), 4)
    layout: str = ruled(one_of(*LAYOUTS), "length-first")
    num_classes: int | None = ruled(optional(whole(0, 1 << 20)), None)
    class_names: list[str] | None = ruled(optional(list_of(text(1000), 1 << 20)), None)
    known_frames: int = ruled(whole(1, 8192), 5)
    tokenizer_fingerprint: str | None = ruled(optional(FINGERPRINT), None)
    fps: int | float | None = ruled(optional(number(0, 1_000_000, above=True)), None)
    fingerprint: str | None = ruled(optional(FINGERPRINT), None)

    def __post_init__(self, **kwargs):
        self.block_lengths = list(self.block_lengths)
        names = len(self.class_names or [])
        if self.num_classes is None:
            self.num_classes = names
        if self.class_names is not None and self.num_classes != names:
            raise ValueError(f"num_classes is {self.num_classes}, but class_names holds {names}; give a name a class.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        space = self.assignment_space
        markers = len(space.block_lengths) if self.layout == "length-first" else 1
        first = self.codebook_size + markers
        derived = {
            "bos_token_id": first,
            "eos_token_id": first + 1,
            "pad_token_id": first + 2,
            "vocab_size": first + 5 + self.num_classes,
            # BOS, class, a whole clip as the condition with the separator, a whole clip with EOS
            "max_position_embeddings": 2 + 2 * self.clip_places(),
        }
        for name, value in derived.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{name} follows from codes, blocks and classes: {value}, not {getattr(self, name)}.")
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> EvatokGeneratorConfig:
        """A configuration of a named size; `class_names` take the place of a preset's `num_classes`."""
        if overrides.get("class_names") is not None:
            overrides = {"num_classes": None, **overrides}
        return super().from_preset(name, **overrides)

    @property
    def first_marker_id(self) -> int:
        """The id of the shortest length, or the end-of-block id."""
        return self.codebook_size

    @property
    def separator_token_id(self) -> int:
        """The id between the condition of frame prediction and the clip."""
        return self.bos_token_id + 3

    @property
    def null_class_id(self) -> int:
        """The id for no class, in the place of a class's."""
        return self.bos_token_id + 4

    def clip_places(self, codes: Any = None) -> Any:
        """The number of ids of a clip of so many codes, by default the longest, after its prompt: codes, a marker a
        block, and EOS, or the separator after a condition."""
        return (self.assignment_space.max_tokens if codes is None else codes) + self.num_blocks + 1

    def class_id(self, label: int | None) -> int:
        """The id of a class, or of no class for None. Raises ValueError for a label outside 0..num_classes - 1."""
        if label is None:
            return self.null_class_id
        if not 0 <= label < self.num_classes:
            raise ValueError(f"label {label} is none of the {self.num_classes} classes 0 to {self.num_classes - 1}.")
        return self.null_class_id + 1 + label


def class_names(config: EvatokGeneratorConfig | None) -> list[str]:
    """Names of the classes of a generator, numbers where they have no names; no names without a configuration."""
    if config is None:
        return []
    return list(config.class_names or map(str, range(config.num_classes)))


def find_class(config: EvatokGeneratorConfig | None, name: ClassLabel) -> int | None:
    """The label of a class by name or number, None for None.

    Raises:
        ValueError: no such class; the message has names that are near.
    """
    if name is None:
        return None
    names = class_names(config)
    if not names:
        raise ValueError(f"this generator was trained without classes and knows no {name!r}; give no class.")
    if isinstance(name, str) and name in names:
        return names.index(name)
    if isinstance(name, Integral) and not isinstance(name, bool) and 0 <= name < len(names):
        return int(name)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"there is no class {name!r} among {len(names)}; {hint}`evatok classes` prints all.")
