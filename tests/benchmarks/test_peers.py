"""benchmarks/peers: the architectures that the tokenizer is compared with are what was published."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import AdapTok, AdapTokScorer, Larp, PeerSizes
from benchmarks.speed.systems import peer_flops, peer_sizes
from evatok_hf import EvatokConfig  # noqa: E402

SMALL = PeerSizes(image_size=32, num_tokens=32, width=32, num_layers=2, num_heads=2, codebook_size=64)
LENGTHS = torch.tensor([[3, 1, 2, 8], [1, 1, 1, 1]])  # of at most 8 a block


def parameters(make, *args) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make(*args).parameters())


def make(kind, *args):
    torch.manual_seed(0)
    return kind(SMALL, *args).eval()


def clips() -> torch.Tensor:
    return 2 * torch.rand(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1


def test_sizes_are_the_published_ones():
    # 173M: the LARP-L-Long tokenizer in the README of github.com/hywang66/LARP.
    assert parameters(Larp) == pytest.approx(173e6, rel=0.005)
    # 195M for AdapTok: the comparison in arXiv 2603.12267. It counts the prior that helps to train it: a GPT of 12
    # layers of 384 over 2048 places, 16 numbers in and out (cfgs/adaptok.yaml and models/gptc.py of
    # github.com/VisionXLab/AdapTok).
    width, places, ends = 384, 2048, 16
    layer = 4 * width * (width + 1) + 4 * width * (width + 1) + width * (4 * width + 1) + 4 * width
    prior = 12 * layer + places * width + (ends + 1) * width + 2 * width + (width + 1) * ends
    assert parameters(AdapTok) + prior == pytest.approx(195e6, rel=0.002)
    # 12 x 768 and a projection of both inputs (scripts/train_adaptok_scorer.sh there).
    assert parameters(AdapTokScorer) == pytest.approx(89e6, rel=0.002)


def test_peers_of_the_paper_size_are_the_defaults():
    config = EvatokConfig.from_preset("paper")
    assert peer_sizes(config, adaptive=False) == PeerSizes()
    assert peer_sizes(config, adaptive=True).num_tokens == 2048


@pytest.mark.parametrize(
    ("kind", "tokens", "encoded", "decoded"), [(Larp, 1024, 2048, 2048), (AdapTok, 768, 3072, 1792)]
)
def test_operations_are_those_of_dense_transformers(kind, tokens, encoded, decoded):
    width, layers = 768, 12
    expected = [layers * (24 * width**2 * places + 4 * width * places**2) for places in (encoded, decoded)]
    sizes = PeerSizes(num_tokens=1024 if kind is Larp else 2048)
    assert peer_flops(kind, sizes, tokens) == pytest.approx(expected, rel=0.01)


def test_larp_encodes_and_decodes():
    model = make(Larp)
    ids = model.encode(clips())
    assert ids.shape == (2, 32) and ids.unique().numel() > 1
    made = model.decode(ids)
    assert made.shape == (2, 16, 3, 32, 32) and made.isfinite().all()
    assert not torch.equal(made[0], made[1])


def test_adaptok_decodes_what_is_kept_and_nothing_else():
    model = make(AdapTok)
    ids = model.encode(clips())
    made = model.decode(ids, LENGTHS)
    for index in range(2):  # the second is padded in the batch
        alone = model.decode(ids[index : index + 1], LENGTHS[index : index + 1])
        torch.testing.assert_close(made[index], alone[0], rtol=1e-4, atol=1e-5)
    dropped = ids.clone()
    dropped.view(2, 4, 8)[:, 1, 1:] += 1  # block 1 keeps one token
    assert torch.equal(model.decode(dropped % 64, LENGTHS), made)


def test_adaptok_sees_no_later_block():
    model = make(AdapTok)
    video = clips()
    changed = video.clone()
    changed[:, 8:] = 0  # blocks 2 and 3
    features, other = model.features(video, model.encoder_mask), model.features(changed, model.encoder_mask)
    torch.testing.assert_close(features[:, :16], other[:, :16])
    assert not torch.allclose(features[:, 16:], other[:, 16:])
    ids = model.encode(video)
    later = ids.clone()
    later[:, 16:] = (later[:, 16:] + 1) % 64
    made, remade = model.decode(ids, LENGTHS), model.decode(later, LENGTHS)
    torch.testing.assert_close(made[:, :8], remade[:, :8])
    assert not torch.allclose(made[:, 8:], remade[:, 8:])


def test_the_scorer_sees_what_was_kept_so_far():
    scorer = make(AdapTokScorer, 4)
    features, quantized = torch.randn(2, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[3, 8, 0, 0], [8, 8, 0, 0]])  # block 1 in question
    scores = scorer(features, quantized, lengths)
    assert scores.shape == (2, 8)  # two a block
    unseen = features.clone()
    unseen[0, 3:8] = unseen[:, 16:] = 0
    torch.testing.assert_close(scorer(unseen, quantized, lengths)[:, 2:4], scores[:, 2:4])
    seen = features.clone()
    seen[:, :3] = 0
    assert not torch.allclose(scorer(seen, quantized, lengths)[:, 2:4], scores[:, 2:4])
