"""EvatokModel: the adaptive-length 1D video tokenizer.

A clip is cut into 3D patches, T temporal blocks deep. Block t gets as many 1D queries as its assignment says, each the
mean of some cells of that block's grid (coarse to fine, so a shorter length is a prefix of a longer one). A Q-Former
encoder refines the queries, a vector quantiser turns them into ids, a Q-Former decoder turns ids back into patches.
Anything of block t sees only blocks <= t.

Two ways compute the same: `forward` takes a batch without computing padding (training; `attn_implementation="eager"`
is the padded reference, "flex_attention" is for GPUs), `encode` and `decode` go through one clip block by block with
cached keys and values, so that a clip's ids depend on no other clip of the batch and a block's ids on no later block,
to the last bit.

Shapes: B clips, T blocks, G x G cells of a block, M longest candidate, N tokens of a clip, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput

from .assignment import LengthsLike
from .base_evatok import EvatokBaseModel
from .blocks_evatok import TokenLayout
from .coders_evatok import EvatokDecoder, EvatokEncoder
from .configuration_evatok import EvatokConfig
from .layers_evatok import HEAD_OFFSETS, EvatokPositions, LayerCache, PatchTransform, position_shift
from .partial_evatok import AbsentWeights
from .quantizer_evatok import VectorQuantizer
from .refinement_evatok import check_refinement_steps, refine_block
from .tokens_evatok import VideoTokens


@dataclass
class EvatokOutput(ModelOutput):
    """Output of `EvatokModel.forward`.

    Attributes:
        loss: L1 + codebook + weighted commitment + weighted entropy, the part of the paper's loss that needs no other
            network.
        reconstruction: (B, F, C, H, W), unclamped.
        reconstruction_loss: mean absolute error.
        codebook_loss, commitment_loss, entropy_loss: unweighted terms of the quantiser.
        ids: (N,) int64, packed clip after clip, block after block.
        lengths: (B, T) int64.
        decoder_hidden_states: with `output_hidden_states=True`, (B, T, G * G, D) before and after every decoder layer.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class ClipState:
    """How far a clip has come that is encoded or decoded block by block.

    Attributes:
        caches: keys and values of the blocks so far, of each layer.
        block: number of the next block.
        decoding: while encoding with refinement, how far the refined blocks are decoded.
    """

    caches: list[LayerCache]
    block: int = 0
    decoding: ClipState | None = None


class EvatokPreTrainedModel(EvatokBaseModel):
    config_class = EvatokConfig
    base_model_prefix = "evatok"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules = ["EvatokLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            if self.config.initialization == "scaled":
                std = getattr(module, "init_scale", 1.0) * module.in_features**-0.5
            init.trunc_normal_(module.weight, mean=0.0, std=std, a=-2 * std, b=2 * std)
            if self.config.initialization == "scaled" and hasattr(module, "init_bias"):
                init.normal_(module.bias, std=module.init_bias)
            else:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, VectorQuantizer):
            init.normal_(module.weight)
            init.copy_(module.weight, F.normalize(module.weight, dim=-1))
        elif isinstance(module, EvatokPositions):
            for table in module.parameters(recurse=False):
                init.normal_(table, std=module.dim**-0.5)
            module.reset_tables()
        elif isinstance(module, EvatokEncoder | PatchTransform):
            module.reset_tables()


class EvatokModel(EvatokPreTrainedModel):
    """The adaptive tokenizer. See the module docstring for the method and `EvatokConfig` for sizes.

    Args:
        config: sizes.
        decoder: False makes a model that only encodes; its `decoder` is None. See `from_pretrained`.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: EvatokConfig, decoder: bool = True):
        super().__init__(config)
        self.assignment_space = config.assignment_space
        self.encoder = EvatokEncoder(config)
        self.quantizer = VectorQuantizer(
            config.codebook_size, config.codebook_dim, config.entropy_temperature, config.entropy_tokens
        )
        self.decoder = EvatokDecoder(config) if decoder else None
        if not decoder:
            self._keys_to_ignore_on_load_unexpected = [r"^decoder\."]
        self.post_init()
        if config.attention_init == "shifted":
            # Not in _init_weights, which transformers does not call for modules without tensors of their own. A model
            # that is about to be loaded is on the meta device here, where this does nothing.
            self._aim_attention()

    @torch.no_grad()
    def _aim_attention(self) -> None:
        """Makes every head start by attending around its own place in `HEAD_OFFSETS`, from where a query is."""
        for part, model in (("encoder", self.encoder), ("decoder", self.decoder)):
            for layer in model.layers if model is not None else ():
                for attention in (layer.self_attention, layer.cross_attention):
                    offsets = HEAD_OFFSETS[f"{part}_{attention.name}"]
                    query, key = (
                        projection.weight.unflatten(0, (-1, attention.head_dim))
                        for projection in (attention.q_proj, attention.k_proj)
                    )
                    for head in range(len(key)):
                        shift = position_shift(
                            self.config.num_blocks,
                            self.config.grid_size,
                            key.shape[-1],
                            offsets[head % len(offsets)],
                        )
                        query[head] = key[head] @ shift.to(key)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, decoder: bool = True, **kwargs: Any):
        """As transformers' method; `decoder=False` loads what encoding needs and no weight of the decoder.

        Such a model makes the same ids under the same fingerprint, for which the decoder's tensors are read from the
        file once, one after another, when it is first asked for. It cannot decode, train or be saved.

        Raises:
            ValueError: as for every model here, naming tensors that the checkpoint lacks, the decoder's included.
        """
        if decoder:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, decoder=False, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        with torch.device("meta"):
            expected = [f"decoder.{name}" for name, _ in EvatokDecoder(model.config).named_parameters()]
        model._absent = AbsentWeights.find(pretrained_model_name_or_path, "decoder.", expected, kwargs)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' method. Raises ValueError for a model without its decoder."""
        self.check_decoder("be saved")
        super().save_pretrained(*args, **kwargs)

    def check_decoder(self, what: str = "decode") -> None:
        """Raises ValueError where there is no decoder; `what` says for whom it would be needed."""
        if self.decoder is None:
            raise ValueError(f"this model was loaded with decoder=False and cannot {what}; load it with its decoder.")

    def forward(
        self,
        pixel_values_videos: torch.Tensor,
        lengths: LengthsLike | None = None,
        quantization_blend: float = 1.0,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
    ) -> EvatokOutput | tuple:
        """Encodes, quantises and decodes with gradients; the clips of a batch may have any assignments.

        Args:
            pixel_values_videos: (B, F, C, H, W) in [-1, 1].
            lengths: tokens of each block, (B, T), (T,) for all clips or one number; the middle candidate by default.
            quantization_blend: see `VectorQuantizer.forward`.
            output_hidden_states: also return the decoder's hidden states.
            return_dict: False returns a tuple.

        Raises:
            ValueError: a wrong video shape, lengths outside the assignment space, or a model without its decoder.
        """
        self.check_decoder("reconstruct")
        video = self.check_video(pixel_values_videos)
        lengths = self._check_lengths(lengths, len(video)).to(video.device)
        layout = TokenLayout.choose(lengths, self.config._attn_implementation)
        features = layout.pack(self.encoder(video, layout))  # (tokens, d)
        quantized = self.quantizer(features, quantization_blend)
        reconstruction, *hidden = self.decoder(layout.unpack(quantized.codes.to(features.dtype)), layout)
        l1 = F.l1_loss(reconstruction.float(), video.float())
        loss = (
            l1
            + quantized.codebook_loss
            + self.config.commitment_weight * quantized.commitment_loss
            + self.config.entropy_weight * quantized.entropy_loss
        )
        output = EvatokOutput(
            loss=loss,
            reconstruction=reconstruction,
            reconstruction_loss=l1,
            codebook_loss=quantized.codebook_loss,
            commitment_loss=quantized.commitment_loss,
            entropy_loss=quantized.entropy_loss,
            ids=quantized.ids,
            lengths=lengths,
            decoder_hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()

    @torch.no_grad()
    def encode(
        self, pixel_values_videos: torch.Tensor, lengths: LengthsLike | None = None, refinement_steps: int = 0
    ) -> VideoTokens:
        """Clips to tokens, each clip and block on its own. Without refinement the decoder does not run.

        Args:
            pixel_values_videos: (B, F, C, H, W) in [-1, 1].
            lengths: tokens of each block, (B, T), (T,) for all clips or one number; the middle candidate by default.
            refinement_steps: of searching, block by block, for ids that decode to less squared error than the
                encoder's (see `refinement_evatok`); each costs about two passes of the decoder.

        Returns:
            `VideoTokens` with ids (N,) and lengths (B, T), on the model's device.

        Raises:
            ValueError: a wrong video shape, lengths outside the assignment space, a negative number of steps, or
                refinement by a model without its decoder.
        """
        video = self.check_video(pixel_values_videos)
        lengths = self._check_lengths(lengths, len(video))
        ids = []
        for index, clip_lengths in enumerate(lengths.tolist()):
            state = self.start_encoding()
            blocks = video[index : index + 1].split(self.config.frames_per_block, dim=1)
            for block, length in zip(blocks, clip_lengths, strict=True):
                ids.append(self.encode_block(block, length, state, refinement_steps))
        return VideoTokens(
            ids=torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64, device=video.device),
            lengths=lengths.to(video.device),
            **self.origin(),
        )

    def origin(self) -> dict[str, Any]:
        """What `VideoTokens` say of the tokenizer that made them."""
        return {
            "height": self.config.image_size,
            "width": self.config.image_size,
            "checkpoint": self.config._name_or_path.rstrip("/").rsplit("/", 1)[-1] or None,
            "fingerprint": self.fingerprint(),
        }

    def start_encoding(self) -> ClipState:
        """The state before the first block of a clip, for `encode_block`."""
        return ClipState([LayerCache() for _ in self.encoder.layers])

    @torch.no_grad()
    def encode_block(
        self, frames: torch.Tensor, length: int, state: ClipState, refinement_steps: int = 0
    ) -> torch.Tensor:
        """The next block of a clip to ids, the same that `encode` gives it, as soon as its frames are there.

        Args:
            frames: (1, F / T, C, H, W) in [-1, 1].
            length: its tokens, one of the candidates.
            state: from `start_encoding`; moves on by a block.
            refinement_steps: see `encode`; for all blocks of a clip or for none.

        Returns:
            (length,) int64.

        Raises:
            ValueError: a wrong shape, a length that is no candidate, a clip that is complete, a negative number of
                steps, or refinement by a model without its decoder or after blocks without it.
        """
        frames = self.check_video(frames, self.config.frames_per_block)
        self._check_block(length, state)
        self._start_refinement(refinement_steps, state)
        features = self.encoder.block(frames, state.block, length, state.caches)  # (1, length, d)
        state.block += 1
        if not refinement_steps:
            return self.quantizer.to_ids(features[0])
        past = state.decoding
        with torch.inference_mode(False):  # whose tensors, caches too, take part in no gradients
            ids = refine_block(
                self.quantizer, self.decoder, features[0], frames, past.block, past.caches, refinement_steps
            )
            self.decode_block(ids, past)
        return ids

    def check_refinement(self, steps: int) -> None:
        """Raises ValueError for a number of refinement steps that there is not, or steps without a decoder."""
        check_refinement_steps(steps)
        if steps:
            self.check_decoder("refine")

    def _start_refinement(self, steps: int, state: ClipState) -> None:
        self.check_refinement(steps)
        if state.block and (state.decoding is None) != (not steps):
            raise ValueError("refine all blocks of a clip or none; the blocks before would be decoded with others.")
        if steps and not state.block:
            state.decoding = self.start_decoding()

    def start_decoding(self) -> ClipState:
        """The state before the first block of a clip, for `decode_block`. Raises ValueError without a decoder."""
        self.check_decoder()
        return ClipState([LayerCache() for _ in self.decoder.layers])

    @torch.no_grad()
    def decode_block(self, ids: torch.Tensor, state: ClipState) -> torch.Tensor:
        """The ids (n,) of the next block of a clip to its frames (1, F / T, C, H, W) in [-1, 1], as `decode` does.

        Raises:
            ValueError: a number of ids that is no candidate, or a clip that is complete.
        """
        self._check_block(len(ids), state)
        codes = self.quantizer.to_codes(ids.to(self.device)).to(self.dtype)  # (n, d)
        frames = self.decoder.block(codes[None], state.block, state.caches)
        state.block += 1
        return frames.clamp(-1, 1)

    @torch.no_grad()
    def decode(self, tokens: VideoTokens) -> torch.Tensor:
        """Tokens to clips.

        Args:
            tokens: from `encode`, a file, or a generator.

        Returns:
            (B, F, C, H, W) in [-1, 1].

        Raises:
            ValueError: tokens of another checkpoint, ids outside the codebook, lengths outside the assignment space, or
                a model without its decoder.
        """
        self.check_tokens(tokens)
        clips, start = [], 0
        for clip_lengths in tokens.lengths.tolist():
            state, blocks = self.start_decoding(), []
            for length in clip_lengths:
                blocks.append(self.decode_block(tokens.ids[start : start + length], state))
                start += length
            clips.append(torch.cat(blocks, dim=1))
        if not clips:
            c = self.config
            size = (0, c.num_frames, c.num_channels, c.image_size, c.image_size)
            return torch.empty(size, device=self.device, dtype=self.dtype)
        return torch.cat(clips)

    def reads(self, fingerprint: str | None) -> bool:
        """Whether ids of the checkpoint of that fingerprint (None: unknown) mean here what they mean there."""
        return fingerprint in self.config.same_ids_as or fingerprint == self.fingerprint()

    def check_tokens(self, tokens: VideoTokens) -> None:
        """Raises ValueError unless this model can decode the tokens: who made them, their lengths, their ids."""
        self.check_decoder()
        self._check_lengths(tokens.lengths, len(tokens))
        self.check_origin(tokens)

    def check_origin(self, tokens: VideoTokens) -> None:
        """Raises ValueError for tokens of another checkpoint, or ids outside the codebook."""
        if tokens.fingerprint is not None and not self.reads(tokens.fingerprint):
            raise ValueError(
                f"these tokens were made by checkpoint {tokens.checkpoint or 'unknown'} ({tokens.fingerprint}), but "
                f"this one is {self.config._name_or_path or 'unnamed'} ({self.fingerprint()}); load the checkpoint "
                "that made them."
            )
        ids = tokens.ids
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.config.codebook_size):
            raise ValueError(
                f"ids run from {int(ids.min())} to {int(ids.max())}, but the codebook has "
                f"{self.config.codebook_size} entries; the tokens are damaged or of another checkpoint."
            )

    def _check_lengths(self, lengths: LengthsLike | None, batch_size: int) -> torch.Tensor:
        if lengths is None:
            lengths = self.config.block_lengths[len(self.config.block_lengths) // 2]
        return self.assignment_space.validate(lengths, batch_size)

    def _check_block(self, length: int, state: ClipState) -> None:
        if length not in self.config.block_lengths:
            raise ValueError(f"a block has one of {self.config.block_lengths} tokens, not {length}.")
        if state.block >= self.config.num_blocks:
            raise ValueError(f"all {self.config.num_blocks} blocks of this clip are done; start another one.")
