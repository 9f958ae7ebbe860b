"""Configuration of the EVATok models."""

from __future__ import annotations

from transformers import PretrainedConfig

from .assignment import AssignmentSpace

# What runs shorter than the paper's need in order to learn within hours.
_SMALL_RUNS = {
    "position_embedding": "pooled",
    "position_scale": 2.0,
    "interlaced_positions": True,
    "patch_norm": False,
    "initialization": "scaled",
    "attention_init": "shifted",
    "patch_basis": "cosine",
}

# Sizes: "paper" is the reading of the paper's 145M "S-B" tokenizer (small encoder, base decoder, separate learned
# tables of positions); "base" is for half an hour of one GPU; "small" trains on a CPU in some hours, "tiny" within one.
_TOKENIZER_PRESETS: dict[str, dict] = {
    "tiny": {
        "image_size": 64,
        "block_lengths": (8, 16, 32, 64, 128),
        "codebook_size": 1024,
        "encoder_hidden_size": 192,
        "encoder_num_layers": 3,
        "encoder_num_heads": 6,
        "decoder_hidden_size": 256,
        "decoder_num_layers": 6,
        "decoder_num_heads": 8,
        **_SMALL_RUNS,
    },
    "small": {
        "image_size": 128,
        "block_lengths": (32, 64, 128, 256, 512),
        "codebook_size": 8192,
        "entropy_tokens": 512,
        "encoder_hidden_size": 192,
        "encoder_num_layers": 4,
        "encoder_num_heads": 3,
        "decoder_hidden_size": 192,
        "decoder_num_layers": 4,
        "decoder_num_heads": 3,
        **_SMALL_RUNS,
    },
    "base": {
        "image_size": 128,
        "block_lengths": (32, 64, 128, 256, 512),
        "codebook_size": 8192,
        "entropy_tokens": 4096,
        "encoder_hidden_size": 320,
        "encoder_num_layers": 5,
        "encoder_num_heads": 5,
        "decoder_hidden_size": 384,
        "decoder_num_layers": 7,
        "decoder_num_heads": 6,
        **_SMALL_RUNS,
    },
    "paper": {
        "image_size": 128,
        "block_lengths": (32, 64, 128, 256, 512),
        "codebook_size": 16384,
        "encoder_hidden_size": 512,
        "encoder_num_layers": 6,
        "encoder_num_heads": 8,
        "decoder_hidden_size": 768,
        "decoder_num_layers": 12,
        "decoder_num_heads": 12,
        "position_embedding": "learned",
        "initialization": "normal",
        "attention_init": "independent",
    },
}


_CLIP_SIZES = ("image_size", "num_frames", "num_blocks", "patch_size", "num_channels")
_POSITIVE = (
    *_CLIP_SIZES,
    "codebook_size",
    "codebook_dim",
    "embed_dim",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_num_heads",
    "decoder_hidden_size",
    "decoder_num_layers",
    "decoder_num_heads",
    "mlp_ratio",
)

# "paper" is the reading of its 19.9M "ViT-S size" router.
_ROUTER_PRESETS: dict[str, dict] = {
    "tiny": {
        "image_size": 64,
        "block_lengths": (8, 16, 32, 64, 128),
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "position_embedding": "fixed",
        "patch_basis": "log-spectrum",
        "pooling": 4,
    },
    "small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6},
    "paper": {"quality": 1.2},
}


def _check_positive(config: PretrainedConfig, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")


def _check_choices(config: PretrainedConfig, **choices: tuple[str, ...]) -> None:
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} must be one of {known}, got {getattr(config, name)!r}.")


class ClipGeometry:
    """What a configuration says of clips, patches and assignments, for every model that has those fields."""

    @property
    def assignment_space(self) -> AssignmentSpace:
        return AssignmentSpace(self.block_lengths, self.num_blocks)

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
        """Of a 3D patch: channels, frames, rows, columns."""
        return self.num_channels, self.frames_per_block, self.patch_size, self.patch_size

    def _check_clip(self) -> None:
        if self.num_frames % self.num_blocks:
            raise ValueError(f"num_frames {self.num_frames} is not a multiple of num_blocks {self.num_blocks}.")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        grid = self.image_size // self.patch_size
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


class EvatokConfig(ClipGeometry, PretrainedConfig):
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
    _auto_class = "AutoConfig"  # save_pretrained copies the code beside the weights for trust_remote_code

    def __init__(
        self,
        image_size: int = 128,
        num_frames: int = 16,
        num_blocks: int = 4,
        patch_size: int = 8,
        num_channels: int = 3,
        block_lengths: tuple[int, ...] = (32, 64, 128, 256, 512),
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        embed_dim: int = 256,
        encoder_hidden_size: int = 512,
        encoder_num_layers: int = 6,
        encoder_num_heads: int = 8,
        decoder_hidden_size: int = 768,
        decoder_num_layers: int = 12,
        decoder_num_heads: int = 12,
        mlp_ratio: int = 4,
        position_embedding: str = "learned",
        position_scale: float = 1.0,
        interlaced_positions: bool = False,
        patch_basis: str = "pixels",
        patch_norm: bool = True,
        initialization: str = "normal",
        attention_init: str = "independent",
        initializer_range: float = 0.02,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.02,
        entropy_temperature: float = 0.01,
        entropy_tokens: int = 0,
        layer_norm_eps: float = 1e-5,
        same_ids_as: tuple[str, ...] = (),
        **kwargs,
    ):
        self.same_ids_as = list(same_ids_as)
        self.image_size = image_size
        self.num_frames = num_frames
        self.num_blocks = num_blocks
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.block_lengths = [int(length) for length in block_lengths]
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.embed_dim = embed_dim
        self.encoder_hidden_size = encoder_hidden_size
        self.encoder_num_layers = encoder_num_layers
        self.encoder_num_heads = encoder_num_heads
        self.decoder_hidden_size = decoder_hidden_size
        self.decoder_num_layers = decoder_num_layers
        self.decoder_num_heads = decoder_num_heads
        self.mlp_ratio = mlp_ratio
        self.position_embedding = position_embedding
        self.position_scale = position_scale
        self.interlaced_positions = interlaced_positions
        self.patch_basis = patch_basis
        self.patch_norm = patch_norm
        self.initialization = initialization
        self.attention_init = attention_init
        self.initializer_range = initializer_range
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.entropy_tokens = entropy_tokens
        self.layer_norm_eps = layer_norm_eps
        self._check()
        super().__init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> EvatokConfig:
        """A named size, "tiny", "small", "base" or "paper"; `overrides` replace single fields.

        Raises:
            ValueError: an unknown name, or fields that do not fit together.
        """
        if name not in _TOKENIZER_PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {sorted(_TOKENIZER_PRESETS)}.")
        return cls(**{**_TOKENIZER_PRESETS[name], **overrides})

    def _check(self) -> None:
        _check_positive(self, _POSITIVE)
        self._check_clip()
        if self.entropy_tokens < 0:
            raise ValueError(f"entropy_tokens must be 0 (all tokens) or more, got {self.entropy_tokens}.")
        for part, width, heads in (
            ("encoder", self.encoder_hidden_size, self.encoder_num_heads),
            ("decoder", self.decoder_hidden_size, self.decoder_num_heads),
        ):
            if width % heads:
                raise ValueError(f"{part}_hidden_size {width} is not a multiple of {part}_num_heads {heads}.")
            if width % 16:
                raise ValueError(f"{part}_hidden_size {width} is not a multiple of 16, which positions need.")
        _check_choices(
            self,
            position_embedding=("learned", "pooled"),
            initialization=("normal", "scaled"),
            attention_init=("independent", "shifted"),
            patch_basis=("pixels", "cosine"),
        )
        if self.position_embedding != "pooled":
            for field, unfit in (
                ('attention_init "shifted"', self.attention_init == "shifted"),
                ("interlaced_positions", self.interlaced_positions),
            ):
                if unfit:
                    raise ValueError(f'{field} needs position_embedding "pooled", not {self.position_embedding!r}.')


class EvatokRouterConfig(ClipGeometry, PretrainedConfig):
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

    Raises:
        ValueError: sizes that do not divide, unknown choices, a quality outside 0..2.
    """

    model_type = "evatok_router"
    _auto_class = "AutoConfig"

    def __init__(
        self,
        image_size: int = 128,
        num_frames: int = 16,
        num_blocks: int = 4,
        patch_size: int = 8,
        num_channels: int = 3,
        block_lengths: tuple[int, ...] = (32, 64, 128, 256, 512),
        hidden_size: int = 512,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        mlp_ratio: int = 4,
        position_embedding: str = "learned",
        patch_basis: str = "pixels",
        pooling: int = 1,
        quality: float | None = None,
        reward_temperature: float = 0.02,
        distance: str | None = None,
        distance_low: float | None = None,
        distance_high: float | None = None,
        proxy_fingerprint: str | None = None,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        **kwargs,
    ):
        self.image_size = image_size
        self.num_frames = num_frames
        self.num_blocks = num_blocks
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.block_lengths = [int(length) for length in block_lengths]
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.position_embedding = position_embedding
        self.patch_basis = patch_basis
        self.pooling = pooling
        self.quality = quality
        self.reward_temperature = reward_temperature
        self.distance = distance
        self.distance_low = distance_low
        self.distance_high = distance_high
        self.proxy_fingerprint = proxy_fingerprint
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        # What transformers' ViT layers read.
        self.intermediate_size = mlp_ratio * hidden_size
        self.hidden_act = "gelu"
        self.qkv_bias = True
        self.hidden_dropout_prob = self.attention_probs_dropout_prob = 0.0
        self._check()
        super().__init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> EvatokRouterConfig:
        """A named size, "tiny", "small" or "paper"; `overrides` replace single fields. Raises ValueError as ever."""
        if name not in _ROUTER_PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {sorted(_ROUTER_PRESETS)}.")
        return cls(**{**_ROUTER_PRESETS[name], **overrides})

    def _check(self) -> None:
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "pooling")
        _check_positive(self, (*_CLIP_SIZES, *sizes))
        self._check_clip()
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 16:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads} "
                "and of 16, which positions need."
            )
        _check_choices(self, position_embedding=("learned", "fixed"), patch_basis=("pixels", "cosine", "log-spectrum"))
        if self.grid_size % self.pooling:
            raise ValueError(f"pooling {self.pooling} does not divide the {self.grid_size} patches along a side.")
        if self.quality is not None and not 0 <= self.quality <= 2:
            raise ValueError(f"quality must be None or lie between 0 and 2, got {self.quality}.")
        if not self.reward_temperature > 0:
            raise ValueError(f"reward_temperature must be positive, got {self.reward_temperature}.")
