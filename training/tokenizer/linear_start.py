"""A start for tokenizers under `token_patches`: the best linear codec of a few clips, and a codebook of their tokens.

The maps between patches and codes start as principal components, which gradient descent comes to slowly: among the
hundreds of values of a patch some carry a thousand times as much as others. The codebook starts as the centres of
k-means over the clips' tokens, and the maps from codes to patches as the least squares fit to the quantised codes, as
do the filters in the loop. From there on the decoder is trained. All of it is our choice.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.nn import functional as F

from evatok_hf.data.streaming import ClipStream, collate, to_float
from evatok_hf.models.modeling_evatok import EvatokModel, PaddedLayout, nearest_codes, patchify

# Of the component that varies most, so that its usual values are 11 degrees from the mean: unit codes are nearly in a
# plane there, where least squares lead back (0.5 is 0.1 to 0.5 dB worse; 0.1 is too near for float32).
_LARGEST = 0.2
# The length of codes before they are normalised, against which a step of Adam is short.
_CODE_LENGTH = 10.0
_ROUNDS = 8  # of k-means
_TOKENS_A_CODE = 16
# For the filters: blocks whose patches tell the components, times that all clips are coded, the ridge, as a share of
# what an input has on average, and the patches for each input below which a filter stays zero.
_BLOCKS_SEEN, _PASSES, _RIDGE, _PATCHES_AN_INPUT = 256, 2, 3e-4, 16


@torch.no_grad()
def start_linear(model: EvatokModel, clips: torch.Tensor, generator: torch.Generator) -> None:
    """Sets the linear codec and the codebook of a new tokenizer.

    Half of the codes are for patches, half for residuals. Which residuals there are depends on the codec: they come
    from coding the clips with what there is so far, where at first the only code for them is to change nothing.

    Args:
        model: under `token_patches`, not yet trained.
        clips: (B, F, C, H, W) in [-1, 1]; some hundred tell enough.
        generator: of the draws, on the CPU.

    Raises:
        ValueError: fewer tokens or residuals than codes.
    """
    config, codec, codes = model.config, model.codec, model.quantizer.weight
    half, blocks = config.codebook_size // 2, clips.unflatten(1, (config.num_blocks, -1))  # (B, T, F / T, C, H, W)
    count = -(-_TOKENS_A_CODE * half // len(config.block_lengths))  # of each length, so that none is neglected
    found = []
    for length in config.block_lengths:
        some = _draw(blocks.flatten(0, 1), -(-4 * count // length), generator)
        found.append(_draw(codec.cut(some, length).flatten(0, 1), count, generator))
    patches = torch.cat(found)
    codes[:half] = _fit(codec.patch_to_code, codec.code_to_patch, patches, half, 1.0, generator)
    skip = F.pad(codes.new_zeros(config.codebook_dim - 1), (0, 1), value=-1.0)
    codes[half:] = skip
    for projection in (codec.residual_to_code, codec.code_to_residual, codec.filters):
        projection.weight.zero_()
        projection.bias.zero_()
    codec.residual_to_code.bias.copy_(skip)
    cells = patchify(_draw(blocks.flatten(0, 1), _BLOCKS_SEEN, generator), 1, config.patch_size).flatten(0, 2)
    basis = _components(cells, codec.filter_inputs.out_features)  # which must not change while filters are there
    codec.filter_inputs.weight.copy_(basis)
    codec.filter_inputs.bias.copy_(-basis @ cells.mean(0))
    for _ in range(2):
        residuals = _residuals(model, blocks, patches.mean(0), count, generator)
        codes[half:] = _fit(codec.residual_to_code, codec.code_to_residual, residuals, half, -1.0, generator)
        _fit_filters(model, blocks, generator)


def _draw(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _components(values: torch.Tensor, count: int) -> torch.Tensor:
    """Principal components of values (N, P), scaled so that the largest has a deviation of `_LARGEST`, (count, P)."""
    centred = values - values.mean(0)
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(values))
    return vectors.flip(1)[:, :count].T * (_LARGEST / variances[-1].clamp_min(1e-12).sqrt())


def _fit(
    inward: nn.Linear, outward: nn.Linear, values: torch.Tensor, codes: int, sign: float, generator: torch.Generator
) -> torch.Tensor:
    """Sets the maps to codes and back for values (N, P); gives their codes, (codes, codebook dim)."""
    if len(values) < codes:
        raise ValueError(
            f"the clips have {len(values)} tokens or residuals, fewer than {codes} codes; give more clips."
        )
    mean, basis = values.mean(0), _components(values, inward.out_features - 1)
    inward.weight.copy_(F.pad(basis, (0, 0, 0, 1)) * values.shape[1])  # which the model divides values by
    inward.bias.copy_(F.pad(-basis @ mean, (0, 1), value=sign))
    features = F.normalize(inward(values / values.shape[1]), dim=-1)
    centres = k_means(features, codes, _ROUNDS, generator)
    nearest = F.pad(centres[nearest_codes(features, centres)], (0, 1), value=1.0)  # (N, d + 1)
    # The default driver would drop the components that vary least: below float32's rounding times the number of values.
    solution = torch.linalg.lstsq(nearest, values, driver="gels").solution  # (d + 1, P)
    outward.weight.copy_(solution[:-1].T)
    outward.bias.copy_(solution[-1])
    return _CODE_LENGTH * centres


class _Coded(NamedTuple):
    """Blocks of one length and number, and what the codec makes of them."""

    number: int
    frames: torch.Tensor  # (n, F / T, C, H, W)
    patches: torch.Tensor  # (n, length, P)
    before: torch.Tensor  # (n, C, H, W)
    codes: torch.Tensor  # (n, length, codebook dim)


def _coded(model: EvatokModel, blocks: torch.Tensor, generator: torch.Generator) -> Iterator[_Coded]:
    """Codes blocks (B, T, F / T, C, H, W), every block of every clip with a length of its own."""
    codec, candidates, (clips, num_blocks) = model.codec, torch.tensor(model.config.block_lengths), blocks.shape[:2]
    draws = torch.randint(len(candidates), (clips, num_blocks), generator=generator)
    last = codec.grey(clips)
    for t, lengths in enumerate(PaddedLayout(candidates[draws]).by_length()):
        for length, clip in lengths:
            frames, before = blocks[clip, t], last[clip]
            patches = codec.cut(frames, length)
            codes = model.quantizer.to_codes(codec.choose(patches, before, model.quantizer)[1])
            last[clip] = codec.last_frame(codes, before)
            yield _Coded(t, frames, patches, before, codes)


def _residuals(
    model: EvatokModel, blocks: torch.Tensor, mean: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Residuals (N, P) that are less than their patches less the mean, about `count` of each length."""
    found, share = [], -(-count // (blocks.shape[1] - 1))
    for coded in _coded(model, blocks, generator):
        if coded.number:
            residuals = model.codec.residuals(coded.patches, coded.before)
            smaller = residuals.square().sum(-1) < (coded.patches - mean).square().sum(-1)
            found.append(_draw(residuals[smaller], share, generator))
    return torch.cat(found)


def _fit_filters(model: EvatokModel, blocks: torch.Tensor, generator: torch.Generator) -> None:
    """Sets the filters in the loop by least squares."""
    codec, size = model.codec, model.config.patch_size
    grams, crosses = defaultdict(float), defaultdict(float)  # by length
    for _ in range(_PASSES):
        for coded in _coded(model, blocks, generator):
            unfiltered = codec.unfiltered(coded.codes, coded.before)
            seen = F.unfold(codec.seams(unfiltered), 3, padding=1).mT.flatten(0, 1)
            seen = F.pad(seen, (0, 1), value=1.0)  # (N, 9 inputs + 1)
            missing = patchify(coded.frames - unfiltered, 1, size).flatten(0, 2)  # (N, P)
            grams[coded.patches.shape[1]] += seen.T @ seen
            crosses[coded.patches.shape[1]] += seen.T @ missing
    for length, gram in grams.items():
        if gram[-1, -1] < _PATCHES_AN_INPUT * len(gram):
            continue
        gram += _RIDGE * gram.diagonal()[:-1].mean() * torch.eye(len(gram))
        solution = torch.linalg.solve(gram, crosses[length])
        weight, bias = codec.filter_of(length)
        weight.copy_(solution[:-1].T.view_as(weight))
        bias.copy_(solution[-1])


def start_together(accelerator: Accelerator, model: EvatokModel, stream: ClipStream, clips: int, seed: int) -> None:
    """`start_linear` from the first clips of the main process's stream, the same in all processes."""
    if accelerator.is_main_process:
        batch = collate(list(islice(stream, clips)))["pixel_values_videos"].cpu()  # where the model still is
        threads = torch.get_num_threads()
        torch.set_num_threads(min(threads * accelerator.num_processes, os.cpu_count()))  # the others wait
        start_linear(model, to_float(batch), torch.Generator().manual_seed(seed))
        torch.set_num_threads(threads)
    for parameter in (*model.codec.parameters(), *model.quantizer.parameters()):
        parameter.data.copy_(broadcast(parameter.data.to(accelerator.device)))


def k_means(points: torch.Tensor, count: int, rounds: int, generator: torch.Generator) -> torch.Tensor:
    """Unit vectors near which points (N, D), unit vectors too, lie; (count, D). An empty cluster begins anew."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = nearest_codes(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = torch.bincount(nearest, minlength=count) == 0
        sums[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
        centres = F.normalize(sums, dim=-1)
    return centres
