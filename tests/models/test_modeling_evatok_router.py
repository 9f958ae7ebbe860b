"""The router: choices that follow preference and content, alone as in a batch, and files that load equal."""

from __future__ import annotations

import pytest
import torch
from tokenizer_samples import real_clips
from transformers import AutoConfig, AutoModel

from evatok_hf import AssignmentSpace, EvatokRouter, EvatokRouterConfig
from evatok_hf.allocation.reward import DistanceBounds, best_assignments, proxy_reward
from evatok_hf.models.modeling_evatok import cosine_transform, patch_analysis, patchify

TINY = {
    "image_size": 32,
    "block_lengths": (2, 8, 32),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
EVERY = {"position_embedding": "fixed", "patch_basis": "log-spectrum", "pooling": 2}
PAPER = {"quality": 1.2}


def make_router(**fields) -> EvatokRouter:
    torch.manual_seed(0)
    return EvatokRouter(EvatokRouterConfig(**{**TINY, **fields})).eval()


@pytest.fixture(scope="module", params=[EVERY, PAPER], ids=["every-quality", "paper"])
def fields(request) -> dict:
    return request.param


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return real_clips()


def test_the_paper_configuration_has_the_size_of_the_paper():
    with torch.device("meta"):
        router = EvatokRouter(EvatokRouterConfig.from_preset("paper"))
    assert router.num_parameters() == pytest.approx(19.9e6, rel=0.02)
    assert len(router.assignment_space) == 625


def test_rewards_of_a_router_for_every_preference_are_those_of_its_qualities(clips):
    router = make_router(**EVERY)
    out = router(clips, torch.tensor([0.8, 1.2, 1.6]))
    expected = proxy_reward(
        -out.qualities, router.assignment_space, DistanceBounds(0, 1), torch.tensor([0.8, 1.2, 1.6])
    )
    constant = torch.tensor([0.8, 1.2, 1.6])[:, None]  # high - d is 1 larger than Q
    assert torch.allclose(out.logits * 0.02 + constant, expected.float(), atol=1e-4)
    assert torch.equal(router(clips).logits, router(clips, 1.2).logits)


def test_the_spectrum_axis_by_axis_is_the_cosine_transform(clips):
    router = make_router(**EVERY)
    patches = patchify(clips, router.config.num_blocks, router.config.patch_size)
    expected = patches @ cosine_transform(*router.config.patch_shape).T
    assert torch.allclose(router._spectrum(clips), expected, atol=1e-4)
    cosine = make_router(**{**EVERY, "patch_basis": "cosine", "pooling": 1})
    assert torch.allclose(cosine._describe(clips), patches @ patch_analysis(cosine.config.patch_shape).T, atol=1e-4)


def test_a_router_sees_means_and_logarithms_of_the_spectrum_and_of_its_changes(clips):
    router = make_router(**EVERY)
    spectrum = patchify(clips, 4, 8) @ cosine_transform(*router.config.patch_shape).T  # (B, 4, 16, P)
    changes = torch.cat([torch.zeros_like(spectrum[:, :1]), spectrum.diff(dim=1)], dim=1)

    def over_squares(x):
        squares = x.unflatten(2, (2, 2, 2, 2))  # rows of squares, rows in one, columns of squares, columns in one
        return squares.mean((3, 5)).flatten(2, 3)

    expected = [over_squares(spectrum) * router.scale]
    expected += [over_squares((x.abs() + 0.03).log()) / 2 + 1 for x in (spectrum, changes)]
    assert torch.allclose(router._describe(clips), torch.cat(expected, dim=-1), atol=1e-4)


def test_more_quality_never_means_fewer_tokens(clips):
    router = make_router(**EVERY)
    totals = torch.stack([router.assign(clips, quality).sum(-1) for quality in torch.linspace(0, 2, 21).tolist()])
    assert (totals.diff(dim=0) >= 0).all()
    assert totals[0].tolist() == [8] * 3 and totals[-1].min() > 8


def test_a_choice_does_not_depend_on_batch_mates(fields, clips):
    router = make_router(**fields)
    together = router.assign(clips)
    assert torch.equal(together, torch.cat([router.assign(clip[None]) for clip in clips]))
    assert torch.equal(together, router.assign(clips.flip(0)).flip(0))
    assert torch.equal(together, router.assign(clips))
    assert together.shape == (3, 4) and together.dtype == torch.int64
    assert router.assign(clips[:0]).shape == (0, 4)


def test_each_clip_can_have_its_own_preference(clips):
    router = make_router(**EVERY)
    mixed = router.assign(clips, torch.tensor([0.0, 1.2, 2.0]))
    each = [router.assign(clip[None], quality) for clip, quality in zip(clips, (0.0, 1.2, 2.0), strict=True)]
    assert torch.equal(mixed, torch.cat(each))


def test_saved_and_loaded_it_is_the_same(fields, clips, tmp_path):
    router = make_router(**fields, distance="perceptual-effnet-lite0", distance_low=0.25, distance_high=1.5)
    router.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is EvatokRouter and type(AutoConfig.from_pretrained(tmp_path)) is EvatokRouterConfig
    assert loaded.fingerprint() == router.fingerprint()
    assert torch.equal(loaded(clips).logits, router(clips).logits)
    assert (loaded.config.distance, loaded.config.distance_high) == ("perceptual-effnet-lite0", 1.5)
    half = EvatokRouter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(clips).logits.dtype == torch.float32
    assert half.assign(clips).shape == (3, 4)


def test_gradient_reaches_every_parameter(fields, clips):
    router = make_router(**fields).train()
    router(clips, labels=torch.tensor([0, 40, 80])).loss.backward()
    unused = [name for name, p in router.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in unused if not name.endswith("k_proj.bias")]


def test_soft_labels_are_distributions_over_assignments(clips):
    router = make_router(**EVERY)
    hard = torch.tensor([3, 30, 60])
    soft = torch.nn.functional.one_hot(hard, 81).float()
    losses = [router(clips, labels=labels).loss.item() for labels in (hard, soft)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.warns(FutureWarning, match="targets is labels now"):
        assert router(clips, targets=hard).loss.item() == losses[0]


def test_a_router_is_trained_on_for_other_assignments(clips, tmp_path):
    router = make_router(**EVERY)
    router.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="head.weight"):
        EvatokRouter.from_pretrained(tmp_path, block_lengths=[2, 32])
    options = {"block_lengths": [2, 32], "strict": False, "ignore_mismatched_sizes": True}
    for kind in (EvatokRouter, AutoModel):
        other = kind.from_pretrained(tmp_path, **options)
        assert other(clips).logits.shape == (3, 16) and other.fingerprint() is None
        assert torch.equal(other.norm.weight, router.norm.weight) and torch.isfinite(other(clips).logits).all()


def test_it_learns_whether_a_clip_moves(clips):
    router = make_router(**EVERY, initializer_range=0.05).train()
    still = clips[:, :1].expand_as(clips)
    space = router.assignment_space
    lengths = torch.tensor([[32, 32, 32, 32]] * 3 + [[32, 2, 2, 2]] * 3)
    labels = space.to_index(lengths)
    optimizer = torch.optim.AdamW(router.parameters(), lr=2e-3)
    for _ in range(60):
        loss = router(torch.cat([clips, still]), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(router.eval().assign(torch.cat([clips, still])), lengths)


def test_the_best_choice_is_that_of_the_rewards(clips):
    router = make_router(**EVERY)
    out = router(clips)
    rewards = out.logits.double()
    assert torch.equal(router.choose(out.logits), best_assignments(rewards, router.assignment_space))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_router().assign(real_clips(), 2.1), "quality must lie between"),
        (lambda: make_router(quality=1.0).assign(real_clips(), 1.4), "trained for quality 1.0 alone, got 1.4"),
        (lambda: make_router()(torch.zeros(1, 8, 3, 32, 32)), "must have shape"),
        (lambda: make_router(hidden_size=40), "multiple of num_attention_heads 2 and of 16"),
        (lambda: make_router(quality=3.0), "quality must be a number from 0 to 2"),
        (lambda: make_router(reward_temperature=0.0), "reward_temperature must be a number above 0"),
        (lambda: make_router(position_embedding="pooled"), "position_embedding must be one of"),
        (lambda: make_router(block_lengths=(8, 2)), "strictly ascending"),
        (lambda: EvatokRouterConfig.from_preset("large"), "unknown preset 'large'"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_its_assignments_are_those_of_the_tokenizer_of_the_same_preset():
    for name in ("tiny", "small", "paper"):
        space = EvatokRouterConfig.from_preset(name).assignment_space
        assert isinstance(space, AssignmentSpace) and len(space) == 625
