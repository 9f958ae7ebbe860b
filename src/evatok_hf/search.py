"""Every assignment's reconstruction, exactly, through the prefix tree (our choice; the paper tries all one by one).

Blocks are causal, so what becomes of block t depends on the lengths of blocks 0 .. t alone. The 625 assignments of four
blocks and five candidates are the leaves of a tree of 5 + 25 + 125 + 625 = 780 nodes, each one block encoded and
decoded with the cached keys and values of its ancestors, where trying all assignments takes 2,500 blocks.

Nodes are numbered level after level, inside a level in the order of their prefix of lengths. Errors are means over
frames, so the figure of an assignment is the mean over the nodes on its path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .assignment import AssignmentSpace
from .layers_evatok import LayerCache
from .modeling_evatok import EvatokModel
from .perceptual import PerceptualDistance


@dataclass
class SearchResult:
    """Figures of all assignments of B clips, float32 on the CPU.

    Attributes:
        space: the assignments.
        mse: (B, nodes) mean squared error of a node's block, frames in 0..1.
        distance: (B, nodes) mean perceptual distance of its frames, or None where no metric was given.
    """

    space: AssignmentSpace
    mse: torch.Tensor
    distance: torch.Tensor | None

    def table(self) -> torch.Tensor:
        """(B, A, 3): distance (NaN without a metric), PSNR in dB and mean squared error of each assignment's clip."""
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
) -> SearchResult:
    """Measures all assignments of each clip.

    Args:
        model: a tokenizer in evaluation mode.
        pixel_values_videos: (B, F, C, H, W) in [-1, 1].
        metric: a perceptual distance on the model's device, or None for the squared error alone.
        nodes_per_batch: nodes computed at once, each of another clip; bounds memory, does not change the figures beyond
            rounding.
        progress: show a progress bar of nodes.

    Raises:
        ValueError: a wrong video shape, or `nodes_per_batch` below 1.
    """
    clips = _check(model, pixel_values_videos, nodes_per_batch)
    space = model.assignment_space
    mse = torch.zeros(len(clips), num_nodes(space))
    distance = None if metric is None else torch.zeros_like(mse)
    with tqdm(total=mse.numel(), unit="node", desc="search", disable=not progress) as bar:
        for start in range(0, len(clips), nodes_per_batch):
            rows = slice(start, start + nodes_per_batch)
            tree = _Tree(model, clips[rows], metric, mse[rows], None if distance is None else distance[rows], bar)
            tree.visit(0, 0, [LayerCache() for _ in model.encoder.layers], [LayerCache() for _ in model.decoder.layers])
    return SearchResult(space, mse, distance)


class _Tree:
    """A walk, depth first, so that no more than T ancestors are kept, over the tree of some clips at once."""

    def __init__(self, model, clips, metric, mse, distance, bar):
        self.model, self.metric, self.mse, self.distance, self.bar = model, metric, mse, distance, bar
        self.blocks = clips.split(model.config.frames_per_block, dim=1)
        self.references = [None if metric is None else metric.reference(_frames(block)) for block in self.blocks]

    def visit(self, t: int, prefix: int, encoder: list[LayerCache], decoder: list[LayerCache]) -> None:
        """All nodes of block t, and below, of the assignments that begin with the prefix of this number."""
        space = self.model.assignment_space
        first = sum(len(space.block_lengths) ** level for level in range(1, t + 1))
        for digit, length in enumerate(space.block_lengths):
            encoder_caches, decoder_caches = [c.branch() for c in encoder], [c.branch() for c in decoder]
            features = self.model.encoder.block(self.blocks[t], t, length, encoder_caches)  # (B, length, d)
            quantizer = self.model.quantizer
            codes = quantizer.to_codes(quantizer.to_ids(features.flatten(0, 1))).to(features.dtype)
            frames = self.model.decoder.block(codes.view_as(features), t, decoder_caches).clamp(-1, 1)
            child = prefix * len(space.block_lengths) + digit
            self._measure(t, first + child, frames)
            if t + 1 < space.num_blocks:
                self.visit(t + 1, child, encoder_caches, decoder_caches)

    def _measure(self, t: int, node: int, frames: torch.Tensor) -> None:
        error = (frames.float() - self.blocks[t].float()).square()
        self.mse[:, node] = error.flatten(1).mean(1).cpu() / 4  # [-1, 1] is twice as wide as 0..1
        if self.metric is not None:
            distances = self.metric.distance_to(self.references[t], _frames(frames))
            self.distance[:, node] = distances.view(len(frames), -1).mean(1).cpu()
        self.bar.update(len(frames))


@torch.inference_mode()
def brute_force(
    model: EvatokModel,
    pixel_values_videos: torch.Tensor,
    metric: PerceptualDistance | None = None,
    clips_per_batch: int = 8,
    progress: bool = False,
) -> torch.Tensor:
    """The reference of `search_assignments`: reconstructs every clip under every assignment, (B, A, 3)."""
    clips = _check(model, pixel_values_videos, clips_per_batch)
    space = model.assignment_space
    table = torch.empty(len(clips), len(space), 3)
    assignments = space.all()
    with tqdm(total=table[..., 0].numel(), unit="clip", desc="brute force", disable=not progress) as bar:
        for start in range(0, len(clips), clips_per_batch):
            batch = clips[start : start + clips_per_batch]
            reference = None if metric is None else metric.reference(_frames(batch))
            for index, lengths in enumerate(assignments):
                frames = model(batch, lengths).reconstruction.clamp(-1, 1)
                mse = (frames.float() - batch.float()).square().flatten(1).mean(1).double() / 4
                distance = torch.full_like(mse, torch.nan)
                if metric is not None:
                    distance = metric.distance_to(reference, _frames(frames)).view(len(batch), -1).mean(1)
                row = torch.stack([distance.double(), -10 * mse.log10(), mse], dim=-1)
                table[start : start + len(batch), index] = row.float().cpu()
                bar.update(len(batch))
    return table


def _frames(clips: torch.Tensor) -> torch.Tensor:
    """(B, F, C, H, W) -> (B * F, C, H, W) float32, as metrics take them."""
    return clips.flatten(0, 1).float()


def _check(model: EvatokModel, clips: torch.Tensor, per_batch: int) -> torch.Tensor:
    if per_batch < 1:
        raise ValueError(f"at least 1 clip must be computed at once, got {per_batch}.")
    return model.check_video(clips)
