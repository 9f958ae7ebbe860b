"""A start for tokenizers under `token_patches`: the best linear codec of a few clips, and a codebook of their tokens.

The maps between patches and codes start as principal components, which gradient descent comes to slowly: among the
hundreds of values of a patch some carry a thousand times as much as others. The codebook starts as the centres of
k-means over the clips' tokens, and the map from codes to patches as the least squares fit to the quantised codes. From
there on everything is trained. All of it is our choice.
"""

from __future__ import annotations

from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.nn import functional as F

from evatok_hf.data.streaming import ClipStream, collate, to_float
from evatok_hf.models.modeling_evatok import EvatokModel, frames_to_token_patches, nearest_codes

# Of the component that varies most, so that its usual values are 11 degrees from the mean: unit codes are nearly in a
# plane there, where least squares lead back (0.5 is 0.1 to 0.5 dB worse; 0.1 is too near for float32).
_LARGEST = 0.2
# The length of codes before they are normalised, against which a step of Adam is short.
_CODE_LENGTH = 10.0
_ROUNDS = 8  # of k-means
_TOKENS_A_CODE = 16


@torch.no_grad()
def start_linear(model: EvatokModel, clips: torch.Tensor, generator: torch.Generator) -> float:
    """Sets the linear maps and the codebook of a new tokenizer.

    Args:
        model: under `token_patches`, not yet trained.
        clips: (B, F, C, H, W) in [-1, 1]; some hundred tell enough.
        generator: of the draws, on the CPU.

    Returns:
        The share of the variance of the clips' patches that the quantised tokens keep.

    Raises:
        ValueError: fewer tokens than codes, or a model without `token_patches`.
    """
    config = model.config
    if not config.token_patches:
        raise ValueError("a linear start is for tokenizers with token_patches; this one has none.")
    blocks = clips.unflatten(1, (config.num_blocks, -1)).flatten(0, 1)  # (B * T, F / T, C, H, W)
    found = []
    # As many of each length, so that none is neglected, from as many blocks as memory allows.
    count = -(-_TOKENS_A_CODE * config.codebook_size // len(config.block_lengths))
    for length in config.block_lengths:
        some = torch.randperm(len(blocks), generator=generator)[: -(-4 * count // length)]
        patches = frames_to_token_patches(blocks[some], length, config.patch_size).flatten(0, 1)
        found.append(patches[torch.randperm(len(patches), generator=generator)[:count]])
    patches = torch.cat(found)
    if len(patches) < config.codebook_size:
        raise ValueError(f"{len(clips)} clips have {len(patches)} tokens, fewer than codes; give more clips.")
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
    basis = vectors.flip(1)[:, : config.codebook_dim - 1].T * (_LARGEST / values[-1].clamp_min(1e-12).sqrt())
    weight, bias = F.pad(basis, (0, 0, 0, 1)), F.pad(-basis @ mean, (0, 1), value=1.0)
    features = F.normalize(F.linear(patches, weight, bias), dim=-1)
    model.encoder.patch_to_code.weight.copy_(weight * patches.shape[1])  # which the model divides patches by
    model.encoder.patch_to_code.bias.copy_(bias)
    codebook = k_means(features, config.codebook_size, _ROUNDS, generator)
    codes = F.pad(codebook[nearest_codes(features, codebook)], (0, 1), value=1.0)  # (N, d + 1)
    solution = torch.linalg.lstsq(codes, patches).solution  # (d + 1, P)
    model.quantizer.weight.copy_(_CODE_LENGTH * codebook)
    model.decoder.code_to_patch.weight.copy_(solution[:-1].T)
    model.decoder.code_to_patch.bias.copy_(solution[-1])
    return 1 - ((codes @ solution - patches).square().mean() / centred.square().mean()).item()


def start_together(accelerator: Accelerator, model: EvatokModel, stream: ClipStream, clips: int, seed: int) -> None:
    """`start_linear` from the first clips of the main process's stream, the same in all processes."""
    if accelerator.is_main_process:
        batch = collate(list(islice(stream, clips)))["pixel_values_videos"]
        start_linear(model, to_float(batch), torch.Generator().manual_seed(seed))
    maps = (model.encoder.patch_to_code, model.quantizer, model.decoder.code_to_patch)
    for parameter in (parameter for each in maps for parameter in each.parameters()):
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
