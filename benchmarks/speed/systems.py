"""The tokenizers that `tokenizer.py` compares, each with random weights, its operations and its weights' bytes.

Speed depends on no weight's value. The peers encode and decode with transformers as large as the decoder of this
tokenizer: at the size "paper" these are their published sizes, at smaller ones the same proportions.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.common.machine import peak_bytes, resident_bytes
from benchmarks.peers import AdapTok, AdapTokScorer, Larp, PeerSizes
from evatok_hf import EvatokConfig, EvatokModel, VideoTokens
from training.common.flops import counted, tokenizer_flops

NAMES = {"evatok": "EVATok", "larp": "LARP-L", "adaptok": "AdapTok"}
Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass
class Side:
    """Encoding or decoding."""

    call: Callable[[], Any]  # for a batch; decoding is of random ids
    flops: float  # of a clip
    weights: int  # bytes that any batch must read once


@dataclass
class System:
    """A tokenizer with a batch to work on: its name for tables, all of its parameters, and a clip's mean tokens."""

    name: str
    parameters: int
    tokens: float
    encode: Side
    decode: Side


def peer_sizes(config: EvatokConfig, adaptive: bool) -> PeerSizes:
    """As wide and deep as the decoder of `config`; as many tokens as patches, or as the longest assignment has."""
    same = ("image_size", "num_frames", "num_blocks", "patch_size", "num_channels")
    return PeerSizes(
        **{name: getattr(config, name) for name in same},
        num_tokens=config.assignment_space.max_tokens if adaptive else config.num_blocks * config.embeddings_per_block,
        width=config.decoder_hidden_size,
        num_layers=config.decoder_num_layers,
        num_heads=config.decoder_num_heads,
    )


def peer_flops(kind: type[Larp], sizes: PeerSizes, tokens: int) -> tuple[float, float]:
    """Of encoding and of decoding a clip that keeps so many tokens."""

    def decoding() -> Callable[[torch.Tensor], torch.Tensor]:
        peer = kind(sizes)
        return lambda ids: peer.pixels(peer.latents(ids.long()))

    video = (1, sizes.num_frames, sizes.num_channels, sizes.image_size, sizes.image_size)
    return counted(lambda: kind(sizes).encode, video), counted(decoding, (1, tokens))


def scorer_flops(sizes: PeerSizes) -> float:
    """Of one pass of AdapTok's scorer over a clip."""
    features = (1, sizes.num_tokens, sizes.width)
    return counted(lambda: AdapTokScorer(sizes), features, features, (1, sizes.num_blocks))


def weight_bytes(model: torch.nn.Module, *parts: str) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if name.startswith(parts))


@dataclass
class Systems:
    """Makes tokenizers of the size of `config`."""

    config: EvatokConfig
    device: torch.device
    dtype: torch.dtype

    def make(self, kind: Callable[[Any], Model], sizes: Any) -> Model:
        torch.manual_seed(0)
        return kind(sizes).to(self.device, self.dtype).eval()

    def clips(self, count: int) -> torch.Tensor:
        """(count, F, C, H, W) in [-1, 1]; what is on them does not change how long anything takes."""
        c = self.config
        shape = (count, c.num_frames, c.num_channels, c.image_size, c.image_size)
        return (2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1).to(self.device, self.dtype)

    def evatok(self, lengths: torch.Tensor, model: EvatokModel | None = None, exact: bool | None = None) -> System:
        """For a batch of clips with these lengths (B, T); `exact` as of `EvatokModel.encode`."""
        model = model or self.make(EvatokModel, self.config)
        video = self.clips(len(lengths))
        chance = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.codebook_size, (int(lengths.sum()),), generator=chance)
        tokens = VideoTokens(ids.to(self.device), lengths)
        flops = torch.tensor([tokenizer_flops(self.config, row) for row in lengths.tolist()]).double().mean(0).tolist()
        encoder, decoder = (weight_bytes(model, part, "quantizer") for part in ("encoder", "decoder"))
        return System(
            NAMES["evatok"],
            model.num_parameters(),
            float(lengths.sum(1).double().mean()),
            Side(lambda: model.encode(video, lengths, exact=exact), flops[0], encoder),
            Side(lambda: model.decode(tokens, exact=exact), flops[1], decoder),
        )

    def peer(self, name: str, lengths: torch.Tensor) -> System:
        """LARP, always with all its tokens, which is how it was trained; or AdapTok for given lengths (B, T), without
        its scorer."""
        sizes = peer_sizes(self.config, adaptive=name == "adaptok")
        peer = self.make({"larp": Larp, "adaptok": AdapTok}[name], sizes)
        video = self.clips(len(lengths))
        ids = torch.randint(sizes.codebook_size, (len(lengths), sizes.num_tokens)).to(self.device)
        if name == "larp":
            given, tokens, padded = (ids,), sizes.num_tokens, sizes.num_tokens
        else:  # a batch is padded to its longest clip
            totals = lengths.sum(1)
            given, tokens, padded = (ids, lengths.to(self.device)), float(totals.double().mean()), int(totals.max())
        flops = peer_flops(type(peer), sizes, padded)
        encoder = weight_bytes(peer, "patch_embedding", "queries", "encoder", "to_codebook", "codebook")
        decoder = weight_bytes(peer, "codebook", "from_codebook", "patch_query", "decoder", "norm", "to_patch")
        return System(
            NAMES[name],
            sum(p.numel() for p in peer.parameters()),
            tokens,
            Side(lambda: peer.encode(video), flops[0], encoder),
            Side(lambda: peer.decode(*given), flops[1], decoder),
        )

    def scorer_pass(self, lengths: torch.Tensor) -> Callable[[], Any]:
        """One of AdapTok's T passes for a batch of clips with these lengths (B, T), the last: all cost the same."""
        sizes = peer_sizes(self.config, adaptive=True)
        scorer = self.make(AdapTokScorer, sizes)
        features, quantized = torch.randn(2, len(lengths), sizes.num_tokens, sizes.width).to(self.device, self.dtype)
        chosen = lengths.to(self.device, copy=True)
        chosen[:, -1] = scorer.tokens_per_block
        return lambda: scorer(features, quantized, chosen)


def memory_of(name: str, preset: str, lengths: list[list[int]], device: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes while encoding and decoding a batch: {"before", "encode", "decode"}; to be called in a fresh process.

    "before" is what is there before the first call: weights and, on the CPU, the libraries too.
    """
    place, lengths = torch.device(device), torch.tensor(lengths)
    systems = Systems(EvatokConfig.from_preset(preset), place, dtype)
    system = systems.evatok(lengths) if name == "evatok" else systems.peer(name, lengths)
    gc.collect()
    before = torch.cuda.memory_allocated(place) if place.type == "cuda" else resident_bytes()
    calls = {"encode": system.encode.call, "decode": system.decode.call}
    return {"before": before} | {side: peak_bytes(call, place) for side, call in calls.items()}
