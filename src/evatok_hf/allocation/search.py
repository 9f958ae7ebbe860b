"""Every assignment's reconstruction, exactly, through the prefix tree (our choice; the paper tries all one by one).

Blocks are causal, so what becomes of block t depends on the lengths of blocks 0 .. t alone. The 625 assignments of four
blocks and five candidates are the leaves of a tree of 5 + 25 + 125 + 625 = 780 nodes, each one block encoded and
decoded with the cached keys and values of its ancestors, where trying all assignments takes 2,500 blocks. The walk does
the same arithmetic as the model, but what does not depend on the node is computed once, the children of a node go
through the layers together, products of weights are folded into one matrix, and keys and values are written where the
next block finds them instead of being concatenated.

Nodes are numbered level after level, inside a level in the order of their prefix of lengths. Errors are means over
frames, so the figure of an assignment is the mean over the nodes on its path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..metrics.perceptual import PerceptualDistance, passes
from ..models.configuration_evatok import AssignmentSpace
from ..models.modeling_evatok import ADDED, EvatokLayer, EvatokModel, token_places, unpatchify


@dataclass
class SearchResult:
    """Figures of all assignments of B clips, float32 on the CPU.

    Attributes:
        space: the assignments.
        mse: (B, nodes) mean squared error of a node's block, frames in 0..1; NaN where it was left out.
        distance: (B, nodes) mean perceptual distance of its frames, or None where no metric was given.
    """

    space: AssignmentSpace
    mse: torch.Tensor
    distance: torch.Tensor | None

    def table(self) -> torch.Tensor:
        """The figures of each assignment, (B, A, 3): distance, PSNR in dB, mean squared error; NaN if not measured."""
        paths = assignment_paths(self.space)  # (A, T)
        mse = self.mse[:, paths].double().mean(-1)
        distance = torch.full_like(mse, torch.nan) if self.distance is None else self.distance[:, paths].mean(-1)
        return torch.stack([distance, -10 * mse.log10(), mse], dim=-1).float()


def num_nodes(space: AssignmentSpace) -> int:
    """Nodes of the tree, m + m^2 + .. + m^T."""
    return sum(len(space.block_lengths) ** (t + 1) for t in range(space.num_blocks))


def assignment_paths(space: AssignmentSpace) -> torch.Tensor:
    """The node of each block of each assignment, (A, T) int64."""
    m, t = len(space.block_lengths), space.num_blocks
    index = torch.arange(len(space))
    levels, first = [], 0
    for level in range(t):
        levels.append(first + index // m ** (t - 1 - level))
        first += m ** (level + 1)
    return torch.stack(levels, dim=1)


@torch.inference_mode()
def search_assignments(
    model: EvatokModel,
    pixel_values_videos: torch.Tensor,
    metric: PerceptualDistance | None = None,
    nodes_per_batch: int = 8,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    branches: int | None = None,
    generator: torch.Generator | None = None,
) -> SearchResult:
    """Measures all assignments of each clip, or with `branches` a random part of them.

    Args:
        model: a tokenizer in evaluation mode.
        pixel_values_videos: (B, F, C, H, W) in [-1, 1].
        metric: a perceptual distance on the model's device, or None for the squared error alone.
        nodes_per_batch: clips searched at once, at one node each, whose children are computed together; bounds memory,
            does not change the figures beyond rounding.
        progress: show a progress bar of nodes.
        dtype: of the transformers, the model's own when not given. In torch.bfloat16, with a metric that was moved
            `.to(torch.bfloat16)`, it took two thirds of the time on one CPU core.
        branches: lengths tried after every prefix, drawn at random for each batch; all when not given. Two of five over
            four blocks are 30 of 780 nodes, and 16 of 625 assignments.
        generator: of these draws, on the CPU.

    Raises:
        ValueError: a wrong video shape, `nodes_per_batch` below 1, or `branches` outside 1 .. candidates.
    """
    clips = _check(model, pixel_values_videos, nodes_per_batch)
    space = model.assignment_space
    branches = len(space.block_lengths) if branches is None else branches
    if not 1 <= branches <= len(space.block_lengths):
        raise ValueError(f"branches must lie in 1..{len(space.block_lengths)}, got {branches}.")
    visited = sum(branches ** (t + 1) for t in range(space.num_blocks))
    weights = _Weights(model, dtype or model.dtype)
    mse, distance = torch.full((2, len(clips), num_nodes(space)), torch.nan)
    with tqdm(total=len(clips) * visited, unit="node", desc="search", disable=not progress) as bar:
        for start in range(0, len(clips), nodes_per_batch):
            rows = slice(start, start + nodes_per_batch)
            tree = _Tree(weights, clips[rows], metric, mse[rows], distance[rows], bar, branches, generator)
            tree.visit(0, 0, 0, tree.grey)
    return SearchResult(space, mse, None if metric is None else distance)


Cross = Callable[[torch.Tensor], torch.Tensor]
Written = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Siblings:
    """Nodes of one block after the same prefix, which lie one after the other in a sequence.

    Attributes:
        start: places before them, the same for all.
        ends: of each, were it alone after these.
        slices: where each lies among the siblings.
        index: place of each element among all that its node's block can have.
    """

    def __init__(self, start: int, places: Sequence[slice]):
        """places: of each, see `token_places`."""
        sizes = [place.stop - place.start for place in places]
        self.start, self.ends = start, [start + size for size in sizes]
        lasts = list(accumulate(sizes))
        self.slices = [slice(last - size, last) for last, size in zip(lasts, sizes, strict=True)]
        self.index = torch.cat([torch.arange(place.start, place.stop) for place in places])

    def write(self, number: int, buffer: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """One sibling's keys and values (B, sum of Q, D) into the buffer (2, B, capacity, D), after what is before."""
        place, part = slice(self.start, self.ends[number]), self.slices[number]
        buffer[0, :, place], buffer[1, :, place] = keys[:, part], values[:, part]


class _Layer:
    """An `EvatokLayer` over keys and values that lie in buffers. Projections of positions are tables, made once.

    Args:
        layer: of the model.
        cast: the same in the dtype of the search.
        position, memory_position: of queries and memory, (T, Q, D) and (T, K, D).
    """

    def __init__(self, layer: EvatokLayer, cast: EvatokLayer, position: torch.Tensor, memory_position: torch.Tensor):
        own, cross = layer.self_attention, layer.cross_attention
        self.layer, self.head_dim, self.cross = cast, own.head_dim, cross
        projections = [getattr(cast.self_attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        self.qkv = torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections])
        dtype = self.qkv[0].dtype
        table = torch.cat([_weigh(position, own.q_proj), _weigh(position, own.k_proj)], -1)
        self.position = table.to(dtype)  # (T, Q, 2 D) to add to queries and keys
        self.cross_position = _weigh(position, cross.q_proj).to(dtype)  # (T, Q, D)
        self.memory_position = _weigh(memory_position, cross.k_proj).to(dtype)  # (T, K, D)

    def __call__(self, x: torch.Tensor, t: int, siblings: Siblings, own: torch.Tensor, cross: Cross) -> Written:
        """x (B, sum of Q, D), siblings of block t one after the other -> the same, their keys and their values.

        own: (2, B, capacity, D), keys and values of earlier blocks. Those of the siblings are written after them, one
        over the other, and returned. cross: the attention to the memory, of queries (B, sum of Q, D).
        """
        layer, d = self.layer, x.shape[-1]
        q, k, v = F.linear(layer.self_norm(x), *self.qkv).split(d, -1)
        query_position, key_position = self.position[t, siblings.index].split(d, -1)
        q, k = q + query_position, k + key_position
        parts = []
        for number, (part, end) in enumerate(zip(siblings.slices, siblings.ends, strict=True)):
            siblings.write(number, own, k, v)
            parts.append(self.attend(q[:, part], own[0, :, :end], own[1, :, :end]))
        x = x + layer.self_attention.o_proj(torch.cat(parts, 1))
        q = layer.cross_attention.q_proj(layer.cross_norm(x)).add_(self.cross_position[t, siblings.index])
        x = x + layer.cross_attention.o_proj(cross(q))
        return x + layer.mlp(layer.mlp_norm(x)), k, v

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class _Weights:
    """Weights that serve all clips: the layers, and products of matrices between which there is nothing nonlinear."""

    def __init__(self, model: EvatokModel, dtype: torch.dtype):
        cast = model if dtype == model.dtype else deepcopy(model).to(dtype)
        self.model, self.cast, self.dtype = model, cast, dtype
        encoder, decoder = model.encoder, model.decoder
        if encoder is not None:
            cells, tokens = encoder.positions.cells(), encoder.positions.tokens()
            pairs = zip(encoder.layers, cast.encoder.layers, strict=True)
            self.encoder = [_Layer(layer, other, tokens, cells) for layer, other in pairs]
            self.features = [x.to(dtype) for x in _product(encoder.out_projection, encoder.to_codebook)]
        self.cells, tokens = decoder.positions.cells().to(dtype), decoder.positions.tokens()
        pairs = zip(decoder.layers, cast.decoder.layers, strict=True)
        self.decoder = [_Layer(layer, other, decoder.positions.cells(), tokens) for layer, other in pairs]
        last = [decoder.out_projection, decoder.to_patch]
        if model.config.patch_basis == "cosine":
            last.append(decoder.transform.synthesis_matrix())
        self.patches = [x.to(dtype) for x in _product(*last)]
        # Codes are of few dimensions, so whatever is linear in them is cheap: the memory, its keys and its values.
        self.codes = []
        into = (decoder.from_codebook, decoder.memory_projection)
        self.memory = [x.to(dtype) for x in _product(*into)]
        for layer in self.decoder:
            products = [_product(*into, projection) for projection in (layer.cross.k_proj, layer.cross.v_proj)]
            self.codes.append([torch.cat(parts).to(dtype) for parts in zip(*products, strict=True)])


def _weigh(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return F.linear(x.to(linear.weight.dtype), linear.weight)


def _product(*maps: nn.Linear | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the maps one after the other, in double precision."""
    weight = bias = None
    for step in maps:
        matrix = (step if isinstance(step, torch.Tensor) else step.weight).double()
        offset = matrix.new_zeros(len(matrix)) if isinstance(step, torch.Tensor) else step.bias.double()
        weight, bias = (matrix, offset) if weight is None else (matrix @ weight, matrix @ bias + offset)
    return weight, bias


class _Tree:
    """A walk over the tree of some clips at once, depth first: no more than the ancestors of a node are kept."""

    def __init__(self, weights, clips, metric, mse, distance, bar, branches, generator):
        self.weights, self.metric, self.mse, self.distance, self.bar = weights, metric, mse, distance, bar
        self.branches, self.generator = branches, generator
        model, dtype = weights.model, weights.dtype
        config, self.space = model.config, model.assignment_space
        self.blocks = clips.split(config.frames_per_block, dim=1)
        self.references = [
            [] if metric is None else [metric.reference(part) for part in passes(_frames(block))]
            for block in self.blocks
        ]

        def buffers(layers: list[_Layer], tokens: int, dim: int) -> list[torch.Tensor]:
            return [clips.new_empty(2, len(clips), tokens, dim, dtype=dtype) for _ in layers]

        tokens, cells = self.space.max_tokens, config.num_blocks * config.embeddings_per_block
        self.decoder_own = buffers(weights.decoder, cells, config.decoder_hidden_size)
        self.decoder_cross = buffers(weights.decoder, tokens, config.decoder_hidden_size)
        self.grey = None if model.codec is None else model.codec.grey(len(clips))
        if model.codec is not None:
            return
        # Of the encoder, only queries depend on the lengths; its memory is that of the clip.
        memory, longest = model.encoder.memory(clips), self.space.block_lengths[-1]  # (B, T, G^2, D)
        queries = model.encoder.query_projection(model.encoder.pooling[:longest] @ memory)
        self.queries = (queries + model.encoder.positions.tokens()).to(dtype)  # (B, T, M, D)
        self.keys, self.values = [], []  # of each encoder layer, (B, T * G^2, D)
        for layer in weights.encoder:
            keys = layer.cross.k_proj(memory) + layer.memory_position
            self.keys.append(keys.to(dtype).flatten(1, 2))
            self.values.append(layer.cross.v_proj(memory).to(dtype).flatten(1, 2))
        self.encoder_own = buffers(weights.encoder, tokens, config.encoder_hidden_size)

    def visit(self, t: int, prefix: int, start: int, last: torch.Tensor | None) -> None:
        """All nodes of block t, and below, of the assignments that begin with the prefix of this number.

        `start` tokens come before; the buffers hold their keys and values, which no node of block t or below changes.
        `last` is what `ClipState.last` is after these, (B, C, H, W).
        """
        count = len(self.space.block_lengths)
        first = sum(count**level for level in range(1, t + 1)) + prefix * count
        digits = list(range(count))
        if self.branches < count:
            digits = torch.randperm(count, generator=self.generator)[: self.branches].tolist()
        lengths = [self.space.block_lengths[digit] for digit in digits]
        tokens = Siblings(start, [token_places(self.weights.model.config, length) for length in lengths])
        codes, encoded = self._encode(t, tokens, last)  # (B, sum of lengths, d)
        frames, decoded, lasts = self._decode(codes, t, tokens, last)
        self._measure(t, [first + digit for digit in digits], frames.clamp_(-1, 1))
        if t + 1 == self.space.num_blocks:
            return
        for number, digit in enumerate(digits):
            for siblings, buffer, keys, values in (*encoded, *decoded):
                siblings.write(number, buffer, keys, values)
            self.visit(t + 1, prefix * count + digit, tokens.ends[number], lasts[number])

    def _encode(self, t: int, tokens: Siblings, last: torch.Tensor | None) -> tuple[torch.Tensor, list[tuple]]:
        """-> codes (B, sum of lengths, codebook dim) of block t, and what `Siblings.write` takes, by layer."""
        model, cast, written = self.weights.model, self.weights.cast, []
        if model.codec is not None:
            cut = [model.codec.cut(self.blocks[t], part.stop - part.start) for part in tokens.slices]
            ids = torch.cat([model.codec.choose(patches, last, model.quantizer)[1] for patches in cut], 1)
            return model.quantizer.to_codes(ids), written
        cells = (t + 1) * model.config.embeddings_per_block
        x = self.queries[:, t, tokens.index]
        for layer, own, keys, values in zip(
            self.weights.encoder, self.encoder_own, self.keys, self.values, strict=True
        ):
            keys, values = keys[:, :cells], values[:, :cells]
            cross = partial(layer.attend, key=keys, value=values)  # to the clip, so that siblings go together
            x, *new = layer(x, t, tokens, own, cross)
            written.append((tokens, own, *new))
        features = F.linear(cast.encoder.norm(x), *self.weights.features)
        return model.quantizer.to_codes(model.quantizer.to_ids(features.flatten(0, 1))).view(features.shape), written

    def _decode(
        self, codes: torch.Tensor, t: int, tokens: Siblings, last: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[tuple], list[torch.Tensor | None]]:
        """Codes (B, sum of lengths, codebook dim) of block t -> frames (B, siblings, F/T, C, H, W), what
        `Siblings.write` takes, by layer, and of each sibling what `ClipState.last` is after it."""
        weights, config, codec = self.weights, self.weights.model.config, self.weights.model.codec
        area, count, written = config.embeddings_per_block, len(tokens.slices), []
        cells = Siblings(t * area, [slice(0, area)] * count)
        lasts, exact, codes = [None] * count, codes, codes.to(weights.dtype)
        if codec is None:
            heads = torch.stack([codes[:, part.start] for part in tokens.slices], 1)  # (B, siblings, codebook dim)
            queries = F.linear(heads, *weights.memory)[:, :, None]
        else:
            drafts = [codec.decode(exact[:, part], last) for part in tokens.slices]
            lasts = [draft[:, -1] for draft in drafts]
            draft = torch.stack(drafts, 1).to(weights.dtype)  # (B, siblings, F / T, C, H, W)
            queries = weights.cast.decoder.draft_queries(draft.flatten(0, 1)).unflatten(0, (-1, count))
        x = (queries + weights.cells[t]).flatten(1, 2)  # (B, siblings * G^2, D)
        for index, layer in enumerate(weights.decoder):
            own, memory = self.decoder_own[index], self.decoder_cross[index]
            keys, values = F.linear(codes, *weights.codes[index]).chunk(2, -1)
            keys = keys + layer.memory_position[t, tokens.index]

            def cross(q: torch.Tensor, layer=layer, memory=memory, keys=keys, values=values) -> torch.Tensor:
                parts = []
                for number, (part, end) in enumerate(zip(cells.slices, tokens.ends, strict=True)):
                    tokens.write(number, memory, keys, values)
                    parts.append(layer.attend(q[:, part], memory[0, :, :end], memory[1, :, :end]))
                return torch.cat(parts, 1)

            x, *new = layer(x, t, cells, own, cross)
            written += [(cells, own, *new), (tokens, memory, keys, values)]
        patches = F.linear(weights.cast.decoder.norm(x), *weights.patches)
        patches = patches.unflatten(1, (count, area)).flatten(0, 1)[:, None]  # (B * siblings, 1, G^2, P)
        frames = unpatchify(patches, config.frames_per_block, config.patch_size, config.num_channels)
        frames = frames.unflatten(0, (-1, count))
        return frames if codec is None else torch.add(draft, frames, alpha=ADDED), written, lasts

    def _measure(self, t: int, nodes: list[int], frames: torch.Tensor) -> None:
        """Of frames (B, nodes, F/T, C, H, W)."""
        error = (frames.float() - self.blocks[t][:, None].float()).square()
        self.mse[:, nodes] = error.flatten(2).mean(2).cpu() / 4  # [-1, 1] is twice as wide as 0..1
        if self.metric is not None:
            for number, node in enumerate(nodes):
                parts = zip(self.references[t], passes(_frames(frames[:, number])), strict=True)
                distances = torch.cat([self.metric.distance_to(reference, part) for reference, part in parts])
                self.distance[:, node] = distances.view(len(frames), -1).mean(1).cpu()
        self.bar.update(len(frames) * len(nodes))


@torch.inference_mode()
def brute_force(
    model: EvatokModel,
    pixel_values_videos: torch.Tensor,
    metric: PerceptualDistance | None = None,
    clips_per_batch: int = 8,
    progress: bool = False,
) -> torch.Tensor:
    """The reference of `search_assignments`: reconstructs every clip under every assignment, (B, A, 3)."""
    tables = []
    for batch in _check(model, pixel_values_videos, clips_per_batch).split(clips_per_batch):
        reference, rows = None if metric is None else metric.reference(_frames(batch)), []
        for lengths in tqdm(model.assignment_space.all(), "brute force", disable=not progress):
            frames = model(batch, lengths, return_dict=True).reconstruction.clamp(-1, 1)
            mse = (frames.float() - batch.float()).square().flatten(1).mean(1).double() / 4
            distance = torch.full_like(mse, torch.nan)
            if metric is not None:
                distance = metric.distance_to(reference, _frames(frames)).view(len(batch), -1).mean(1)
            rows.append(torch.stack([distance.double(), -10 * mse.log10(), mse], dim=-1).float().cpu())
        tables.append(torch.stack(rows, dim=1))
    return torch.cat(tables)


def _frames(clips: torch.Tensor) -> torch.Tensor:
    """(B, F, C, H, W) -> (B * F, C, H, W) float32, as metrics take them."""
    return clips.flatten(0, 1).float()


def _check(model: EvatokModel, clips: torch.Tensor, per_batch: int) -> torch.Tensor:
    if per_batch < 1:
        raise ValueError(f"at least 1 clip must be computed at once, got {per_batch}.")
    return model.check_video(clips)
