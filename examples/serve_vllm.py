"""Clips of a class drawn in one batch by vLLM, from the generator as a plain Llama.

    pip install vllm
    python examples/serve_vllm.py --class_name deadly_corridor --clips 64 --output clips.safetensors
    evatok decode clips.safetensors clips.mp4

vLLM batches what it is given by itself. Its samples are not those of `evatok generate` for the same seeds, and there is
no classifier-free guidance. This was written from vLLM's documentation; only its parts around vLLM have been run.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from evatok_hf import VideoTokens, default_checkpoint
from evatok_hf.export.llama import VOCABULARY, export_llama
from evatok_hf.models.checkpoint_evatok import find_dtype, load_generator
from evatok_hf.models.configuration_evatok import find_class
from evatok_hf.models.modeling_evatok_generator import BlockGrammar, Prompt, SequenceCodec

PROCESSOR = "evatok_hf.export.vllm_grammar:BlockGrammarProcessor"


@dataclass
class Arguments:
    output: str = field(metadata={"help": "File of tokens to write, which `evatok decode` takes."})
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; the bundled checkpoint by default."})
    class_name: str | None = field(default=None, metadata={"help": "The class; none by default."})
    clips: int = field(default=16, metadata={"help": "How many."})
    seed: int = field(default=0, metadata={"help": "Of the first clip; the next ones count on."})
    temperature: float = field(default=1.0, metadata={"help": "Of the logits."})
    budget: int | None = field(default=None, metadata={"help": "Most tokens of a clip."})
    lengths: list[int] | None = field(default=None, metadata={"help": "Tokens of each block, 0 where it is free."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the served weights."})


def request_options(codec: SequenceCodec, seed: int, temperature: float, **grammar: Any) -> dict[str, Any]:
    """The options of vLLM's `SamplingParams` for one clip; `grammar` is lengths, budget and known, None for none."""
    config = codec.config
    given = {name: value for name, value in grammar.items() if value is not None}
    return {
        "temperature": temperature,
        "seed": seed,
        "max_tokens": config.clip_places(),
        "stop_token_ids": [config.eos_token_id],
        "detokenize": False,
        "extra_args": {"grammar": True, **given},
    }


def to_tokens(codec: SequenceCodec, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> VideoTokens:
    """The clips of answers, which may or may not hold the EOS that stopped them. Raises ValueError for what is none."""
    end = codec.config.eos_token_id
    ids = [[*prompt, *answer] for answer in answers]
    return codec.to_tokens([torch.tensor(row if row[-1] == end else [*row, end]) for row in ids])


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    name = args.model or default_checkpoint("generator")
    generator = load_generator(name, torch.device("cpu"), find_dtype(args.dtype))
    if generator is None:
        raise ValueError(f"{name} has no generator; name a checkpoint with generator/.")
    BlockGrammar(generator.config, 1, args.lengths, args.budget)  # refuses what no clip can have before vLLM starts
    codec = generator.codec
    prompt = codec.prompt(Prompt(find_class(generator.config, args.class_name))).tolist()
    requests = [
        request_options(codec, args.seed + i, args.temperature, budget=args.budget, lengths=args.lengths)
        for i in range(args.clips)
    ]
    with tempfile.TemporaryDirectory() as folder:
        llama = Path(folder) / "llama"
        export_llama(generator, llama)
        os.environ["EVATOK_VOCABULARY"] = str(llama / VOCABULARY)  # before the engine starts its processes
        try:
            from vllm import LLM, SamplingParams
        except ModuleNotFoundError as error:
            raise ValueError("vLLM is not installed; pip install vllm, on a machine that it supports.") from error
        engine = LLM(model=str(llama), skip_tokenizer_init=True, logits_processors=[PROCESSOR])
        started = time.perf_counter()
        answers = engine.generate(
            [{"prompt_token_ids": prompt}] * args.clips, [SamplingParams(**options) for options in requests]
        )
        seconds = time.perf_counter() - started
    tokens = to_tokens(codec, prompt, [answer.outputs[0].token_ids for answer in answers])
    replace(tokens, fps=generator.config.fps).save(args.output)
    print(
        f"{args.output}: {len(tokens)} clips, {tokens.ids.numel()} tokens, {tokens.ids.numel() / seconds:.0f} a second"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
