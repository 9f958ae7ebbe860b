"""Serving by other engines: the code of docs/serving.md, and the logits processors and the example for vLLM with its
classes replaced by stand-ins, since vLLM is not installed here."""

from __future__ import annotations

import json
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from generator_samples import make_generator
from markdown_pages import blocks
from transformers import LlamaForCausalLM

from evatok_hf import EvatokForCausalLM, EvatokPipeline, VideoTokenizer, VideoTokens, default_checkpoint
from evatok_hf.bundled import checkpoint_of
from evatok_hf.export.llama import RequestGrammar, export_llama
from evatok_hf.models.modeling_evatok_generator import Prompt
from evatok_hf.video import open_video, write_video

# In the order of the page; a block more, and this line says so.
MANY, EIGHT_BIT, GRAMMAR, TRANSFORMERS, PREDICTION = [block.text for block in blocks("docs/serving.md", "python")]


@pytest.fixture
def model(tmp_path):
    model = make_generator()
    export_llama(model, tmp_path / "llama")
    return model


def processor(monkeypatch, tmp_path, module: str, base: str, runner: str):
    """The processor as vLLM's second ("1") or first model runner ("0") would find it."""
    for depth in range(1, len(parts := module.split(".")) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    setattr(sys.modules[module], base, object)
    monkeypatch.setenv("EVATOK_VOCABULARY", str(tmp_path / "llama" / "vocabulary.json"))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.delitem(sys.modules, "evatok_hf.export.vllm_grammar", raising=False)
    return import_module("evatok_hf.export.vllm_grammar").BlockGrammarProcessor


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
    monkeypatch.delenv("EVATOK_VOCABULARY")
    with pytest.raises(ValueError, match="EVATOK_VOCABULARY"):
        kind.validate_params(params())


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
    bundled = EvatokForCausalLM.from_pretrained(default_checkpoint("generator"), subfolder="generator")
    export_llama(bundled, tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    return json.loads((tmp_path / "llama" / "vocabulary.json").read_text())


def test_the_code_for_many_clips():
    """On a CPU, with fewer clips, and without the compiler."""
    small = {'"cuda"': '"cpu"', "512": "3", "=32": "=2", '"compiled"': '"static"'}
    code = MANY
    for there, here in small.items():
        assert there in code
        code = code.replace(there, here)
    names: dict = {"EvatokPipeline": EvatokPipeline}
    exec(code, names)
    assert names["clips"].frames.shape == (3, 16, 3, 64, 64)


def test_the_code_for_8_bit_weights():
    names: dict = {}
    exec(EIGHT_BIT, names)
    assert names["pipe"]("basic", seeds=[0]).frames.shape == (1, 16, 64, 64, 3)


def test_the_code_for_transformers(exported):
    torch.manual_seed(0)
    names: dict = {}
    exec(TRANSFORMERS, names)
    assert names["tokens"].lengths.shape == (4, 4)
    # and the grammar of one request, which masks logits
    exec(GRAMMAR, {"logits": torch.zeros(exported["vocab_size"]), "token": 1024})


def test_the_code_for_prediction(exported, tmp_path, sample_clip):
    with open_video(sample_clip) as video:
        write_video(tmp_path / "video.mp4", video.read(range(8)), 25)
    names: dict = {}
    exec(PREDICTION, names)
    known = names["extra"]["known"]
    assert len(known) == names["blocks"] == 1
    grammar = RequestGrammar(exported, known=known)  # takes up where the prompt ends
    allowed = grammar.mask_(torch.zeros(exported["vocab_size"])).isfinite().nonzero()[:, 0].tolist()
    assert allowed == list(exported["length_ids"].values())


class Engine:
    """Stands in for `vllm.LLM`: the exported Llama, one request after another, masked by the named processor."""

    def __init__(self, model: str, skip_tokenizer_init: bool, logits_processors: list[str]):
        module, name = logits_processors[0].split(":")
        self.processor = getattr(import_module(module), name)()
        self.llama = LlamaForCausalLM.from_pretrained(model).eval()

    @torch.no_grad()
    def generate(self, prompts: list[dict], params: list[SimpleNamespace]) -> list[SimpleNamespace]:
        answers = []
        for prompt, options in zip(prompts, params, strict=True):
            follower, ids = self.processor.new_req_logits_processor(options), []
            chance = torch.Generator().manual_seed(options.seed)
            while not ids or ids[-1] not in options.stop_token_ids:
                logits = self.llama(torch.tensor([[*prompt["prompt_token_ids"], *ids]])).logits[0, -1]
                masked = follower(ids, logits.float() / options.temperature)
                ids.append(int(torch.multinomial(masked.softmax(-1), 1, generator=chance)))
            assert len(ids) <= options.max_tokens
            answers.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]))
        return answers


def test_the_example_draws_clips_that_decode(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EVATOK_VOCABULARY", "")
    processor(monkeypatch, tmp_path, "vllm.v1.sample.logits_processor", "AdapterLogitsProcessor", "0")
    sys.modules["vllm"].LLM, sys.modules["vllm"].SamplingParams = Engine, SimpleNamespace
    example = Path(__file__).parents[2] / "examples" / "serve_vllm.py"
    output = tmp_path / "clips.safetensors"
    options = ["--class_name", "take_cover", "--clips", "2", "--lengths", "8", "0", "8", "8", "--budget", "48"]
    monkeypatch.setattr(sys, "argv", [str(example), "--output", str(output), *options])
    runpy.run_path(str(example), run_name="__main__")
    tokens = VideoTokens.load(output)
    assert len(tokens) == 2 and "2 clips" in capsys.readouterr().out
    assert all(row[0] == row[2] == row[3] == 8 and sum(row) <= 48 for row in tokens.lengths.tolist())
    tokenizer = VideoTokenizer.from_pretrained(checkpoint_of(tokens.fingerprint))  # they say whose tokens they are
    frames = list(tokenizer.decode(tokens))
    assert sum(map(len, frames)) == 32
    monkeypatch.setattr(sys, "argv", [str(example), "--output", str(output), "--budget", "1"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(example), run_name="__main__")
    assert "budget of 1" in capsys.readouterr().err
