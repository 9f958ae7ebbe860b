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


def nearest_codes(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code; for unit vectors that is the largest cosine. (N, D), (K, D) -> (N,) int64."""
    return torch.cat([(rows @ codebook.T).argmax(-1) for rows in features.split(_ROWS_PER_CHUNK)])


def _entropy_sums(rows: torch.Tensor, codebook: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    # Squared distance of unit vectors is 2 - 2 cos; the constant drops out of the softmax.
    logits = 2.0 / temperature * (rows @ codebook.T)  # (n, K)
    log_p = logits.log_softmax(-1)
    p = logits.softmax(-1)  # not log_p.exp(), which is slow where it underflows
    return -(p * log_p).sum(), p.sum(0)


def codebook_entropy_loss(features: torch.Tensor, codebook: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean of H(p_i) minus H(mean of p_i), p_i = softmax(-squared distance / temperature), fp32, any N."""
    entropy, mass = features.new_zeros(()), features.new_zeros(codebook.shape[0])
    for rows in features.split(_ROWS_PER_CHUNK):
        row_entropy, row_mass = checkpoint(_entropy_sums, rows, codebook, temperature, use_reentrant=False)
        entropy, mass = entropy + row_entropy, mass + row_mass
    mean = mass / features.shape[0]
    return entropy / features.shape[0] + (mean * mean.clamp_min(1e-12).log()).sum()


class VectorQuantizer(nn.Module):
    """A codebook of `size` unit vectors of `dim` dimensions. All arithmetic is fp32 whatever the model's dtype."""

    def __init__(self, size: int, dim: int, entropy_temperature: float):
        super().__init__()
        self.entropy_temperature = entropy_temperature
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
            return Quantized(
                codes=z + blend * (codes - z).detach(),
                ids=ids,
                codebook_loss=F.mse_loss(codes, z.detach()),
                commitment_loss=F.mse_loss(z, codes.detach()),
                entropy_loss=codebook_entropy_loss(z, codebook, self.entropy_temperature),
            )
