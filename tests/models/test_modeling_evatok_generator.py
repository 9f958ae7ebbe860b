"""EvatokForCausalLM: a Llama that only says what can be decoded."""

from __future__ import annotations

import json

import pytest
import torch
from generator_samples import conditions, make_generator, random_ids
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

import evatok_hf
from evatok_hf import EvatokForCausalLM
from evatok_hf.models.modeling_evatok_generator import BlockGrammar, Prompt


def sequences(model: EvatokForCausalLM, count: int = 4) -> list[torch.Tensor]:
    lengths = model.config.assignment_space.all()[:count]
    return [model.codec.encode(row, random_ids(row, seed=i), Prompt(i % 2)) for i, row in enumerate(lengths)]


def test_saving_and_loading_gives_the_same_logits_through_every_auto_class(tmp_path):
    model = make_generator(tokenizer_fingerprint="00ff")
    model.save_pretrained(tmp_path)
    ids = sequences(model)[0][None]
    for kind in (EvatokForCausalLM, AutoModelForCausalLM):
        again = kind.from_pretrained(tmp_path)
        assert type(again) is EvatokForCausalLM and again.config.tokenizer_fingerprint == "00ff"
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).class_names == ["walk", "run"]


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make_generator().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks tensors: lm_head\.weight"):
        EvatokForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(tmp_path, dtype):
    make_generator().save_pretrained(tmp_path)
    model = EvatokForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert model(sequences(model)[0][None]).logits.dtype == dtype
    assert model.codec.to_tokens(model.generate(do_sample=True)).lengths.shape == (1, 3)


def test_the_same_twice():
    model = make_generator()
    ids = sequences(model)[0][None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_every_parameter_gets_a_gradient():
    model = make_generator().train()
    ids = sequences(model)[3][None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_what_comes_later_changes_nothing_before():
    model = make_generator()
    ids = sequences(model)[3][None]
    other = ids.clone()
    other[0, 6:] = (other[0, 6:] + 1) % 32
    assert torch.equal(model(ids).logits[:, :6], model(other).logits[:, :6])
    assert not torch.allclose(model(ids).logits[:, 6:], model(other).logits[:, 6:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_logits_are_the_uncached_ones(attention):
    model = make_generator(attn_implementation=attention)
    ids = sequences(model)[3][None]
    cache, steps = None, []
    for place in range(ids.shape[1]):
        out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, dim=1), model(ids).logits, atol=1e-4)


def test_logits_do_not_depend_on_batch_mates_of_other_lengths():
    model = make_generator()
    rows = [model.codec.prompt(prompt) for prompt in conditions(model, 5)]
    longest = max(map(len, rows))
    batch = torch.full((len(rows), longest), model.config.pad_token_id)
    for row, ids in zip(batch, rows, strict=True):
        row[longest - len(ids) :] = ids
    mask = (batch != model.config.pad_token_id).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together = model(batch, attention_mask=mask, position_ids=positions).logits
    for index, ids in enumerate(rows):
        assert torch.allclose(together[index, -len(ids) :], model(ids[None]).logits[0], atol=1e-5)


@pytest.mark.parametrize("layout", ["length-first", "end-of-block"])
def test_generate_of_transformers_keeps_to_the_grammar(layout):
    model = make_generator(layout=layout)
    torch.manual_seed(0)
    prompt = model.codec.prompt(Prompt(1))[None].repeat(5, 1)
    out = model.generate(prompt, do_sample=True, temperature=3.0, top_k=5, num_return_sequences=2, budget=13)
    tokens = model.codec.to_tokens(out)
    assert tokens.lengths.shape == (10, 3) and int(tokens.lengths.sum(-1).max()) <= 13
    alone = model.codec.to_tokens(model.generate(input_ids=prompt[:1], lengths=[2, 8, 4]))
    assert alone.lengths.tolist() == [[2, 8, 4]]
    own = model.generate(prompt[:1], logits_processor=[BlockGrammar(model.config, 1, max_block_length=2)])
    assert model.codec.to_tokens(own).lengths.tolist() == [[2, 2, 2]]
    with pytest.raises(ValueError, match="beam search"):
        model.generate(prompt, num_beams=2)


def test_limits_of_transformers_are_kept_to_by_whole_clips():
    model = make_generator()
    prompt = model.codec.prompt(Prompt(1))[None].repeat(3, 1)

    def draw(**options) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(prompt, do_sample=True, **options)

    free, limited = draw(), draw(max_new_tokens=13)
    model.codec.to_tokens(limited)  # all are clips
    assert free.shape[1] > 2 + 13 >= limited.shape[1]
    config = GenerationConfig(max_new_tokens=13, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt, config), limited) and config.max_new_tokens == 13
    assert torch.equal(draw(max_length=15), limited) and torch.equal(draw(max_length=15, budget=9), limited)
    assert torch.equal(draw(max_new_tokens=1000), free)
    model.generation_config.max_new_tokens = 10  # three blocks of two codes, their markers, EOS
    assert model.codec.to_tokens(draw()).lengths.tolist() == [[2, 2, 2]] * 3
    for options in ({"max_new_tokens": 9}, {"max_new_tokens": 11, "lengths": [0, 4, 0]}, {"max_new_tokens": 1}):
        least = 12 if "lengths" in options else 10
        with pytest.raises(ValueError, match=f"no whole clip fits in .* at least {least}"):
            draw(**options)
    with pytest.raises(ValueError, match="at least 10"):
        make_generator().generate(prompt, max_length=11)
    with pytest.raises(ValueError, match="give lengths"):
        draw(min_new_tokens=3)


def test_options_that_do_not_go_with_whole_clips_are_refused():
    model = make_generator()
    config, prompt = model.config, model.codec.prompt(Prompt(1))[None].repeat(6, 1)
    kept = {
        "repetition_penalty": 1.2,
        "suppress_tokens": torch.tensor([5, 6]),
        "bad_words_ids": [[1], [2, 3]],
        "sequence_bias": {(4,): 2.0},
    }
    kept |= {"eos_token_id": torch.tensor([config.eos_token_id]), "pad_token_id": config.eos_token_id}
    tokens = model.codec.to_tokens(model.generate(prompt, do_sample=True, **kept))
    assert not {1, 5, 6} & set(tokens.ids.tolist())
    marker, codes = config.first_marker_id, list(range(config.codebook_size))
    for name, value, message in [
        ("max_time", 0.01, "cut a clip"),
        ("stop_strings", ["a"], "cut a clip"),
        ("forced_eos_token_id", config.eos_token_id, "cut a clip"),
        ("exponential_decay_length_penalty", (5, 1.5), "give lengths"),
        ("eos_token_id", [3, config.eos_token_id], "a clip ends with"),
        ("eos_token_id", config.pad_token_id, "a clip ends with"),
        ("pad_token_id", 3, "is padded with"),
        ("no_repeat_ngram_size", 1, "forbid markers"),
        ("encoder_no_repeat_ngram_size", 1, "forbid markers"),
        ("suppress_tokens", [config.eos_token_id], "nothing else"),
        ("suppress_tokens", codes, "not all"),
        ("begin_suppress_tokens", [marker], "nothing else"),
        ("bad_words_ids", [[4, marker]], "nothing else"),
        ("sequence_bias", [[[marker], float("-inf")]], "finite"),
    ]:
        for options in ({name: value}, {"generation_config": GenerationConfig(**{name: value})}):
            with pytest.raises(ValueError, match=message):
                model.generate(prompt, **options)


@pytest.mark.parametrize("layout", ["length-first", "end-of-block"])
def test_generate_goes_on_from_the_blocks_that_prompts_hold(layout):
    model = make_generator(layout=layout)
    lengths = torch.tensor([4, 8, 2])
    clip = model.codec.blocks(lengths, random_ids(lengths))
    rows = [torch.cat([model.codec.prompt(Prompt(1)), clip[:places]]) for places in (0, 5, 14, 17)]
    prompts = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id, padding_side="left")
    tokens = model.codec.to_tokens(model.generate(prompts, max_new_tokens=10))
    assert [row[:known] for known, row in enumerate(tokens.lengths.tolist())] == [[], [4], [4, 8], [4, 8, 2]]
    assert torch.equal(tokens.clip(3).ids, random_ids(lengths))
    with pytest.raises(ValueError, match="block 1, from place 7"):
        model.generate(torch.cat([rows[1], clip[5:8]])[None])


def test_the_old_name(tmp_path):
    make_generator().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["EvatokForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["EvatokGenerator"]}))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is EvatokForCausalLM
    with pytest.warns(FutureWarning, match="EvatokForCausalLM"):
        assert evatok_hf.EvatokGenerator is EvatokForCausalLM


def test_a_plain_llama_has_equal_logits(tmp_path):
    model = make_generator()
    ids = sequences(model)[3][None]
    model.to_llama().save_pretrained(tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(llama) is LlamaForCausalLM and llama.config.model_type == "llama"
    assert torch.equal(llama(ids).logits, model(ids).logits)
