"""Choosing lengths: each way does what its name says, and refuses what cannot be."""

from __future__ import annotations

import itertools

import pytest
import torch
from tokenizer_samples import make_tokenizer, real_clips

import evatok_hf
from evatok_hf import AssignmentSpace, EvatokRouter, EvatokRouterConfig
from evatok_hf.allocation import Allocation
from evatok_hf.allocation import strategies as ways
from evatok_hf.allocation.reward import DistanceBounds, best_assignments, proxy_reward
from evatok_hf.allocation.search import search_assignments
from evatok_hf.metrics import load_perceptual
from evatok_hf.models.modeling_evatok_router import check_same_space

SPACE = AssignmentSpace((2, 4, 8), 2)
TOTALS = SPACE.all().sum(-1)


def random_table(clips: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(clips, len(SPACE), generator=torch.Generator().manual_seed(seed))


def make_router(**fields) -> EvatokRouter:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "block_lengths": (2, 8, 32), "hidden_size": 32, "num_hidden_layers": 1}
    fields = {**sizes, "num_attention_heads": 2, "initializer_range": 0.2, **fields}
    return EvatokRouter(EvatokRouterConfig(**fields)).eval()


def bound(router: EvatokRouter | None = None, **options) -> Allocation:
    return Allocation(**options).bind(make_tokenizer(block_lengths=(2, 8, 32)), router or make_router())


def test_the_shortest_within_a_bound():
    table = random_table(50)
    chosen = ways.shortest_within(table, SPACE, 0.3)
    for row, index in zip(table, chosen.tolist(), strict=True):
        within = TOTALS[row <= 0.3]
        if len(within):
            assert row[index] <= 0.3 and TOTALS[index] == within.min()
            assert row[index] == row[(row <= 0.3) & (TOTALS == within.min())].min()
        else:
            assert row[index] == row.min()


def test_the_best_within_a_budget():
    table = random_table(50)
    for tokens in (4, 9, 16, 99):
        chosen = ways.best_within(table, SPACE, tokens)
        assert (TOTALS[chosen] <= tokens).all()
        assert torch.equal(table.gather(1, chosen[:, None])[:, 0], table[:, tokens >= TOTALS].max(-1).values)


@pytest.mark.parametrize("tokens", [12, 17, 24, 31, 48])
def test_a_split_over_a_video_is_the_best_of_all(tokens):
    table = random_table(3, seed=tokens).double()
    best = max(
        sum(table[clip, index].item() for clip, index in enumerate(indices))
        for indices in itertools.product(range(9), repeat=3)
        if TOTALS[list(indices)].sum() <= tokens
    )
    chosen = ways.split_budget(table, SPACE, tokens)
    assert TOTALS[chosen].sum() <= tokens
    assert table.gather(1, chosen[:, None]).sum().item() == pytest.approx(best)


def test_tokens_of_a_video_go_to_the_clips_that_gain():
    gains = torch.log(TOTALS.double())
    table = torch.stack([0.0 * gains, gains, 3 * gains])
    shares = TOTALS[ways.split_budget(table, SPACE, 28)]
    assert shares[0] == 4 and shares[2] >= shares[1]
    assert ways.split_budget(table[:0], SPACE, 0).shape == (0,)
    for clip in (0, 2):
        of_none = table.clone()
        of_none[clip] = torch.nan
        with pytest.raises(ValueError, match="no quality that is a number"):
            ways.split_budget(of_none, SPACE, 28)


def test_a_long_video_is_split_quickly_and_within_its_budget():
    table = random_table(300).cummax(-1).values
    chosen = ways.split_budget(table, SPACE, 300 * 8)
    assert chosen.shape == (300,) and TOTALS[chosen].sum() <= 2400


def test_lengths_that_are_given():
    model = make_tokenizer(block_lengths=(2, 8, 32))
    assert Allocation(lengths=[8, 2, 2, 32]).bind(model)(torch.zeros(3)).tolist() == [[8, 2, 2, 32]] * 3
    assert Allocation(lengths=8).bind(model)(torch.zeros(1)).tolist() == [[8] * 4]
    assert Allocation().bind(model)(torch.zeros(1)).tolist() == [[8] * 4]  # the middle one


def test_router_and_budget():
    router, clips = make_router(), real_clips()
    space, model = router.assignment_space, make_tokenizer(block_lengths=(2, 8, 32))
    assert torch.equal(Allocation().bind(model, router)(clips), router.assign(clips, 1.2))
    assert torch.equal(Allocation(quality=1.4).bind(model, router)(clips), router.assign(clips, 1.4))
    for tokens in (24, 100, 250, 999):
        lengths = Allocation(budget=tokens).bind(model, router)(clips)
        assert lengths.shape == (3, 4) and lengths.sum() <= tokens
        lengths = Allocation(budget_per_clip=tokens).bind(model, router)(clips)
        assert lengths.shape == (3, 4) and (lengths.sum(-1) <= tokens).all()
    with torch.no_grad():
        best = router(clips).qualities.argmax(-1)
    assert torch.equal(Allocation(budget=3 * space.max_tokens).bind(model, router)(clips), space.to_lengths(best))


def test_the_clips_of_a_batch_are_routed_in_one_pass_where_that_is_asked(monkeypatch):
    router, clips = make_router(), real_clips()
    one_by_one = router.assign(clips, 1.2)
    passes = []
    monkeypatch.setattr(router, "_score", lambda *given, score=router._score: passes.append(1) or score(*given))
    for allocation in (Allocation(quality=1.2), Allocation(budget=300), Allocation(budget_per_clip=100)):
        bound = allocation.bind(make_tokenizer(block_lengths=(2, 8, 32)), router)
        passes.clear()
        together = bound(clips, exact=False)
        assert len(passes) == 1 and torch.equal(together, bound(clips, exact=True)) and len(passes) == 4
    assert torch.equal(router.assign(clips, torch.full((3,), 1.2), exact=False), one_by_one)
    assert router.assign(clips[:0], exact=False).shape == router.assign(clips[:0]).shape == (0, 4)


def test_what_is_measured_decides():
    model, clips, metric = (
        make_tokenizer(position_embedding="pooled", block_lengths=(2, 32)),
        real_clips()[:2],
        load_perceptual("perceptual-effnet-lite0"),
    )
    distances = search_assignments(model, clips, metric).table()[..., 0]
    space, limits, bound = model.assignment_space, DistanceBounds.of(distances), float(distances.median())
    told = {"distance": metric.name, "distance_low": limits.low, "distance_high": limits.high}
    router = make_router(block_lengths=(2, 32), **told)

    def index(strategy=None, **options):
        return space.to_index(Allocation(strategy, **options).bind(model, router)(clips))

    assert (index("max-proxy-reward", quality=0.0) == 0).all()  # the fewest tokens
    assert torch.equal(index("max-proxy-reward", quality=2.0), distances.argmin(-1))
    of_the_router = best_assignments(proxy_reward(distances, space, limits, 1.2), space)
    assert torch.equal(index("max-proxy-reward"), of_the_router)
    assert torch.equal(index("max-proxy-reward", metric=metric, bounds=(limits.low, limits.high)), of_the_router)
    assert torch.equal(index(threshold=bound), ways.shortest_within(distances, space, bound))


def test_a_router_must_fit_the_tokenizer():
    tokenizer = make_tokenizer(position_embedding="pooled", block_lengths=(2, 8, 32))
    check_same_space(tokenizer, make_router())
    with pytest.raises(ValueError, match=r"block_lengths is \[2, 8, 32\] in the tokenizer and \[2, 16\] in the router"):
        router = EvatokRouterConfig(image_size=32, block_lengths=(2, 16), hidden_size=32, num_attention_heads=2)
        check_same_space(tokenizer, EvatokRouter(router))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ways.best_within(random_table(2), SPACE, 3), "3 tokens are too few: 1 clip.* at least 4"),
        (lambda: ways.split_budget(random_table(5), SPACE, 19), r"19 tokens are too few: 5 clip\(s\) need at least 20"),
        (lambda: ways.shortest_within(torch.zeros(2, 8), SPACE, 1.0), "another space"),
        (lambda: bound(lengths=[[2] * 4]), "one assignment for all clips has 4 lengths"),
        (lambda: bound(lengths=[2, 3, 2, 2]), "not among the candidates"),
        (lambda: bound(quality=2.5), "quality must lie between"),
        (lambda: bound(make_router(quality=1.2), budget=99), "needs a router that was trained for every quality"),
        (lambda: bound(make_router(quality=1.2), budget_per_clip=99), "needs a router that was trained for every"),
        (lambda: bound(budget_per_clip=7), "7 tokens are too few"),
        (lambda: bound(budget=23)(real_clips()), r"23 tokens are too few: 3 clip\(s\) .* at least 24"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "options", "found"),
    [
        (None, {}, None),
        (None, {"lengths": 8}, "uniform"),
        (None, {"lengths": [8, 2, 2, 2]}, "fixed"),
        (None, {"quality": 0.0}, "router"),
        (None, {"budget": 9}, "budget"),
        (None, {"budget_per_clip": 9}, "budget"),
        (None, {"threshold": 0.5, "metric": "lpips-vgg"}, "threshold"),
        ("max-proxy-reward", {"quality": 1.0, "bounds": (0, 1)}, "max-proxy-reward"),
        ("uniform", {}, "uniform"),
    ],
)
def test_options_say_which_strategy_is_meant(strategy, options, found):
    assert Allocation(strategy, **options).strategy == found


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("best", {}, "unknown strategy 'best'; choose one of uniform, fixed, router"),
        ("threshold", {}, "threshold needs threshold"),
        ("budget", {}, "needs budget or budget_per_clip"),
        ("fixed", {}, "needs lengths"),
        ("router", {"budget": 9}, "router does not take budget; it takes quality"),
        ("uniform", {"quality": 1.0}, "does not take quality"),
        (None, {"quality": 1.0, "budget": 9}, "quality and budget contradict"),
        (None, {"budget": 9, "budget_per_clip": 9}, "not both"),
        (None, {"bounds": (0, 1)}, "bounds says nothing by itself"),
        (None, {"quality": 1.0, "metric": "lpips-vgg"}, "router does not take metric"),
    ],
)
def test_options_that_contradict_are_named(strategy, options, message):
    with pytest.raises(ValueError, match=message):
        Allocation(strategy, **options)


def test_a_rule_says_what_it_does():
    model, router = make_tokenizer(block_lengths=(2, 8, 32)), make_router()
    for allocation, words in (
        (Allocation(), "router (quality 1.2)"),
        (Allocation(budget_per_clip=70), "budget (70 tokens a clip)"),
        (Allocation(lengths=[2, 32, 2, 2]), "fixed (2, 32, 2, 2 tokens)"),
        (Allocation("uniform"), "uniform (8 tokens)"),
    ):
        bound = allocation.bind(model, router)
        described = bound.describe()
        assert bound.label() == described["allocation"] == words
        asked = described["strategy"] in ("router", "budget")
        assert described["router_fingerprint"] == (router.fingerprint() if asked else None)
    with pytest.raises(ValueError, match="has no model yet"):
        Allocation()(real_clips())


def test_names_of_the_release_before():
    model, router, clips = make_tokenizer(block_lengths=(2, 8, 32)), make_router(), real_clips()
    for module in (ways, evatok_hf.allocation):
        with pytest.warns(FutureWarning, match="bind"):
            assert torch.equal(module.allocate("router", model, router, quality=0.9)(clips), router.assign(clips, 0.9))
        with pytest.warns(FutureWarning, match="bind"):
            assert module.VideoBudget(router, 99)(clips).sum() <= 99
    assert "allocate" not in evatok_hf.allocation.__all__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "threshold", "threshold": 0.3}, "needs a perceptual metric"),
        ({"strategy": "threshold", "threshold": 0.0, "metric": "perceptual-effnet-lite0"}, "must be positive"),
        ({"strategy": "threshold", "threshold": 0.3, "metric": "taste"}, "unknown perceptual metric 'taste'"),
        ({"strategy": "max-proxy-reward", "metric": "perceptual-effnet-lite0"}, "needs the bounds"),
        ({"strategy": "max-proxy-reward", "bounds": (1, 0.5)}, "low < high"),
        ({"strategy": "max-proxy-reward", "bounds": (0, 1), "quality": 3}, "quality must lie between"),
        ({"strategy": "uniform", "lengths": [2, 2, 2, 2]}, "one length for all blocks"),
        ({"strategy": "budget", "budget": 99}, "needs a router"),
    ],
)
def test_a_strategy_says_what_it_lacks(options, message):
    model = make_tokenizer(position_embedding="pooled", block_lengths=(2, 32))
    with pytest.raises(ValueError, match=message):
        Allocation(**options).bind(model)


def test_bounds_of_another_metric_are_not_taken():
    model = make_tokenizer(position_embedding="pooled", block_lengths=(2, 32))
    router = make_router(block_lengths=(2, 32), distance="lpips-vgg", distance_low=0.1, distance_high=0.5)
    with pytest.raises(ValueError, match="bounds are of lpips-vgg, not of perceptual-effnet-lite0"):
        Allocation("max-proxy-reward", metric="perceptual-effnet-lite0").bind(model, router)
