"""The fast loop draws what the plain loop draws: all options, any order of refilling, compiled once."""

from __future__ import annotations

import threading

import pytest
import torch
from generator_samples import conditions, make_generator

from evatok_hf.models import generation_evatok
from evatok_hf.models.generation_evatok import cache_length, sample
from evatok_hf.models.modeling_evatok_generator import Prompt

LAYOUTS = ["length-first", "end-of-block"]
OPTIONS = {
    "plain": {},
    "hot": {"temperature": 5.0},
    "greedy": {"temperature": 0},
    "top-k": {"top_k": 3, "temperature": 2.0},
    "top-p": {"top_p": 0.7},
    "forced": {"lengths": [2, 0, 8]},
    "forced by row": {"lengths": [[2, 2, 2], [8, 8, 8], [0, 4, 2], [4, 0, 0], [8, 2, 2], [2, 2, 8], [0, 0, 0]]},
    "budget": {"budget": 11},
    "short": {"max_block_length": 5},
    "guided": {"guidance_scale": 3.0},
    "guided later": {"guidance_scale": 3.0, "guidance_schedule": "step", "guidance_start": 0.4},
    "guided lengths": {"guidance_scale": 3.0, "guide_lengths": True, "top_k": 4},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request):
    return make_generator(layout=request.param)


def draw(model, implementation, count=7, prompts=None, seeds=None, **options):
    prompts = [Prompt(index % 2) for index in range(count)] if prompts is None else prompts
    seeds = range(len(prompts)) if seeds is None else seeds
    return sample(model, prompts, seeds, implementation=implementation, **options)


def assert_equal(one, other):
    assert torch.equal(one.lengths, other.lengths) and torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_draws_what_the_plain_loop_draws(model, options):
    plain = draw(model, "eager", **options)
    assert_equal(draw(model, "static", **options), plain)
    assert_equal(draw(model, "static", batch_size=2, **options), plain)


@pytest.mark.parametrize("options", [{}, {"known_blocks": 1}, {"known_blocks": 2, "guidance_scale": 2.0, "budget": 24}])
def test_prompts_of_different_lengths(model, options):
    given = conditions(model, 7)
    plain = draw(model, "eager", prompts=given, **options)
    for size in (7, 3):
        assert_equal(draw(model, "static", prompts=given, batch_size=size, **options), plain)


def test_attention_written_out_needs_no_other_path():
    model = make_generator()
    plain = draw(model, "eager", guidance_scale=2.0)
    model.set_attn_implementation("eager")
    assert_equal(draw(model, "static", guidance_scale=2.0, batch_size=3), plain)


def test_grouped_keys_and_half_precision_have_their_cache():
    model = make_generator(num_attention_heads=4, num_key_value_heads=2)
    assert_equal(draw(model, "static", batch_size=3), draw(model, "eager"))
    tokens = draw(model.to(torch.bfloat16), "static", batch_size=3)  # decodes; roundings of batch sizes differ
    assert len(tokens) == 7


def test_it_runs_under_autocast_as_training_samples():
    model = make_generator()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = draw(model, "static", batch_size=3, guidance_scale=2.0)
    assert len(tokens) == 7


def test_a_sample_depends_on_neither_batch_mates_nor_the_order_of_refilling(model):
    given = [*conditions(model, 5), *(Prompt(index % 2) for index in range(4))]
    options = {"guidance_scale": 1.5, "temperature": 2.0}
    all_of_them = draw(model, "static", prompts=given, batch_size=4, **options)
    order = [8, 3, 0, 6, 1, 7, 2, 5, 4]
    again = draw(model, "static", prompts=[given[i] for i in order], seeds=order, batch_size=3, **options)
    for place, index in enumerate(order):
        assert_equal(again.clip(place), all_of_them.clip(index))
    assert_equal(draw(model, "static", prompts=given[6:7], seeds=[6], **options), all_of_them.clip(6))


def test_ended_rows_make_room_and_the_batch_becomes_smaller(monkeypatch):
    model, sizes = make_generator(), []
    real = generation_evatok.step
    monkeypatch.setattr(
        generation_evatok,
        "step",
        lambda model, slots, warpers: sizes.append(len(slots.count)) or real(model, slots, warpers),
    )
    lengths = [[8, 8, 8], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    tokens = draw(model, "static", 4, lengths=lengths, batch_size=2)
    assert tokens.lengths.tolist() == lengths
    # 28 steps beside three times 10; two batches would be two rows for 28 + 10.
    assert sizes == [2] * 28 + [1] * 2


def test_where_looks_cost_the_host_looks_only_every_few_steps(monkeypatch):
    model, looks, seen = make_generator(), [], []
    options = {"guidance_scale": 2.0, "batch_size": 3}
    plain = draw(model, "eager", **options)
    monkeypatch.setattr("evatok_hf.models.generation_evatok.CPU_CHUNK", 5)  # as on a GPU
    assert_equal(draw(model, "static", **options), plain)
    real = generation_evatok._Run._look
    monkeypatch.setattr(generation_evatok._Run, "_look", lambda self: looks.append(1) or real(self))
    draw(model, "static", 3, lengths=[8, 8, 8], progress=seen.append)
    assert len(looks) == 6  # for 28 steps
    assert seen[0] == 0 and seen[-1] == 1 and seen == sorted(seen) and len(seen) == len(looks) + 1


def test_a_cache_has_one_of_four_lengths():
    config = make_generator(block_lengths=[8, 16, 32, 64, 128], num_blocks=4).config
    assert config.max_position_embeddings == 4 + 2 * (512 + 4)
    # A class and a whole clip fit half of the longest sequence; all are aligned.
    assert [cache_length(config, needed) for needed in (2, 130, 131, 259, 2 + 512 + 4, 519, 1036)] == [
        192,
        192,
        320,
        320,
        576,
        1088,
        1088,
    ]


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_model():
    return make_generator(num_hidden_layers=1)


@pytest.fixture
def no_recompiles():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_one_compilation_serves_all_settings_lengths_and_prompts(compiled_model, no_recompiles):
    model, before = compiled_model, graphs()
    for number, options in enumerate(
        (
            {},
            OPTIONS["guided later"],
            {"temperature": 2.0, "budget": 11, "guide_lengths": True},
            {"lengths": [2, 2, 8]},
            {"temperature": 0, "max_block_length": 4, "guidance_scale": 0.5},
        )
    ):
        options = {"guidance_scale": 2.0, **options}
        prompts = [Prompt(index % 2) for index in range(4 + number)]
        compiled = draw(model, "compiled", prompts=prompts, batch_size=3, **options)
        assert_equal(compiled, draw(model, "eager", prompts=prompts, **options))
        assert graphs() - before == 1


@pytest.mark.slow
def test_top_k_lies_between_two_compiled_halves(compiled_model, no_recompiles):
    before = graphs()
    for options in ({"top_k": 3}, {"top_k": 5, "top_p": 0.8, "temperature": 1.5}):
        options = {"guidance_scale": 2.0, **options}
        compiled = draw(compiled_model, "compiled", batch_size=3, **options)
        assert_equal(compiled, draw(compiled_model, "eager", **options))
    assert graphs() - before == 2


@pytest.mark.slow
def test_threads_do_not_share_rows(compiled_model, no_recompiles):
    options = {"guidance_scale": 2.0, "batch_size": 3}
    expected = [draw(compiled_model, "eager", 4, seeds=range(n, n + 4), **options) for n in (0, 10)]
    found: dict[int, object] = {}

    def work(number: int) -> None:
        found[number] = draw(compiled_model, "compiled", 4, seeds=range(10 * number, 10 * number + 4), **options)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert_equal(found[number], expected[number])


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_there_is_not_is_refused():
    model = make_generator()
    with pytest.raises(ValueError, match="implementation must be one of"):
        draw(model, "fast")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        draw(model, "static", batch_size=0)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        draw(model, "static")
    model.set_attn_implementation("sdpa")
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match="several devices"):
        draw(model, "static")
    assert len(draw(model, "auto", 1)) == 1


def test_without_a_compiler_the_message_says_so(monkeypatch):
    def none() -> str:
        raise torch._inductor.exc.InvalidCxxCompiler

    model = make_generator(num_hidden_layers=1, hidden_size=16)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with torch._inductor.config.patch(force_disable_caches=True):
        with pytest.raises(ValueError, match="C\\+\\+ compiler.*implementation='static'"):
            draw(model, "compiled", 1)
