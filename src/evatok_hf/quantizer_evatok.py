"""l2-normalised low-dimensional vector quantisation with entropy regularisation (GigaTok, section 1.4 of its code)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Rows of the (tokens x codebook) distance table that are alive at once: bounds memory, does not change results.
_ROWS_PER_CHUNK = 8192


@dataclass
class Quantized:
    """Outcome of quantising N vectors.

    Attributes:
        codes: (N, D) fp32 unit vectors for the decoder, with straight-through gradient to the encoder.
        ids: (N,) int64.
        codebook_loss: mean squared distance that pulls codes to features.
        commitment_loss: the same distance, pulling features to codes.
        entropy_loss: mean entropy of the soft assignments minus the entropy of their mean, nats.
    """

    codes: torch.Tensor
    ids: torch.Tensor
    codebook_loss: torch.Tensor
    commitment_loss: torch.Tensor
    entropy_loss: torch.Tensor


def _sum_over_processes(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The sum of `x` over all processes that train together, and how many these are.

    Its gradient is that of the processes' number times the own summand: after the mean of gradients over processes,
    which data-parallel training takes, it is the gradient of the sum.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x, 1
    processes = torch.distributed.get_world_size()
    total = x.detach().clone()
    torch.distributed.all_reduce(total)
    return processes * x + (total - processes * x.detach()), processes


def nearest_codes(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code; for unit vectors that is the largest cosine. (N, D), (K, D) -> (N,) int64."""
    return torch.cat([(rows @ codebook.T).argmax(-1) for rows in features.split(_ROWS_PER_CHUNK)])


def spread(count: int, total: int) -> torch.Tensor:
    """`count` of the numbers 0..total - 1, without a period and the same every time, (count,) int64.

    Multiples of the golden ratio modulo 1: as even as random draws, but a resumed run needs no state for them.
    """
    return (torch.arange(count, dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1 * total).long()


def _entropy_sums(rows: torch.Tensor, codebook: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    # Squared distance of unit vectors is 2 - 2 cos; the constant drops out of the softmax.
    logits = 2.0 / temperature * (rows @ codebook.T)  # (n, K)
    log_p = logits.log_softmax(-1)
    p = logits.softmax(-1)  # not log_p.exp(), which is slow where it underflows
    return -(p * log_p).sum(), p.sum(0)


def codebook_entropy_loss(
    features: torch.Tensor, codebook: torch.Tensor, temperature: float, synchronize: bool = False
) -> torch.Tensor:
    """Mean of H(p_i) minus H(mean of p_i), p_i = softmax(-squared distance / temperature), fp32, any N.

    With `synchronize` the second mean is over the tokens of all processes; so is, on average over them, the first.
    """
    entropy, mass = features.new_zeros(()), features.new_zeros(codebook.shape[0])
    for rows in features.split(_ROWS_PER_CHUNK):
        row_entropy, row_mass = checkpoint(_entropy_sums, rows, codebook, temperature, use_reentrant=False)
        entropy, mass = entropy + row_entropy, mass + row_mass
    own = total = features.new_tensor(features.shape[0])
    if synchronize:
        total, processes = _sum_over_processes(own)
        mass, own = _sum_over_processes(mass)[0], total / processes
    mean = mass / total
    return entropy / own + (mean * mean.clamp_min(1e-12).log()).sum()


class VectorQuantizer(nn.Module):
    """A codebook of `size` unit vectors of `dim` dimensions. All arithmetic is fp32 whatever the model's dtype.

    In training the entropy term is of `entropy_tokens` tokens spread over the batch, where there are more; 0: of all.
    """

    def __init__(self, size: int, dim: int, entropy_temperature: float, entropy_tokens: int = 0):
        super().__init__()
        self.entropy_temperature = entropy_temperature
        self.entropy_tokens = entropy_tokens
        self.weight = nn.Parameter(torch.empty(size, dim))

    def unit_codes(self) -> torch.Tensor:
        """(K, D) fp32, normalised."""
        return F.normalize(self.weight.float(), dim=-1)

    def to_ids(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D) features of any norm -> (N,) int64."""
        with torch.autocast(features.device.type, enabled=False):
            return nearest_codes(F.normalize(features.float(), dim=-1), self.unit_codes())

    def to_codes(self, ids: torch.Tensor) -> torch.Tensor:
        """(N,) -> (N, D) fp32 unit vectors."""
        return F.normalize(self.weight[ids].float(), dim=-1)

    def forward(self, features: torch.Tensor, blend: float = 1.0) -> Quantized:
        """Quantises with gradients.

        In training by several processes the means of the losses are over the tokens of all of them: each process gets
        its share, such that their mean over processes is what one process with all the clips would have.

        Args:
            features: (N, D) of any norm.
            blend: 1 gives the codes to the decoder; below 1 it gets `z + blend * (code - z)`, which lets a small model
                learn to reconstruct before quantisation bites (our choice).
        """
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize(features.float(), dim=-1)
            codebook = self.unit_codes()
            ids = nearest_codes(z.detach(), codebook.detach())
            codes = codebook[ids]
            synchronize = self.training and torch.is_grad_enabled()
            share = 1.0  # of this process's tokens, in those of a process on average
            if synchronize:
                total, processes = _sum_over_processes(z.new_tensor(len(z)))
                share = len(z) * processes / total
            sample = z
            if self.training and 0 < self.entropy_tokens < len(z):
                sample = z[spread(self.entropy_tokens, len(z)).to(z.device)]
            return Quantized(
                codes=z + blend * (codes - z).detach(),
                ids=ids,
                codebook_loss=share * F.mse_loss(codes, z.detach()),
                commitment_loss=share * F.mse_loss(z, codes.detach()),
                entropy_loss=codebook_entropy_loss(sample, codebook, self.entropy_temperature, synchronize),
            )
