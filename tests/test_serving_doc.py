"""The code of docs/serving.md: that for transformers as it stands, that for vLLM with stand-ins for vLLM's base classes
and engine, since vLLM is not installed here."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from generator_samples import make_generator
from markdown_pages import blocks

from evatok_hf import EvatokGenerator, Prompt, default_checkpoint, open_video, write_video
from evatok_hf.llama_export import RequestGrammar, export_llama

# In the order of the page; a block more, and this line says so.
GRAMMAR, TRANSFORMERS, PROCESSORS, DRAWING, PREDICTION = [block.text for block in blocks("docs/serving.md", "python")]


@pytest.fixture
def model(tmp_path):
    model = make_generator()
    export_llama(model, tmp_path / "llama")
    return model


def processor(monkeypatch, tmp_path, module: str, base: str, runner: str):
    """The processor of the page, as vLLM's second ("1") or first model runner ("0") would find it."""
    for depth in range(1, len(parts := module.split(".")) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    setattr(sys.modules[module], base, object)
    monkeypatch.setenv("EVATOK_VOCABULARY", str(tmp_path / "llama" / "vocabulary.json"))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    names: dict = {}
    exec(PROCESSORS, names)
    return names["BlockGrammarProcessor"]


def params(**extra) -> SimpleNamespace:
    return SimpleNamespace(extra_args={"grammar": True, **extra})


def test_the_first_runner_draws_what_decodes(model, monkeypatch, tmp_path):
    kind = processor(monkeypatch, tmp_path, "vllm.v1.sample.logits_processor", "AdapterLogitsProcessor", "0")
    made, rng = kind(), torch.Generator().manual_seed(0)
    assert made.new_req_logits_processor(SimpleNamespace(extra_args=None)) is None
    for index in range(10):
        follower, ids = made.new_req_logits_processor(params(budget=11)), []
        while not ids or ids[-1] != model.config.eos_token_id:
            logits = follower(ids, torch.randn(model.config.vocab_size, generator=rng))
            ids.append(int(logits.argmax()))
        prompt = model.codec.prompt(Prompt(index % 2))
        assert int(model.codec.decode(torch.cat([prompt, torch.tensor(ids)]))[0].sum()) <= 11
    with pytest.raises(ValueError, match="budget"):
        kind.validate_params(params(budget=1))


def test_the_second_runner_draws_what_decodes(model, monkeypatch, tmp_path):
    kind = processor(monkeypatch, tmp_path, "vllm.v1.worker.gpu.sample.logits_processor", "LogitsProcessor", "1")
    prompt, slots = model.codec.prompt(Prompt(1)), 3
    ids = torch.zeros(slots, 64, dtype=torch.int64)
    ids[:, : len(prompt)] = prompt
    lengths = torch.full((slots,), len(prompt))
    states = SimpleNamespace(
        prompt_len=SimpleNamespace(gpu=lengths.clone()),
        total_len=SimpleNamespace(gpu=lengths),
        all_token_ids=SimpleNamespace(gpu=ids),
    )
    made, rng = kind(None, states), torch.Generator().manual_seed(0)
    assert made.add_request(2, params(lengths=[2, 0, 8])) and made.add_request(0, params())
    assert not made.add_request(1, SimpleNamespace(extra_args=None))
    running = [2, 0]
    while running:
        logits = torch.randn(len(running), model.config.vocab_size, generator=rng)
        drawn = made.apply(logits, SimpleNamespace(expanded_idx_mapping=torch.tensor(running))).argmax(-1)
        for slot, token in zip(list(running), drawn.tolist(), strict=True):
            ids[slot, lengths[slot]] = token
            lengths[slot] += 1
            if token == model.config.eos_token_id:
                running.remove(slot)
    forced, _ = model.codec.decode(ids[2, : lengths[2]])
    assert forced[0] == 2 and forced[2] == 8
    model.codec.decode(ids[0, : lengths[0]])  # is a clip


@pytest.fixture
def exported(monkeypatch, tmp_path) -> dict:
    """The vocabulary of the bundled generator, whose Llama is in the working directory as `llama`."""
    bundled = EvatokGenerator.from_pretrained(default_checkpoint(), subfolder="generator")
    export_llama(bundled, tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    return json.loads((tmp_path / "llama" / "vocabulary.json").read_text())


def test_the_code_for_transformers(exported):
    torch.manual_seed(0)
    names: dict = {}
    exec(TRANSFORMERS, names)
    assert names["tokens"].lengths.shape == (4, 4)
    # and the grammar of one request, which masks logits
    exec(GRAMMAR, {"logits": torch.zeros(exported["vocab_size"]), "token": 1024})


class Engine:
    """In place of `vllm.LLM`: draws from random logits what the options of a request allow."""

    def __init__(self, **options):
        assert options["model"] == "llama" and options["logits_processors"] == [
            "block_grammar_vllm:BlockGrammarProcessor"
        ]

    def generate(self, prompts, params):
        words, rng = json.load(open("llama/vocabulary.json")), torch.Generator().manual_seed(0)
        for prompt, one in zip(prompts, params, strict=True):
            assert prompt["prompt_token_ids"][0] == words["bos_id"] and one.stop_token_ids == [words["eos_id"]]
            grammar = RequestGrammar(words, budget=one.extra_args["budget"])
            ids: list[int] = []
            while words["eos_id"] not in ids:
                ids.append(int(grammar.mask_(torch.randn(words["vocab_size"], generator=rng)).argmax()))
                grammar.take(ids[-1])
            assert len(ids) <= one.max_tokens
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids[:-1])])  # vLLM leaves the end out


def test_the_code_around_vllm(exported, monkeypatch, tmp_path, sample_clip):
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = Engine, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setenv("EVATOK_VOCABULARY", "")  # set by the page, put back afterwards
    names: dict = {}
    exec(DRAWING, names)
    assert names["frames"].shape == (4, 16, 64, 64, 3) and names["tokens"].lengths.sum(-1).max() <= 200

    with open_video(sample_clip) as video:
        write_video(tmp_path / "video.mp4", video.read(range(8)), 25)
    exec(PREDICTION, names)
    known = names["extra"]["known"]
    assert len(known) == names["blocks"] == 1
    grammar = RequestGrammar(exported, known=known)  # takes up where the prompt ends
    allowed = grammar.mask_(torch.zeros(exported["vocab_size"])).isfinite().nonzero()[:, 0].tolist()
    assert allowed == list(exported["length_ids"].values())
