"""Sampling: every sample decodes, and is a function of its prompt, its settings and its seed."""

from __future__ import annotations

import pytest
import torch
from generator_samples import conditions, make_generator

from evatok_hf.models.generation_evatok import sample
from evatok_hf.models.modeling_evatok_generator import Prompt

LAYOUTS = ["length-first", "end-of-block"]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(index % 2) for index in range(count)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_200_samples_of_random_weights_at_temperature_5_all_decode(layout):
    model = make_generator(layout=layout)
    tokens = sample(model, prompts(200), range(200), temperature=5)
    assert len(tokens) == 200 and int(tokens.ids.max()) < 32
    assert set(tokens.lengths.unique().tolist()) <= {2, 4, 8}
    assert len(tokens.lengths.unique(dim=0)) > 1  # the model decides them


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_is_the_same_whatever_its_batch(layout):
    model = make_generator(layout=layout)
    together = sample(model, conditions(model, 6), range(6), known_blocks=1, guidance_scale=1.5)
    for index, prompt in enumerate(conditions(model, 6)):
        alone = sample(model, [prompt], [index], known_blocks=1, guidance_scale=1.5)
        assert torch.equal(alone.ids, together.clip(index).ids)
        assert torch.equal(alone.lengths[0], together.lengths[index])


def test_seeds():
    model = make_generator()
    first, second = sample(model, prompts(8), range(8)), sample(model, prompts(8), range(8))
    assert torch.equal(first.ids, second.ids)
    other = sample(model, prompts(8), range(8, 16))
    assert first.ids.tolist() != other.ids.tolist()
    equal = sample(model, [Prompt(0), Prompt(0)], [3, 3])
    assert equal.clip(0).ids.tolist() == equal.clip(1).ids.tolist()


def test_global_random_state_is_neither_used_nor_changed():
    model = make_generator()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sample(model, prompts(2), range(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_budgets_and_limits_are_obeyed(layout):
    model = make_generator(layout=layout)
    assert sample(model, prompts(5), range(5), lengths=[2, 8, 4]).lengths.tolist() == [[2, 8, 4]] * 5
    rows = [[2, 2, 2], [8, 8, 8], [2, 4, 8]]
    assert sample(model, prompts(3), range(3), lengths=rows).lengths.tolist() == rows
    assert int(sample(model, prompts(50), range(50), budget=9, temperature=5).lengths.sum(-1).max()) <= 9
    assert int(sample(model, prompts(50), range(50), max_block_length=5).lengths.max()) <= 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_blocks_are_those_of_the_condition(layout):
    model = make_generator(layout=layout)
    given = conditions(model, 7)
    tokens = sample(model, given, range(7), known_blocks=2, budget=24)
    for index, prompt in enumerate(given):
        known = int(prompt.condition_lengths[:2].sum())
        assert torch.equal(tokens.lengths[index, :2], prompt.condition_lengths[:2])
        assert torch.equal(tokens.clip(index).ids[:known], prompt.condition_ids[:known])


def test_guidance_of_1_is_no_guidance_and_more_of_it_favours_the_class():
    model = make_generator()
    none = sample(model, prompts(20), range(20))
    one = sample(model, prompts(20), range(20), guidance_scale=1.0)
    assert torch.equal(none.ids, one.ids)
    # Through the doubled batch, too: a step schedule that never sets in.
    never = sample(model, prompts(20), range(20), guidance_scale=3.0, guidance_schedule="step", guidance_start=1.0)
    assert torch.equal(never.ids, none.ids)
    strong = sample(model, prompts(20), range(20), guidance_scale=8.0)
    assert strong.ids.tolist() != none.ids.tolist()


def mean_gain(model, tokens) -> float:
    """How much more likely a class's clips are with the class than without, in nats a clip."""
    total = 0.0
    for index in range(len(tokens)):
        clip, logs = tokens.clip(index), []
        for prompt in (Prompt(index % 2), Prompt()):
            ids = model.codec.encode(clip.lengths[0], clip.ids, prompt)[None]
            log = model(ids).logits[0, :-1].log_softmax(-1)
            logs.append(float(log.gather(1, ids[0, 1:, None])[1:].sum()))
        total += logs[0] - logs[1]
    return total / len(tokens)


@torch.no_grad()
def test_guided_samples_fit_their_class_better():
    model = make_generator()
    gains = [
        mean_gain(model, sample(model, prompts(20), range(20), guidance_scale=scale, lengths=[4, 4, 4]))
        for scale in (1.0, 3.0)
    ]
    assert gains[1] > gains[0]


def test_guidance_leaves_lengths_alone_unless_asked():
    model = make_generator()
    free = sample(model, prompts(40), range(40))
    guided = sample(model, prompts(40), range(40), guidance_scale=6.0)
    asked = sample(model, prompts(40), range(40), guidance_scale=6.0, guide_lengths=True)
    # The first length comes before any code, so that only guidance could have changed it.
    assert torch.equal(guided.lengths[:, 0], free.lengths[:, 0])
    assert not torch.equal(asked.lengths[:, 0], free.lengths[:, 0])


def test_temperature_0_is_the_most_likely_token_and_so_is_top_k_1():
    model = make_generator()
    greedy = sample(model, prompts(4), range(4), temperature=0)
    assert torch.equal(greedy.ids, sample(model, prompts(4), range(4, 8), temperature=0).ids)
    assert torch.equal(greedy.ids, sample(model, prompts(4), range(4), top_k=1).ids)
    assert torch.equal(greedy.ids, sample(model, prompts(4), range(4), top_p=1e-6).ids)


def test_samples_follow_the_probabilities_of_the_model():
    model = make_generator()
    lengths = sample(model, [Prompt(0)] * 2000, range(2000), lengths=[0, 2, 2]).lengths[:, 0]
    prompt = model.codec.prompt(Prompt(0))[None]
    first = model.config.first_marker_id
    expected = model(prompt).logits[0, -1, first : first + 3].softmax(-1)
    found = torch.tensor([(lengths == length).float().mean() for length in (2, 4, 8)])
    assert torch.allclose(found, expected, atol=0.04)


def test_progress_rises_to_1():
    seen: list[float] = []
    sample(make_generator(), prompts(3), range(3), progress=seen.append)
    assert seen[0] == 0 and seen[-1] == 1 and seen == sorted(seen)


def test_what_cannot_be_sampled_is_refused():
    model = make_generator()
    for options, message in (
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule"),
        ({"guidance_start": 2}, "guidance_start"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"budget": -5}, "budget"),
        ({"known_blocks": 1}, "known_blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(model, prompts(1), [0], **options)
    with pytest.raises(ValueError, match="a class or a condition"):
        sample(model, [Prompt()], [0], guidance_scale=2)
    with pytest.raises(ValueError, match="seeds"):
        sample(model, prompts(2), [0])
    with pytest.raises(ValueError, match="none of the 2 classes"):
        sample(model, [Prompt(5)], [0])
