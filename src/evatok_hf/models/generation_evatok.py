"""Clips drawn from a generator: guidance, temperature, top-k, top-p, and a seed for each sample.

A sample is a function of its prompt, its settings and its seed. It is drawn by adding Gumbel noise of its own generator
to the logits and taking the largest, so it is the same whatever the batch that it is drawn in, and whichever loop draws
it. That holds to rounding: logits of another batch size or another kernel may differ in the last bits.

There are two loops. `generate` of transformers with the grammar as a logits processor is the plain reference,
"eager". The other has a static cache, "static", and its step may be "compiled".
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._triton import has_triton
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, StaticLayer

from .configuration_evatok import LengthsLike
from .modeling_evatok_generator import ROWS, BlockGrammar, EvatokForCausalLM, Prompt
from .tokens_evatok import VideoTokens

SCHEDULES = ("constant", "step")
IMPLEMENTATIONS = ("auto", "eager", "static", "compiled")
# "auto" compiles on a GPU from so many steps on. An estimate, not measured: compilation takes about a minute, and saves
# some 15 ms a step.
STEPS_WORTH_COMPILING = 4096
# Steps between two looks whether rows have ended. On a GPU the host runs ahead meanwhile; on a CPU a look costs
# nothing, and a row that has ended costs as much as one that runs.
CHUNK, CPU_CHUNK = 16, 1
# What attention reads of the cache is a multiple of it long; kernels want aligned masks.
ALIGNMENT = 64
ATTENTION = ("sdpa", "eager")


@dataclass
class Drawing:
    """How ids are drawn from logits; see `sample`.

    Attributes:
        guidance_scale: None for none.
        guidance_start: of the clip's time; 0 for a constant schedule.
        guide_lengths: whether guidance moves lengths.
        temperature: 0 draws the most likely id.
        warpers: what changes the logits after that, top-k and top-p.
    """

    guidance_scale: float | None = None
    guidance_start: float = 0.0
    guide_lengths: bool = False
    temperature: float = 1.0
    warpers: LogitsProcessorList = field(default_factory=LogitsProcessorList)


def guide(
    given: torch.Tensor,
    without: torch.Tensor,
    at_marker: torch.Tensor,
    progress: torch.Tensor,
    scale: float | torch.Tensor,
    start: float | torch.Tensor,
    lengths: bool | torch.Tensor,
) -> torch.Tensor:
    """Classifier-free guidance: logits after the prompt and after none, (B, V) each, and where the rows are, (B,) each,
    to guided logits (B, V)."""
    on = (~at_marker | lengths) & (progress >= start)
    scale = torch.where(on, scale, 1.0)[:, None]
    # At scale 1 the very logits, not what rounding makes of them.
    return torch.where(scale == 1, given, without + scale * (given - without))


def sample(
    model: EvatokForCausalLM,
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


def _choose(implementation: str, model: EvatokForCausalLM, steps: int) -> str:
    """What "auto" is."""
    if implementation != "auto":
        return implementation
    # On a CPU there is no device to wait for, and the static loop was not the faster one in the one measurement so far.
    if no_static_cache(model) or model.device.type == "cpu":
        return "eager"
    worth = model.device.type == "cuda" and steps >= STEPS_WORTH_COMPILING and has_triton()
    return "compiled" if worth else "static"


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


# --- the plain loop ---------------------------------------------------------------------------------------------------


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


def _generate(
    model: EvatokForCausalLM,
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


# --- the static loop --------------------------------------------------------------------------------------------------


# A static cache, no waiting for the device, and rows that are used again. It draws the same ids from the same seeds as
# the plain loop. A sequence that ends makes room in the batch for the next one that waits; when none waits, an
# uncompiled batch becomes smaller. What a step needs lies on the device, the state of the grammar included, and the
# host looks only every few steps whether sequences have ended. A step is one function without branches on data, which
# `torch.compile` takes as a whole.


@torch.no_grad()
def decode(
    model: EvatokForCausalLM,
    prompts: Sequence[Sequence[torch.Tensor]],
    seeds: Sequence[int],
    grammar: BlockGrammar,
    drawing: Drawing,
    batch_size: int,
    compiled: bool = False,
    progress: Callable[[float], None] | None = None,
) -> list[torch.Tensor]:
    """Draws a sequence after each prompt.

    Args:
        model: the generator, on any device.
        prompts: N of them, each of one row of ids, or under guidance of two: with the condition and without.
        seeds: N of them.
        grammar: of N rows, where the prompts end; it is left as it is.
        drawing: how ids are drawn.
        batch_size: sequences drawn at once.
        compiled: whether the step is compiled, once for a size of batch and cache; later calls use it again.
        progress: told from time to time how much is done, from 0 to 1.

    Returns:
        N sequences from BOS to EOS on the CPU.

    Raises:
        ValueError: a generator that has no static cache; a machine that cannot compile.
    """
    config = model.config
    if reason := no_static_cache(model):
        raise ValueError(f"a static cache is not for this generator: {reason}, or sample with implementation='eager'.")
    slots, copies = min(batch_size, len(prompts)), len(prompts[0])
    # The last id, EOS, is drawn but never seen.
    needed = max(len(row) for rows in prompts for row in rows) + int(grammar.longest.max()) + config.num_blocks
    if not compiled:
        held = Slots(model, slots, copies, _aligned(needed))
        run = _Run(model, held, prompts, seeds, grammar, drawing, progress)
        return run.finish(lambda part: step(model, part, drawing.warpers), shrink=True)
    with _compiled(model, (slots, copies, cache_length(config, needed)), drawing.warpers) as (held, fast):
        run = _Run(model, held, prompts, seeds, grammar, drawing, progress)
        return run.finish(fast, shrink=False)


def no_static_cache(model: EvatokForCausalLM) -> str | None:
    """Why there is none for a generator, and what mends it."""
    attention = model.config._attn_implementation
    if attention not in ATTENTION:
        return f"its attention is {attention!r}; load it with attn_implementation={ATTENTION[0]!r}"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it lies on several devices; load it onto one"
    return None


def cache_length(config: Any, needed: int) -> int:
    """The length of a compiled step's cache: an eighth, a quarter, a half or all of the longest sequence that there is.

    So a model has at most four compiled steps for a batch, whatever its prompts and limits.
    """
    longest = config.max_position_embeddings
    return _aligned(min(part for n in (8, 4, 2, 1) if (part := -(-longest // n)) >= needed))


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


# --- what a step reads and writes -------------------------------------------------------------------------------------


# Rows of a batch, each at a place of its own in its sequence. All of it lies on the device in tensors that keep their
# addresses, so that a compiled step can be recorded once as a CUDA graph and played again for other sequences.


class _Places:
    """Where every row writes in the cache, and how much of the cache attention reads; shared by all layers."""

    position: torch.Tensor  # (S, G), R of them
    length: int


class _Layer(StaticLayer):
    """A static layer of the cache whose rows are at places of their own, for one new id a row."""

    def __init__(self, max_cache_len: int, places: _Places):
        super().__init__(max_cache_len)
        self.places = places

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        rows, length = key_states.shape[0], self.places.length
        row, place = torch.arange(rows, device=key_states.device), self.places.position.view(-1)
        self.keys[row, :, place] = key_states[:, :, 0].to(self.keys.dtype)  # (R, H, D); autocast may differ
        self.values[row, :, place] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:rows, :, :length], self.values[:rows, :, :length]

    def get_seq_length(self, *args: Any) -> int:
        return 0  # there is none of all rows; masks and positions are given


class Slots:
    """The rows of a batch: S sequences at once, of G rows of the network each (2 under guidance).

    Args:
        model: gives sizes, device and dtype.
        slots: S.
        copies: G.
        length: places L of the cache.
    """

    def __init__(self, model: EvatokForCausalLM, slots: int, copies: int, length: int):
        config, device = model.config, model.device
        self.shape, self.length, self.pad = (slots, copies), length, config.pad_token_id
        self.most = config.clip_places()
        self.chunk = CPU_CHUNK if device.type == "cpu" else CHUNK
        self.grammar = BlockGrammar(config, slots).to(device)
        self.token = torch.full((slots, copies), self.pad, device=device)  # what the network sees next
        self.position = torch.zeros(slots, copies, dtype=torch.int64, device=device)  # and its place
        # (S, most + 1) ids drawn after the prompt; those that have ended write into the last column.
        self.drawn = torch.full((slots, self.most + 1), self.pad, device=device)
        self.count = torch.zeros(slots, dtype=torch.int64, device=device)  # of them
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)  # which noise is next
        # (chunk, S, V) of the standard exponential distribution; ones draw the most likely id.
        self.noise = torch.ones(self.chunk, slots, config.vocab_size, device=device)
        # Settings are tensors, so that others need no other code.
        self.temperature, self.scale, self.start = (torch.ones((), device=device) for _ in range(3))
        self.guide_lengths = torch.zeros((), dtype=torch.bool, device=device)
        self.seen = torch.arange(length, device=device)  # (L,)
        self.places = _Places()
        self.cache = Cache(layers=[_Layer(length, self.places) for _ in range(config.num_hidden_layers)])
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        one = torch.empty(slots * copies, config.num_key_value_heads, 0, head, device=device, dtype=model.dtype)
        for layer in self.cache.layers:
            layer.lazy_initialization(one, one)
        self.additive = model.config._attn_implementation == "eager"
        for owner in (self, self.grammar):
            for value in vars(owner).values():
                if isinstance(value, torch.Tensor):
                    torch._dynamo.mark_static_address(value)
        self.use(self.length)

    def use(self, length: int) -> None:
        """Attention reads the first `length` places of the cache."""
        self.places.position, self.places.length = self.position, length

    def first(self, slots: int) -> Slots:
        """The first slots; what happens to them happens here. Its `use` holds until this one's is called again."""
        part = copy(self)
        part.shape = slots, self.shape[1]
        for name in ("token", "position", "drawn", "count"):
            setattr(part, name, getattr(self, name)[:slots])
        part.noise = self.noise[:, :slots]
        part.grammar = self.grammar.first(slots)
        return part

    def mask(self) -> torch.Tensor:
        """(R, 1, 1, length): each row sees its own sequence and nothing behind it."""
        mask = (self.seen[: self.places.length] <= self.position.view(-1, 1))[:, None, None]
        if not self.additive:
            return mask
        dtype = self.cache.layers[0].keys.dtype
        return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def fill_(
        self,
        model: EvatokForCausalLM,
        slots: Sequence[int],
        prompts: Sequence[Sequence[torch.Tensor]],
        grammar: BlockGrammar,
        rows: Sequence[int],
    ) -> None:
        """Begins sequences: G rows of ids a slot, of any lengths, and the state of these rows of a grammar.

        All ids but the last, which is the first step's, go through the network at once, padded on the right: causal
        attention never sees the padding, and what it leaves in the cache is hidden until it is written over.
        """
        copies = self.shape[1]
        ids = [row for prompt in prompts for row in prompt]
        places = [slot * copies + row for slot in slots for row in range(copies)]
        device = self.token.device
        longest = max(map(len, ids)) - 1
        if longest:
            padded = torch.full((len(ids), longest), self.pad)
            for row, prompt in zip(padded, ids, strict=True):
                row[: len(prompt) - 1] = prompt[:-1]
            past = DynamicCache(config=model.config)
            model.model(input_ids=padded.to(device), past_key_values=past, use_cache=True)
            for layer, done in zip(self.cache.layers, past.layers, strict=True):
                layer.keys[places, :, :longest] = done.keys.to(layer.keys.dtype)
                layer.values[places, :, :longest] = done.values.to(layer.values.dtype)
        last = torch.stack([row[-1] for row in ids]).view(-1, copies)
        self.token[slots] = last.to(device)
        self.position[slots] = torch.tensor([len(row) - 1 for row in ids], device=device).view(-1, copies)
        self.drawn[slots] = self.pad
        self.count[slots] = 0
        self.grammar.copy_rows_(slots, grammar, rows)

    def move_(self, source: int, target: int) -> None:
        """Puts one slot's sequence into another's place."""
        for name in ("token", "position", "drawn", "count"):
            tensor = getattr(self, name)
            tensor[target] = tensor[source]
        for name in ROWS:
            tensor = getattr(self.grammar, name)
            tensor[target] = tensor[source]
        copies = self.shape[1]
        here, there = (slice(slot * copies, (slot + 1) * copies) for slot in (source, target))
        for layer in self.cache.layers:
            layer.keys[there, :, : self.places.length] = layer.keys[here, :, : self.places.length]
            layer.values[there, :, : self.places.length] = layer.values[here, :, : self.places.length]


class Noise:
    """Noise for the coming steps, of a generator of its own for each slot.

    It is drawn on the CPU, a row of ids a step, as the plain loop draws it, so that a seed is the same sample on every
    device. For a GPU it is drawn ahead into pinned memory while the steps before are at work.

    Args:
        slots: where it goes.
    """

    def __init__(self, slots: Slots):
        self.target = slots.noise
        self.generators: list[torch.Generator | None] = [None] * slots.shape[0]
        self._ahead = self.target.device.type != "cpu"
        pinned = {"pin_memory": self.target.device.type == "cuda"}
        # Two, since one may still be on its way while the other is filled.
        self._buffers = [torch.empty(self.target.shape, **pinned) for _ in range(2)] if self._ahead else [self.target]
        self._drawn: set[int] = set()

    def begin(self, slot: int, seed: int) -> None:
        self.generators[slot] = torch.Generator().manual_seed(seed)
        self._drawn.discard(slot)

    def move(self, source: int, target: int) -> None:
        self.generators[target], self.generators[source] = self.generators[source], None
        self._drawn.discard(target)
        if source in self._drawn:
            self._drawn.remove(source)
            self._drawn.add(target)
            self._buffers[0][:, target] = self._buffers[0][:, source]

    def end(self, slot: int) -> None:
        self.generators[slot] = None
        self._drawn.discard(slot)

    def ready(self) -> None:
        """Sees to it that the slots' noise is that of the next steps."""
        self._draw()
        self._drawn.clear()
        if self._ahead:
            self.target.copy_(self._buffers[0], non_blocking=True)
            self._buffers.reverse()

    def ahead(self) -> None:
        """Uses the time in which the device is busy."""
        if self._ahead:
            self._draw()

    def _draw(self) -> None:
        for slot, generator in enumerate(self.generators):
            if generator is not None and slot not in self._drawn:
                for row in self._buffers[0]:
                    row[slot].exponential_(generator=generator)
                self._drawn.add(slot)


Step = Callable[[Slots], None]


# --- a step -----------------------------------------------------------------------------------------------------------


def score(model: EvatokForCausalLM, slots: Slots) -> torch.Tensor:
    """One pass of the network -> (S, V) logits after guidance, grammar and temperature."""
    size, copies = slots.shape
    logits = model(
        input_ids=slots.token.view(-1, 1),
        attention_mask=slots.mask(),
        position_ids=slots.position.view(-1, 1),
        past_key_values=slots.cache,
        use_cache=True,
    ).logits[:, -1]  # (R, V)
    logits = logits.float().view(size, copies, -1)
    at_marker, allowed = slots.grammar.rules()
    scores = logits[:, 0]
    if copies == 2:
        where = at_marker, slots.grammar.progress
        scores = guide(scores, logits[:, 1], *where, slots.scale, slots.start, slots.guide_lengths)
    return scores.masked_fill(~allowed, -torch.inf) / slots.temperature


def choose(slots: Slots, scores: torch.Tensor) -> None:
    """Draws an id for each slot and goes on by it."""
    noise = slots.noise.index_select(0, slots.turn)[0]  # (S, V)
    drawn = (scores - noise.log()).argmax(-1)
    running = slots.grammar.running
    slots.drawn.scatter_(1, slots.count[:, None], torch.where(running, drawn, slots.pad)[:, None])
    slots.grammar.take(drawn)
    slots.count.add_(running.long())
    slots.position.add_(slots.grammar.running.long()[:, None])
    slots.token.copy_(drawn[:, None].expand_as(slots.token))
    slots.turn.add_(1)


def step(model: EvatokForCausalLM, slots: Slots, warpers: LogitsProcessorList) -> None:
    """One id for each slot."""
    choose(slots, warpers(None, score(model, slots)))


def whole(model: EvatokForCausalLM, slots: Slots) -> None:
    """The same without warpers."""
    choose(slots, score(model, slots))


# --- compiled steps ---------------------------------------------------------------------------------------------------


class _Entry:
    """Compiled functions for one shape, and the slots of the last call, which CUDA graphs were recorded with."""

    def __init__(self, device: torch.device):
        # Every shape has its own code, so that one more of them is no recompilation of another.
        isolated = {"isolate_recompiles": True} if "isolate_recompiles" in _COMPILE_OPTIONS else {}
        options = {"fullgraph": True, "dynamic": False, **isolated}
        if device.type == "cuda":
            options["mode"] = "reduce-overhead"
        self.whole, self.score, self.choose = (torch.compile(part, **options) for part in (whole, score, choose))
        self.lock = threading.Lock()
        self.slots: Slots | None = None

    def step(self, model: EvatokForCausalLM, slots: Slots, warpers: LogitsProcessorList) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            if warpers:
                self.choose(slots, warpers(None, self.score(model, slots)))
            else:
                self.whole(model, slots)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"this machine cannot compile ({reason}); it needs a C++ compiler, or Triton on a GPU. Sample with "
                "implementation='static'."
            ) from error


_COMPILE_OPTIONS = inspect.signature(torch.compile).parameters
_entries: WeakKeyDictionary[EvatokForCausalLM, dict[tuple, _Entry]] = WeakKeyDictionary()
_entries_lock = threading.Lock()


@contextmanager
def _compiled(
    model: EvatokForCausalLM, shape: tuple[int, int, int], warpers: LogitsProcessorList
) -> Iterator[tuple[Slots, Step]]:
    """Slots and a compiled step of a shape (S, G, L), for one call at a time."""
    key = (*shape, model.device, model.dtype, model.config._attn_implementation)
    with _entries_lock:
        entries = _entries.setdefault(model, {})
        entry = entries.setdefault(key, _Entry(model.device))
    with entry.lock:
        for other in entries.values():  # their memory is wanted, their code is kept
            if other is not entry and other.slots is not None and other.lock.acquire(blocking=False):
                other.slots = None
                other.lock.release()
        entry.slots = entry.slots or Slots(model, *shape)
        yield entry.slots, lambda slots: entry.step(model, slots, warpers)


# --- a run ------------------------------------------------------------------------------------------------------------


class _Run:
    """N sequences through S slots."""

    def __init__(
        self,
        model: EvatokForCausalLM,
        slots: Slots,
        prompts: Sequence[Sequence[torch.Tensor]],
        seeds: Sequence[int],
        grammar: BlockGrammar,
        drawing: Drawing,
        progress: Callable[[float], None] | None,
    ):
        self.model, self.slots, self.prompts, self.seeds = model, slots, prompts, seeds
        self.grammar, self.report = grammar, progress
        self.greedy = drawing.temperature == 0
        slots.temperature.fill_(drawing.temperature or 1.0)
        slots.scale.fill_(1.0 if drawing.guidance_scale is None else drawing.guidance_scale)
        slots.start.fill_(drawing.guidance_start)
        slots.guide_lengths.fill_(drawing.guide_lengths)
        slots.noise.fill_(1.0)
        self.noise = Noise(slots)
        self.done = grammar.progress.clone()  # (N,)
        self.sequences: list[torch.Tensor | None] = [None] * len(prompts)
        self.at: list[int | None] = [None] * slots.shape[0]  # which sequence a slot has
        self.reach = [0] * slots.shape[0]  # its place, which only grows by one a step
        self.waiting = list(range(len(prompts)))[::-1]

    def finish(self, step: Step, shrink: bool) -> list[torch.Tensor]:
        """All sequences. `shrink`: whether the batch may become smaller."""
        slots = self.slots
        self._tell()
        self._begin(range(len(self.at)))
        while any(index is not None for index in self.at):
            part = slots
            if shrink:
                part = slots.first(self._compact())
                used = max(self.reach[: part.shape[0]]) + slots.chunk
                part.use(min(_aligned(used), slots.length))
            else:
                part.use(slots.length)
            self.noise.ready()
            slots.turn.zero_()
            for _ in range(slots.chunk):
                step(part)
            self.noise.ahead()
            self.reach = [reach + slots.chunk for reach in self.reach]
            self._look(part)
        return self.sequences

    def _look(self, part: Slots) -> None:
        running, share = part.grammar.running.tolist(), part.grammar.progress.cpu()
        ended = []
        for slot, index in enumerate(self.at[: part.shape[0]]):
            if index is not None:
                self.done[index] = share[slot]
                if not running[slot]:
                    ended.append(slot)
        if ended:
            drawn, counts = part.drawn[ended].cpu(), part.count[ended].tolist()
            for slot, ids, count in zip(ended, drawn, counts, strict=True):
                self.sequences[self.at[slot]] = torch.cat([self.prompts[self.at[slot]][0], ids[:count]])
                self.at[slot] = None
                self.noise.end(slot)
            self._begin(ended)
        self._tell()

    def _begin(self, free: Sequence[int]) -> None:
        """Gives free slots to those that wait."""
        slots = [slot for slot, _ in zip(free, self.waiting, strict=False)]
        if not slots:
            return
        indices = [self.waiting.pop() for _ in slots]
        prompts = [self.prompts[index] for index in indices]
        self.slots.fill_(self.model, slots, prompts, self.grammar, indices)
        for slot, index, rows in zip(slots, indices, prompts, strict=True):
            self.at[slot], self.reach[slot] = index, max(map(len, rows))
            if not self.greedy:
                self.noise.begin(slot, self.seeds[index])

    def _compact(self) -> int:
        """Moves what runs into the first slots and says how many these are."""
        count = len(self.at) - self.at.count(None)
        holes = [slot for slot in range(count) if self.at[slot] is None]
        behind = [slot for slot in range(count, len(self.at)) if self.at[slot] is not None]
        for source, target in zip(behind, holes, strict=True):
            self.slots.move_(source, target)
            self.noise.move(source, target)
            self.at[target], self.at[source] = self.at[source], None
            self.reach[target] = self.reach[source]
        return count

    def _tell(self) -> None:
        if self.report is not None:
            self.report(float(self.done.mean()))
