"""The tokenizers that `tokenizer.py` compares, each with random weights, its operations and its weights' bytes.

Speed depends on no weight's value. The peers encode and decode with transformers as large as the decoder of this
tokenizer: at the size "paper" these are their published sizes, at smaller ones the same proportions.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.machine import peak_bytes, resident_bytes
from benchmarks.peers import AdapTok, AdapTokScorer, Larp, PeerSizes
from evatok_hf import EvatokConfig, EvatokModel, VideoTokens
from training.common.flops import tokenizer_flops

NAMES = {"evatok": "EVATok", "larp": "LARP-L", "adaptok": "AdapTok"}


@dataclass
class Side:
    """Encoding or decoding: what to call for a batch; operations and ends of a clip, weights once.

    Attributes:
        call: encodes or decodes the batch.
        flops: of a clip.
        weights: bytes that any batch must read once.
    """

    call: Callable[[], Any]
    flops: float
    weights: int


@dataclass
class System:
    """A tokenizer with a batch to work on.

    Attributes:
        name: for tables.
        parameters: of encoder, codebook and decoder.
        tokens: of a clip, on average.
        encode, decode: see `Side`; decoding is of random ids.
    """

    name: str
    parameters: int
    tokens: float
    encode: Side
    decode: Side


def random_clips(config: EvatokConfig, count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(count, F, C, H, W) in [-1, 1]; what is on them does not change how long anything takes."""
    shape = (count, config.num_frames, config.num_channels, config.image_size, config.image_size)
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand(shape, generator=generator) - 1).to(device, dtype)


def random_tokens(config: EvatokConfig, lengths: torch.Tensor, device: torch.device) -> VideoTokens:
    """Of those lengths (B, T)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.codebook_size, (int(lengths.sum()),), generator=generator)
    return VideoTokens(ids.to(device), lengths)


def make_tokenizer(config: EvatokConfig, device: torch.device, dtype: torch.dtype) -> EvatokModel:
    torch.manual_seed(0)
    return EvatokModel(config).to(device, dtype).eval()


def peer_sizes(config: EvatokConfig, adaptive: bool) -> PeerSizes:
    """As wide and deep as the decoder of `config`; as many tokens as patches, or as the longest assignment has."""
    fixed = config.num_blocks * config.embeddings_per_block
    return PeerSizes(
        image_size=config.image_size,
        num_frames=config.num_frames,
        num_blocks=config.num_blocks,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        num_tokens=config.assignment_space.max_tokens if adaptive else fixed,
        width=config.decoder_hidden_size,
        num_layers=config.decoder_num_layers,
        num_heads=config.decoder_num_heads,
    )


def weight_bytes(model: torch.nn.Module, *parts: str) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if name.startswith(parts))


def evatok_system(model: EvatokModel, lengths: torch.Tensor, exact: bool | None = None) -> System:
    """For a batch of clips with these lengths (B, T); `exact` as of `EvatokModel.encode`."""
    video = random_clips(model.config, len(lengths), model.device, model.dtype)
    tokens = random_tokens(model.config, lengths, model.device)
    flops = torch.tensor([tokenizer_flops(model.config, row) for row in lengths.tolist()]).double().mean(0).tolist()
    return System(
        NAMES["evatok"],
        model.num_parameters(),
        float(lengths.sum(1).double().mean()),
        Side(lambda: model.encode(video, lengths, exact=exact), flops[0], weight_bytes(model, "encoder", "quantizer")),
        Side(lambda: model.decode(tokens, exact=exact), flops[1], weight_bytes(model, "decoder", "quantizer")),
    )


def peer_flops(make: Callable[[], Larp], tokens: int) -> tuple[float, float]:
    """Of encoding and of decoding a clip that keeps so many tokens, counted by torch on the meta device."""
    flops = []
    with torch.device("meta"), torch.no_grad():
        peer = make()
        s = peer.sizes
        video = torch.empty(1, s.num_frames, s.num_channels, s.image_size, s.image_size)
        ids = torch.empty(1, tokens, dtype=torch.int64)
        for call in (lambda: peer.encode(video), lambda: peer.pixels(peer.latents(ids))):
            with FlopCounterMode(display=False) as counter:
                call()
            flops.append(counter.get_total_flops())
    return flops[0], flops[1]


def scorer_flops(sizes: PeerSizes) -> float:
    """Of one pass of AdapTok's scorer over a clip."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        features = torch.empty(1, sizes.num_tokens, sizes.width)
        AdapTokScorer(sizes)(features, features, torch.empty(1, sizes.num_blocks, dtype=torch.int64))
    return counter.get_total_flops()


def peer_system(
    name: str, config: EvatokConfig, lengths: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> System:
    """LARP, always with all its tokens, which is how it was trained; or AdapTok for given lengths (B, T), without its
    scorer."""
    sizes = peer_sizes(config, adaptive=name == "adaptok")
    torch.manual_seed(0)
    peer = {"larp": Larp, "adaptok": AdapTok}[name](sizes).to(device, dtype).eval()
    video = random_clips(config, len(lengths), device, dtype)
    ids = torch.randint(sizes.codebook_size, (len(lengths), sizes.num_tokens)).to(device)
    if name == "larp":
        given, tokens, padded = (ids,), sizes.num_tokens, sizes.num_tokens
    else:  # a batch is padded to its longest clip
        totals = lengths.sum(1)
        given, tokens, padded = (ids, lengths.to(device)), float(totals.double().mean()), int(totals.max())
    flops = peer_flops(lambda: type(peer)(sizes), padded)
    encoder = weight_bytes(peer, "patch_embedding", "queries", "encoder", "to_codebook", "codebook")
    decoder = weight_bytes(peer, "codebook", "from_codebook", "patch_query", "decoder", "norm", "to_patch")
    return System(
        NAMES[name],
        sum(p.numel() for p in peer.parameters()),
        tokens,
        Side(lambda: peer.encode(video), flops[0], encoder),
        Side(lambda: peer.decode(*given), flops[1], decoder),
    )


def scorer_pass(
    config: EvatokConfig, lengths: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> Callable[[], Any]:
    """One of AdapTok's T passes for a batch of clips with these lengths (B, T), the last: all cost the same."""
    sizes = peer_sizes(config, adaptive=True)
    torch.manual_seed(0)
    scorer = AdapTokScorer(sizes).to(device, dtype).eval()
    features, quantized = torch.randn(2, len(lengths), sizes.num_tokens, sizes.width).to(device, dtype)
    chosen = lengths.clone()
    chosen[:, -1] = scorer.tokens_per_block
    chosen = chosen.to(device)
    return lambda: scorer(features, quantized, chosen)


def make_system(
    name: str, config: EvatokConfig, lengths: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> System:
    """One of `NAMES` for a batch of clips with these lengths (B, T)."""
    if name == "evatok":
        return evatok_system(make_tokenizer(config, device, dtype), lengths)
    return peer_system(name, config, lengths, device, dtype)


def memory_of(
    name: str,
    preset: str,
    lengths: Sequence[Sequence[int]],
    device: str,
    dtype: torch.dtype,
    threads: int | None = None,
) -> dict:
    """Bytes while encoding and decoding a batch: {"before", "encode", "decode"}; to be called in a fresh process.

    "before" is what is there before the first call: weights and, on the CPU, the libraries too.
    """
    if threads:
        torch.set_num_threads(threads)
    place = torch.device(device)
    system = make_system(name, EvatokConfig.from_preset(preset), torch.tensor(lengths), place, dtype)
    gc.collect()
    before = torch.cuda.memory_allocated(place) if place.type == "cuda" else resident_bytes()
    sides = {"encode": system.encode, "decode": system.decode}
    return {"before": before} | {side: peak_bytes(sides[side].call, place) for side in sides}
