"""The low-resolution baseline that the tokenizer is measured against."""

from __future__ import annotations

import torch

from benchmarks.quality.reconstruction import baseline_shapes, best_baseline, low_resolution


def test_shapes_spend_no_more_than_the_bits():
    shapes = baseline_shapes(160, num_frames=16, image_size=64)
    assert all(3 * f * h * w <= 160 for f, h, w in shapes)
    assert (1, 7, 7) in shapes and (4, 3, 4) in shapes and (1, 7, 8) not in shapes


def test_a_flat_video_survives_and_detail_does_not():
    flat = torch.full((1, 16, 3, 64, 64), 0.2)
    assert (low_resolution(flat, (1, 2, 2)) - flat).abs().max() < 1 / 127.5
    checker = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1).expand(1, 16, 3, 64, 64)
    assert low_resolution(checker, (4, 8, 8)).abs().max() < 0.02


def test_the_best_shape_follows_the_content():
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 1, 3, 8, 8, generator=generator).repeat_interleave(8, 3).repeat_interleave(8, 4) * 2 - 1
    static = picture.expand(1, 16, 3, 64, 64)
    flicker = (torch.rand(1, 16, 3, 1, 1, generator=generator) * 2 - 1).expand(1, 16, 3, 64, 64)
    assert best_baseline(static, bits=1600)[0][0] == 1
    assert best_baseline(flicker, bits=1600)[0][0] == 16
