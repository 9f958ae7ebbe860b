"""Better ids for the same tokens: searched for through the decoder, where the encoder only guesses in one pass.

The features that the encoder made are the start of a gradient descent on the squared error of the decoded frames; codes
take their place in the decoder and pass the gradient straight through, as in training. It goes block by block with the
blocks before fixed, so that a refined block depends on no later frame, and the best ids on the way are kept. Nothing of
the model changes, and who decodes needs to know nothing of it. The idea is that of semi-amortised inference (Kim et
al., arXiv 1802.02550) and of content-adaptive compression (Campos et al., arXiv 1906.01223); the paper of this
tokenizer has nothing like it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .layers_evatok import LayerCache
from .quantizer_evatok import VectorQuantizer

# Adam on unit vectors, its step falling linearly to a twentieth. Chosen on clips of the training videos (our choice).
_LEARNING_RATE = 0.1
_BETAS = (0.5, 0.9)
_LAST_RATE = 0.05
# Below a 20th of an 8-bit step in [-1, 1], squared: nothing is left to gain.
_LEAST_ERROR = 1e-7


def check_refinement_steps(steps: int) -> None:
    """Raises ValueError for a number of steps that is negative or not whole."""
    if isinstance(steps, bool) or int(steps) != steps or steps < 0:
        raise ValueError(f"refinement_steps is {steps}; give a whole number, 0 for the encoder's own ids.")


def refined_ids(
    quantizer: VectorQuantizer,
    features: torch.Tensor,
    frames: torch.Tensor,
    decode: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """Ids whose decoded frames have at most the squared error of the encoder's ids, after so many steps of descent.

    Args:
        quantizer: the codebook.
        features: (n, d), the encoder's, of any norm.
        frames: what shall come out, (1, f, C, H, W) in [-1, 1].
        decode: codes (n, d) fp32 to frames (1, f, C, H, W), differentiable and without memory of earlier calls.
        steps: each a pass through the decoder forwards and backwards; one forwards more looks at the last ids.

    Returns:
        (n,) int64.
    """
    codebook = quantizer.unit_codes().detach()
    z = F.normalize(features.float(), dim=-1).requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=_LEARNING_RATE, betas=_BETAS)
    best, least = quantizer.to_ids(features), float("inf")
    for step in range(steps + 1):
        unit = F.normalize(z, dim=-1)
        ids = quantizer.to_ids(unit.detach()) if step else best
        decoded = decode(unit + (codebook[ids] - unit).detach()).float()
        error = (decoded.detach().clamp(-1, 1) - frames).square().mean().item()
        if error < least:
            best, least = ids, error
        if step < steps:
            loss = (decoded - frames).square().mean().clamp_min(_LEAST_ERROR).log()
            (z.grad,) = torch.autograd.grad(loss, [z])
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - (1 - _LAST_RATE) * step / steps)
            optimizer.step()
    return best


def refine_block(
    quantizer: VectorQuantizer,
    decoder: nn.Module,
    features: torch.Tensor,
    frames: torch.Tensor,
    block: int,
    caches: Sequence[LayerCache],
    steps: int,
) -> torch.Tensor:
    """The encoder's features of a block to refined ids.

    Args:
        quantizer, decoder: of the tokenizer; nothing of them changes.
        features: (n, d).
        frames: the block, (1, F / T, C, H, W) in [-1, 1].
        block: its number.
        caches: of the decoder, after the refined blocks before this one; they stay as they are.
        steps: see `refined_ids`.

    Returns:
        (n,) int64.
    """
    training, dtype = decoder.training, next(decoder.parameters()).dtype

    def decode(codes: torch.Tensor) -> torch.Tensor:
        return decoder.block(codes.to(dtype)[None], block, [cache.branch() for cache in caches])

    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        decoder.eval()  # in training, gradient checkpointing would extend the caches once more
        try:
            return refined_ids(quantizer, features.clone(), frames.clone().float(), decode, steps)
        finally:
            decoder.train(training)
