"""Floating-point operations of training, by formula, and how many a device can do. A multiplication and an addition are
two.

Attention is counted as it is computed, block by block: what is masked costs nothing. Frozen networks are counted by
torch on the meta device, without memory or time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from evatok_hf import EvatokConfig, EvatokGeneratorConfig, EvatokRouterConfig
from evatok_hf.models.modeling_evatok import FILTER_INPUTS


def _stack(layers: int, width: int, mlp_ratio: int, queries: Sequence[int], memory: Sequence[int]) -> float:
    """Q-Former layers: queries of block t attend to queries and memory of blocks <= t. (T,) counts of both."""
    operations, own, seen = 0.0, 0, 0
    for query, keys in zip(queries, memory, strict=True):
        own, seen = own + query, seen + keys
        operations += 2 * (4 + 2 + 2 * mlp_ratio) * width**2 * query  # self-attention, cross-attention, perceptron
        operations += 2 * 2 * width**2 * keys  # the memory's keys and values
        operations += 4 * width * query * (own + seen)  # scores and their use
    return layers * operations


def tokenizer_flops(config: EvatokConfig, lengths: Sequence[int]) -> tuple[float, float]:
    """Of the encoder and of the decoder, for one clip's forward pass; embeddings and the search in the codebook too.

    Fewer lengths than a clip has blocks mean its first blocks.
    """
    cells = [config.embeddings_per_block] * len(lengths)
    patch = config.num_channels * config.frames_per_block * config.patch_size**2
    tokens, places = sum(lengths), sum(cells)
    flops = []
    for width, layers, queries, memory in (
        (config.encoder_hidden_size, config.encoder_num_layers, lengths, cells),
        (config.decoder_hidden_size, config.decoder_num_layers, cells, lengths),
    ):
        pixels = 2 * places * patch * config.embed_dim
        ends = 2 * config.embed_dim * (width * (sum(queries) + sum(memory)) + config.codebook_dim * tokens)
        if not flops:  # the encoder's queries are projected once more
            ends += 2 * width**2 * tokens
        flops.append(_stack(layers, width, config.mlp_ratio, queries, memory) + pixels + ends)
    if config.token_patches:
        # The linear codec, in the encoder's place, resizes as if frames were square: a block's planes and the last
        # frame's on the way in, a block's and those of shares on the way out. Encoding tries both kinds of codes and
        # makes the last frame of each block that another follows; a map and a convolution of 3 x 3 are the filter.
        planes, size = config.num_channels * config.frames_per_block, config.image_size
        plane = [2 * (side * size**2 + side**2 * size) for side in (config.patch_size * n**0.5 for n in lengths)]
        maps = [2 * patch * config.codebook_dim * length for length in lengths]
        inputs = 2 * patch * FILTER_INPUTS * config.embeddings_per_block
        followed = slice(config.num_blocks - 1)
        flops[0] = (planes + config.num_channels) * sum(plane) + 4 * sum(maps)
        flops[0] += (planes + 1) * sum(plane[followed]) + 2 * sum(maps[followed])
        flops[0] += (1 + 9 / config.frames_per_block) * inputs * len(lengths[followed])
        flops[1] += (planes + 1) * sum(plane) + 2 * sum(maps) + 10 * inputs * len(lengths)
        flops[1] += 2 * patch * config.decoder_hidden_size * places
    search = 2 * tokens * config.codebook_size * config.codebook_dim * (2 if config.token_patches else 1)
    return flops[0] + search, flops[1]


def search_flops(config: EvatokConfig) -> tuple[float, float]:
    """Of reconstructing a clip under every assignment: by the tree of their prefixes, and one by one."""

    def forward(lengths: tuple[int, ...]) -> float:
        return sum(tokenizer_flops(config, lengths))

    assignments = [tuple(lengths) for lengths in config.assignment_space.all().tolist()]
    prefixes = {lengths[:t] for lengths in assignments for t in range(1, config.num_blocks + 1)}
    return sum(forward(nodes) - forward(nodes[:-1]) for nodes in prefixes), sum(map(forward, assignments))


def router_flops(config: EvatokRouterConfig) -> float:
    """Of one clip's pass through the router's transformer."""
    tokens = 1 + config.num_blocks * (config.grid_size // config.pooling) ** 2
    layer = 2 * (4 + 2 * config.mlp_ratio) * config.hidden_size**2 * tokens + 4 * config.hidden_size * tokens**2
    return config.num_hidden_layers * layer


def generator_flops(config: EvatokGeneratorConfig, places: int, sequences: int) -> float:
    """Of the forward pass of so many sequences of equal length, with logits for all of their places."""
    width, attention = config.hidden_size, 4 * config.hidden_size * (places / sequences + 1) / 2
    keys = width * config.num_key_value_heads / config.num_attention_heads
    layer = 2 * width * (2 * width + 2 * keys + 3 * config.intermediate_size) + attention
    return places * (config.num_hidden_layers * layer + 2 * width * config.vocab_size)


def counted(make: Callable[[], Callable[..., Any]], *shapes: tuple[int, ...]) -> float:
    """Of the forward pass of a module or function for inputs of these shapes, counted by torch on the meta device."""
    with torch.device("meta"):
        module, inputs = make(), [torch.empty(shape) for shape in shapes]
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
    return counter.get_total_flops()


def synchronize(device: torch.device) -> None:
    """Waits for what runs on the device."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def rate(operation: Callable[[], Any], amount: float, device: torch.device, seconds: float) -> float:
    """`amount` a second, by the quickest of as many calls as fit into `seconds`."""
    operation()
    calls, end = [], time.perf_counter() + seconds
    while not calls or time.perf_counter() < end:
        synchronize(device)
        started = time.perf_counter()
        operation()
        synchronize(device)
        calls.append(time.perf_counter() - started)
    return amount / min(calls)


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.bfloat16, seconds: float = 2.0) -> float:
    """Operations a second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return rate(lambda: a @ b, 2 * side**3, device, seconds)
