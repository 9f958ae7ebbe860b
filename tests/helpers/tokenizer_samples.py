"""A tokenizer small enough for any test, and real clips of its size."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

import evatok_hf
from evatok_hf import EvatokConfig, EvatokModel, EvatokVideoProcessor
from evatok_hf.models.modeling_evatok import PaddedLayout
from evatok_hf.video import open_video

BIKES = Path(evatok_hf.__file__).parent / "assets" / "bikes.mp4"
MIXED = [[2, 4, 8, 16], [32, 2, 16, 4], [8, 8, 32, 2]]
# Weights far larger than at the start of training, so that attention is sharp and every path leaves its mark.
TINY = {
    "image_size": 32,
    "block_lengths": (2, 4, 8, 16, 32),
    "codebook_size": 256,
    "embed_dim": 32,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "decoder_hidden_size": 48,
    "decoder_num_layers": 2,
    "decoder_num_heads": 2,
    "initializer_range": 0.25,
}


def processor() -> EvatokVideoProcessor:
    return EvatokVideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@cache
def real_frames() -> torch.Tensor:
    """Three consecutive clips, uint8 (3, 16, H, W, 3)."""
    with open_video(BIKES) as video:
        frames = video.read(range(48))
    return torch.from_numpy(frames.reshape(3, 16, *frames.shape[1:]))


@cache
def real_clips() -> torch.Tensor:
    """The same as the model takes them, (3, 16, 3, 32, 32) in [-1, 1]."""
    return processor()(list(real_frames()), return_tensors="pt").pixel_values_videos


@torch.no_grad()
def make_tokenizer(seed: int = 0, **fields) -> EvatokModel:
    """`TINY` with random weights, in evaluation mode, whose ids differ from token to token on the real clips."""
    torch.manual_seed(seed)
    model = EvatokModel(EvatokConfig(**{**TINY, **fields})).eval()
    # Random features all point the same way, towards one code; around their mean they point everywhere.
    features = model.features(real_clips(), PaddedLayout(torch.full((3, 4), 32)))
    parts = [model.codec.patch_to_code, model.codec.residual_to_code] if model.codec else [model.encoder.to_codebook]
    for part in parts:
        part.bias.sub_(features.mean(0))
    return model
