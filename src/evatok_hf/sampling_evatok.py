"""Clips drawn from a generator: guidance, temperature, top-k, top-p, and a seed for each sample.

A sample is a function of its prompt, its settings and its seed. It is drawn by adding Gumbel noise of its own generator
to the logits and taking the largest, so it is the same whatever the batch that it is drawn in, and whichever loop draws
it. That holds to rounding: logits of another batch size or another kernel may differ in the last bits.

There are two loops. `generate` of transformers with the grammar as a logits processor is the plain reference,
"eager". The other is that of `generation_evatok`, "static", whose step may be "compiled".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.utils._triton import has_triton
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .assignment import LengthsLike
from .generation_evatok import Drawing, decode, guide, no_static_cache
from .grammar_evatok import BlockGrammar
from .modeling_evatok_generator import EvatokGenerator
from .sequences_evatok import Prompt
from .tokens_evatok import VideoTokens

SCHEDULES = ("constant", "step")
IMPLEMENTATIONS = ("auto", "eager", "static", "compiled")
# "auto" compiles on a GPU from so many steps on. An estimate, not measured: compilation takes about a minute, and saves
# some 15 ms a step.
STEPS_WORTH_COMPILING = 4096


class _Sampler(LogitsProcessor):
    """From logits of a batch, and of its unconditional half under guidance, to logits whose largest is the sample."""

    def __init__(
        self,
        grammar: BlockGrammar,
        seeds: Sequence[int],
        drawing: Drawing,
        progress: Callable[[float], None] | None,
    ):
        self.grammar, self.drawing, self.progress = grammar, drawing, progress
        greedy = drawing.temperature == 0
        self.generators = [] if greedy else [torch.Generator().manual_seed(seed) for seed in seeds]
        self.warpers = LogitsProcessorList(drawing.warpers)
        if drawing.temperature not in (0, 1):
            self.warpers.insert(0, TemperatureLogitsWarper(float(drawing.temperature)))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        drawing, halves = self.drawing, 1 if self.drawing.guidance_scale is None else 2
        ids = input_ids[: len(input_ids) // halves]
        allowed = self.grammar.advance(ids)
        if halves == 2:
            where = self.grammar.at_marker, self.grammar.progress
            options = drawing.guidance_scale, drawing.guidance_start, drawing.guide_lengths
            scores = guide(*scores.chunk(2), *where, *options)
        scores = self.warpers(ids, scores.masked_fill(~allowed, -torch.inf))
        if self.generators:
            size = scores.shape[1]
            noise = [torch.empty(size).exponential_(generator=generator) for generator in self.generators]
            scores = scores - torch.stack(noise).to(scores).log()
        if self.progress is not None:
            self.progress(float(self.grammar.progress.mean()))
        return scores.repeat(halves, 1)


def sample(
    model: EvatokGenerator,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    lengths: LengthsLike | None = None,
    budget: int | None = None,
    max_block_length: int | None = None,
    known_blocks: int = 0,
    guidance_scale: float = 1.0,
    guidance_schedule: str = "constant",
    guidance_start: float = 0.18,
    guide_lengths: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    batch_size: int | None = None,
    implementation: str = "auto",
    progress: Callable[[float], None] | None = None,
) -> VideoTokens:
    """Draws a clip for each prompt.

    Args:
        model: the generator.
        prompts: B of them; those of one call may have conditions of different lengths.
        seeds: B of them.
        lengths, budget, max_block_length: see `BlockGrammar`; by default the model decides the lengths.
        known_blocks: the clip begins with so many blocks of the condition, which are not generated anew.
        guidance_scale: s of classifier-free guidance, `u + s (c - u)` with u the logits after no class and no
            condition; 1 is none (LARP on UCF-101: 1.25).
        guidance_schedule: "constant", or "step": none in the first `guidance_start` of the clip's time (GigaTok's for
            images: 0.18).
        guide_lengths: whether guidance also moves the lengths of blocks (our choice: not).
        temperature: of the logits; 0 takes the most likely token every time.
        top_k, top_p: only draw from the k most likely tokens, or from the fewest that have probability p together.
        batch_size: clips drawn at once, by default all; a clip that ends makes room for the next one ("eager" draws one
            batch after the other).
        implementation: "eager", "static" or "compiled" (see above); "compiled" takes a minute at first, for every size
            of batch and cache, and a compiler. "auto" is "static", on a GPU with many clips "compiled", "eager" on a
            CPU or where there is no static cache: for other attention than sdpa, or a generator over several devices.
        progress: told from time to time how much is done, from 0 to 1.

    Returns:
        `VideoTokens` of B clips on the CPU.

    Raises:
        ValueError: options out of range, a class or condition that is none, no class to guide with, and as
            `BlockGrammar`; an implementation that this generator or machine does not have.
    """
    config, codec = model.config, model.codec
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give at least one prompt, and a seed each.")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    _check(guidance_scale, guidance_schedule, guidance_start, temperature, top_k, top_p)
    if guidance_scale != 1 and any(p.label is None and p.condition_lengths is None for p in prompts):
        raise ValueError("guidance needs a class or a condition to guide towards; use guidance_scale 1 without.")
    if known_blocks and (known_blocks >= config.num_blocks or any(p.condition_lengths is None for p in prompts)):
        raise ValueError(f"known_blocks is {known_blocks}; give a condition, and at most {config.num_blocks - 1}.")
    known = [_known(p, known_blocks, codec) for p in prompts]
    rows = [[torch.cat([codec.prompt(p), begun])] for p, begun in zip(prompts, known, strict=True)]
    if guidance_scale != 1:
        for row, begun in zip(rows, known, strict=True):
            row.append(torch.cat([codec.prompt(Prompt()), begun]))
    given = None
    if known_blocks:
        given = torch.stack([torch.as_tensor(p.condition_lengths)[:known_blocks] for p in prompts])
    grammar = BlockGrammar(config, len(prompts), lengths, budget, max_block_length, given)
    drawing = Drawing(
        None if guidance_scale == 1 else float(guidance_scale),
        float(guidance_start) if guidance_schedule == "step" else 0.0,
        guide_lengths,
        float(temperature),
    )
    if top_k:
        drawing.warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        drawing.warpers.append(TopPLogitsWarper(float(top_p)))
    size = len(prompts) if batch_size is None else batch_size
    implementation = _choose(implementation, model, math.ceil(len(prompts) / size) * config.assignment_space.max_tokens)
    if implementation == "eager":
        sequences = _generate(model, rows, seeds, grammar, drawing, size, progress)
    else:
        sequences = decode(model, rows, seeds, grammar, drawing, size, implementation == "compiled", progress)
    return codec.to_tokens(sequences)


def _choose(implementation: str, model: EvatokGenerator, steps: int) -> str:
    """What "auto" is."""
    if implementation != "auto":
        return implementation
    # On a CPU there is no device to wait for, and the static loop was not the faster one in the one measurement so far.
    if no_static_cache(model) or model.device.type == "cpu":
        return "eager"
    worth = model.device.type == "cuda" and steps >= STEPS_WORTH_COMPILING and has_triton()
    return "compiled" if worth else "static"


def _generate(
    model: EvatokGenerator,
    prompts: Sequence[Sequence[torch.Tensor]],
    seeds: Sequence[int],
    grammar: BlockGrammar,
    drawing: Drawing,
    batch_size: int,
    progress: Callable[[float], None] | None,
) -> list[torch.Tensor]:
    """The plain loop, one batch after another. Arguments as `decode`."""
    sequences, total = [], len(prompts)
    for start in range(0, total, batch_size):
        part = range(start, min(start + batch_size, total))
        own = BlockGrammar(model.config, len(part))
        own.copy_rows_(range(len(part)), grammar, part)

        def tell(done: float, start: int = start, count: int = len(part)) -> None:
            progress((start + done * count) / total)

        sampler = _Sampler(own, [seeds[i] for i in part], drawing, progress and tell)
        rows = [prompts[i][copy] for copy in range(len(prompts[0])) for i in part]  # all given, then all without
        longest = max(map(len, rows))
        padded = torch.full((len(rows), longest), model.config.pad_token_id)
        for row, ids in zip(padded, rows, strict=True):
            row[longest - len(ids) :] = ids
        padded = padded.to(model.device)
        out = model.generate(
            padded,
            attention_mask=(padded != model.config.pad_token_id).long(),
            logits_processor=LogitsProcessorList([sampler]),
            do_sample=False,
            num_beams=1,
            use_cache=True,
        )
        sequences += list(out[: len(part)].cpu())
    return sequences


def _known(prompt: Prompt, blocks: int, codec) -> torch.Tensor:
    if not blocks:
        return torch.empty(0, dtype=torch.int64)
    return codec.blocks(prompt.condition_lengths, prompt.condition_ids, blocks)


def _check(scale: float, schedule: str, start: float, temperature: float, top_k: int | None, top_p: float) -> None:
    if not 0 <= scale <= 100:
        raise ValueError(f"guidance_scale must lie between 0 and 100, got {scale}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"guidance_schedule must be one of {SCHEDULES}, got {schedule!r}.")
    if not 0 <= start <= 1:
        raise ValueError(f"guidance_start must lie between 0 and 1, got {start}.")
    if not 0 <= temperature <= 100:
        raise ValueError(f"temperature must lie between 0 and 100, got {temperature}.")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or more, got {top_k}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie above 0 and be at most 1, got {top_p}.")
