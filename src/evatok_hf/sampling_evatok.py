"""Clips drawn from a generator: guidance, temperature, top-k, top-p, and a seed for each sample.

A sample is a function of its prompt, its settings and its seed. It is drawn by adding Gumbel noise of its own generator
to the logits and taking the largest, so it is the same whatever the batch that it is drawn in. That holds to rounding:
logits of another batch size may differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .assignment import LengthsLike
from .grammar_evatok import BlockGrammar
from .modeling_evatok_generator import EvatokGenerator
from .sequences_evatok import Prompt
from .tokens_evatok import VideoTokens

SCHEDULES = ("constant", "step")


class _Sampler(LogitsProcessor):
    """From logits of a batch, and of its unconditional half under guidance, to logits whose largest is the sample."""

    def __init__(
        self,
        grammar: BlockGrammar,
        seeds: Sequence[int],
        guidance: Callable[[BlockGrammar], torch.Tensor] | None,
        warpers: LogitsProcessorList,
        greedy: bool,
        progress: Callable[[float], None] | None,
    ):
        self.grammar, self.guidance, self.warpers, self.progress = grammar, guidance, warpers, progress
        self.generators = [] if greedy else [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        halves = 1 if self.guidance is None else 2
        ids = input_ids[: len(input_ids) // halves]
        allowed = self.grammar.advance(ids)
        if self.guidance is not None:
            given, without = scores.chunk(2)
            scale = self.guidance(self.grammar).to(scores)[:, None]
            # At scale 1 the very logits, not what rounding makes of them.
            scores = torch.where(scale == 1, given, without + scale * (given - without))
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
        progress: told how much is done after each step, from 0 to 1.

    Returns:
        `VideoTokens` of B clips on the CPU.

    Raises:
        ValueError: options out of range, a class or condition that is none, no class to guide with, and as
            `BlockGrammar`.
    """
    config, codec = model.config, model.codec
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give at least one prompt, and a seed each.")
    _check(guidance_scale, guidance_schedule, guidance_start, temperature, top_k, top_p)
    if guidance_scale != 1 and any(p.label is None and p.condition_lengths is None for p in prompts):
        raise ValueError("guidance needs a class or a condition to guide towards; use guidance_scale 1 without.")
    if known_blocks and (known_blocks >= config.num_blocks or any(p.condition_lengths is None for p in prompts)):
        raise ValueError(f"known_blocks is {known_blocks}; give a condition, and at most {config.num_blocks - 1}.")
    known = [_known(p, known_blocks, codec) for p in prompts]
    rows = [torch.cat([codec.prompt(p), begun]) for p, begun in zip(prompts, known, strict=True)]
    given = None
    if known_blocks:
        given = torch.stack([torch.as_tensor(p.condition_lengths)[:known_blocks] for p in prompts])
    grammar = BlockGrammar(config, len(prompts), lengths, budget, max_block_length, given)
    guidance = None
    if guidance_scale != 1:
        rows += [torch.cat([codec.prompt(Prompt()), begun]) for begun in known]

        def guidance(grammar: BlockGrammar) -> torch.Tensor:
            on = torch.ones_like(grammar.at_marker) if guide_lengths else ~grammar.at_marker
            if guidance_schedule == "step":
                on = on & (grammar.progress >= guidance_start)
            return torch.where(on, guidance_scale, 1.0)

    warpers = LogitsProcessorList()
    if temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    sampler = _Sampler(grammar, seeds, guidance, warpers, temperature == 0, progress)
    longest = max(map(len, rows))
    padded = torch.full((len(rows), longest), config.pad_token_id)
    for row, ids in zip(padded, rows, strict=True):
        row[longest - len(ids) :] = ids
    padded = padded.to(model.device)
    out = model.generate(
        padded,
        attention_mask=(padded != config.pad_token_id).long(),
        logits_processor=LogitsProcessorList([sampler]),
        do_sample=False,
        num_beams=1,
        use_cache=True,
    )
    return codec.to_tokens(out[: len(prompts)].cpu())


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
