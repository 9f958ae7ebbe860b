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
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils._triton import has_triton
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, StaticLayer

from .configuration_evatok import LengthsLike
from .modeling_evatok_generator import BlockGrammar, EvatokForCausalLM, Prompt
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
    """The options of drawing an id from logits, arguments of `sample` of the same names.

    Raises:
        ValueError: one that is out of range.
    """

    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    guidance_start: float = 0.18
    guide_lengths: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        for name, most in (("guidance_scale", 100), ("guidance_start", 1), ("temperature", 100)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie between 0 and {most}, got {getattr(self, name)}.")
        if self.guidance_schedule not in SCHEDULES:
            raise ValueError(f"guidance_schedule must be one of {SCHEDULES}, got {self.guidance_schedule!r}.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and be at most 1, got {self.top_p}.")

    def settings(self) -> dict[str, Any]:
        """The arguments of `score`."""
        start = self.guidance_start if self.guidance_schedule == "step" else 0.0
        greedy = self.temperature == 0
        scale, temperature = float(self.guidance_scale), 1.0 if greedy else float(self.temperature)
        return {"scale": scale, "start": start, "guide_lengths": self.guide_lengths, "temperature": temperature}

    def warpers(self) -> LogitsProcessorList:
        """The logits warpers of top-k and top-p, applied to the scores that `score` returns."""
        warpers = LogitsProcessorList()
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        return warpers

    def generators(self, seeds: Sequence[int]) -> list[torch.Generator] | None:
        """A generator of noise for each seed; None at temperature 0, which takes the most likely ids."""
        return None if self.temperature == 0 else [torch.Generator().manual_seed(seed) for seed in seeds]


@dataclass
class Job:
    """The sequences that a loop shall draw.

    Attributes:
        model: the generator, on any device.
        prompts: N of them, each of one row of ids, or under guidance of two: with the condition and without.
        seeds: N of them.
        grammar: of N rows, where the prompts end; it does not change.
        drawing: how ids are drawn.
        progress: told from time to time how much is done, from 0 to 1.
    """

    model: EvatokForCausalLM
    prompts: Sequence[Sequence[torch.Tensor]]
    seeds: Sequence[int]
    grammar: BlockGrammar
    drawing: Drawing
    progress: Callable[[float], None]


def score(
    logits: torch.Tensor,
    grammar: BlockGrammar,
    scale: float | torch.Tensor,
    start: float | torch.Tensor,
    guide_lengths: bool | torch.Tensor,
    temperature: float | torch.Tensor,
) -> torch.Tensor:
    """Logits (B, G, V), after the prompt and under guidance (G = 2) after none, to scores (B, V): guidance, grammar and
    temperature. The largest score plus Gumbel noise is the sample."""
    at_marker, allowed = grammar.rules()
    scores = logits[:, 0]
    if logits.shape[1] == 2:
        without = logits[:, 1]
        on = (~at_marker | guide_lengths) & (grammar.progress >= start)
        scale = torch.where(on, scale, 1.0)[:, None]
        # At scale 1 the very logits, not what rounding makes of them.
        scores = torch.where(scale == 1, scores, without + scale * (scores - without))
    return scores.masked_fill(~allowed, -torch.inf) / temperature


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
    drawing = Drawing(guidance_scale, guidance_schedule, guidance_start, guide_lengths, temperature, top_k, top_p)
    if guidance_scale != 1 and any(p.label is None and p.condition_lengths is None for p in prompts):
        raise ValueError("guidance needs a class or a condition to guide towards; use guidance_scale 1 without.")
    if known_blocks and (known_blocks >= config.num_blocks or any(p.condition_lengths is None for p in prompts)):
        raise ValueError(f"known_blocks is {known_blocks}; give a condition, and at most {config.num_blocks - 1}.")
    rows = []
    for prompt in prompts:
        begun = torch.empty(0, dtype=torch.int64)
        if known_blocks:
            begun = codec.blocks(prompt.condition_lengths, prompt.condition_ids, known_blocks)
        asked = [prompt] if guidance_scale == 1 else [prompt, Prompt()]
        rows.append([torch.cat([codec.prompt(one), begun]) for one in asked])
    known = torch.tensor([codec.begun(row) for row, *_ in rows])
    grammar = BlockGrammar(config, len(prompts), lengths, budget, max_block_length, known)
    size = len(prompts) if batch_size is None else batch_size
    implementation = _choose(implementation, model, math.ceil(len(prompts) / size) * config.assignment_space.max_tokens)
    job = Job(model, rows, seeds, grammar, drawing, progress or (lambda done: None))
    sequences = plain(job, size) if implementation == "eager" else static(job, size, implementation == "compiled")
    return codec.to_tokens(sequences)


def _choose(implementation: str, model: EvatokForCausalLM, steps: int) -> str:
    """Chooses the loop for "auto"; any other implementation is returned as it is."""
    if implementation != "auto":
        return implementation
    # On a CPU there is no device to wait for, and the static loop was not the faster one in the one measurement so far.
    if no_static_cache(model) or model.device.type == "cpu":
        return "eager"
    worth = model.device.type == "cuda" and steps >= STEPS_WORTH_COMPILING and has_triton()
    return "compiled" if worth else "static"


# --- the plain loop ---------------------------------------------------------------------------------------------------


class _Sampler(LogitsProcessor):
    """Turns the logits of a batch, and under guidance of its unconditional half, into scores whose largest is drawn."""

    def __init__(self, job: Job, part: range):
        self.job, self.part, self.grammar = job, part, job.grammar.select(part)
        self.settings, self.warpers = job.drawing.settings(), job.drawing.warpers()
        self.generators = job.drawing.generators([job.seeds[i] for i in part])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        size = len(self.part)
        ids, copies = input_ids[:size], len(input_ids) // size
        self.grammar.advance(ids)
        logits = scores.view(copies, size, -1).transpose(0, 1)
        scores = self.warpers(ids, score(logits, self.grammar, **self.settings))
        if self.generators:
            noise = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
            scores = scores - torch.stack(noise).to(scores).log()
        done = self.part.start + size * float(self.grammar.progress.mean())
        self.job.progress(done / len(self.job.prompts))
        return scores.repeat(copies, 1)


def plain(job: Job, batch_size: int) -> list[torch.Tensor]:
    """Draws by transformers' `generate`, one batch after another -> N sequences from BOS to EOS on the CPU."""
    sequences, everything, config = [], range(len(job.prompts)), job.model.config
    for start in everything[::batch_size]:
        part = everything[start : start + batch_size]
        rows = [job.prompts[i][copy] for copy in range(len(job.prompts[0])) for i in part]  # given, then without
        padded = pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id, padding_side="left")
        out = job.model.generate(
            padded.to(job.model.device),
            logits_processor=[_Sampler(job, part)],
            max_new_tokens=config.clip_places(),
            do_sample=False,
            num_beams=1,
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
def static(job: Job, batch_size: int, compiled: bool) -> list[torch.Tensor]:
    """Draws with so many sequences at once -> N sequences from BOS to EOS on the CPU.

    A step that is `compiled` is so once for a size of batch and cache; later calls use it again.

    Raises:
        ValueError: a generator that has no static cache; a machine that cannot compile.
    """
    model, config = job.model, job.model.config
    if reason := no_static_cache(model):
        raise ValueError(f"a static cache is not for this generator: {reason}, or sample with implementation='eager'.")
    shape, warpers = (min(batch_size, len(job.prompts)), len(job.prompts[0])), job.drawing.warpers()
    # The last id, EOS, is drawn but never seen.
    needed = max(len(row) for rows in job.prompts for row in rows) + int(job.grammar.longest.max()) + config.num_blocks
    if not compiled:
        slots = Slots(model, *shape, _aligned(needed))
        return _Run(job, slots).finish(lambda: step(model, slots, warpers), shrink=True)
    with _compiled(model, (*shape, cache_length(config, needed)), warpers) as (slots, fast):
        return _Run(job, slots).finish(fast, shrink=False)


def no_static_cache(model: EvatokForCausalLM) -> str | None:
    """The reason why a generator cannot have a static cache, with the remedy; None where it can."""
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


class _Layer(StaticLayer):
    """A static layer of the cache whose rows are at places of their own, for one new id a row."""

    position: torch.Tensor  # (S, G), R of them: the place of each row
    length: int  # how much of the cache attention reads

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        row, place = torch.arange(key_states.shape[0], device=key_states.device), self.position.view(-1)
        self.keys[row, :, place] = key_states[:, :, 0].to(self.keys.dtype)  # (R, H, D); autocast may differ
        self.values[row, :, place] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self, *args: Any) -> int:
        return 0  # there is none of all rows; masks and positions are given


class Slots:
    """The rows of a batch: S sequences at once, of G rows of the network each (2 under guidance), R in all.

    Each is at a place of its own in its sequence. All of it lies on the device in tensors that keep their addresses, so
    that a compiled step can be recorded once as a CUDA graph and played again for other sequences.

    Args:
        model: gives sizes, device and dtype.
        slots: S.
        copies: G.
        length: places L of the cache.
    """

    def __init__(self, model: EvatokForCausalLM, slots: int, copies: int, length: int):
        config, device = model.config, model.device
        self.copies, self.length, self.pad = copies, length, config.pad_token_id
        self.chunk = CPU_CHUNK if device.type == "cpu" else CHUNK
        self.grammar = BlockGrammar(config, slots).to(device)
        self.token = torch.full((slots, copies), self.pad, device=device)  # what the network sees next
        self.position = torch.zeros(slots, copies, dtype=torch.int64, device=device)  # and its place
        # Ids drawn after the prompt; those that have ended write into the last column.
        self.drawn = torch.full((slots, config.clip_places() + 1), self.pad, device=device)
        self.count = torch.zeros(slots, dtype=torch.int64, device=device)  # of them
        # (S, chunk, V) of the standard exponential distribution; ones draw the most likely id.
        self.noise = torch.ones(slots, self.chunk, config.vocab_size, device=device)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)  # which noise is next
        # Tensors, so that other settings need no other code.
        self.settings = {name: torch.tensor(value, device=device) for name, value in Drawing().settings().items()}
        self.seen = torch.arange(length, device=device)  # (L,)
        self.cache = Cache(layers=[_Layer(length) for _ in range(config.num_hidden_layers)])
        one = torch.empty(
            slots * copies, config.num_key_value_heads, 0, config.head_dim, device=device, dtype=model.dtype
        )
        for layer in self.cache.layers:
            layer.lazy_initialization(one, one)
        for values in (vars(self), self.settings, vars(self.grammar)):
            for value in values.values():
                if isinstance(value, torch.Tensor):
                    torch._dynamo.mark_static_address(value)
        self.use(length)

    def use(self, length: int) -> None:
        """Attention reads the first `length` places of the cache."""
        self.used = length
        for layer in self.cache.layers:
            layer.position, layer.length = self.position, length

    def select_(self, slots: Sequence[int]) -> None:
        """Keeps these slots alone, as slots 0, 1, .."""
        for name in ("token", "position", "drawn", "count", "noise"):
            setattr(self, name, getattr(self, name)[slots])
        self.grammar = self.grammar.select(slots)
        rows = self.rows(slots)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def rows(self, slots: Sequence[int]) -> list[int]:
        """The network's rows of these slots."""
        return [slot * self.copies + copy for slot in slots for copy in range(self.copies)]

    def mask(self) -> torch.Tensor:
        """(R, 1, 1, length), added to scores: each row sees its own sequence and nothing behind it."""
        hidden, dtype = self.seen[: self.used] > self.position.view(-1, 1), self.cache.layers[0].keys.dtype
        return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[:, None, None]

    def fill_(self, job: Job, slots: Sequence[int], indices: Sequence[int]) -> None:
        """Begins sequences of a job in slots.

        All ids of a prompt but the last, which is the first step's, go through the network at once, padded on the
        right: causal attention never sees the padding, and what it leaves in the cache is hidden until it is written
        over.
        """
        ids = [row for index in indices for row in job.prompts[index]]
        places, device = self.rows(slots), self.token.device
        before = pad_sequence([row[:-1] for row in ids], batch_first=True, padding_value=self.pad).to(device)
        past = DynamicCache(config=job.model.config)
        job.model.model(input_ids=before, past_key_values=past, use_cache=True)
        for layer, done in zip(self.cache.layers, past.layers, strict=True):
            layer.keys[places, :, : before.shape[1]] = done.keys.to(layer.keys.dtype)
            layer.values[places, :, : before.shape[1]] = done.values.to(layer.values.dtype)
        self.token[slots] = torch.stack([row[-1] for row in ids]).view(-1, self.copies).to(device)
        self.position[slots] = torch.tensor([len(row) - 1 for row in ids], device=device).view(-1, self.copies)
        self.drawn[slots] = self.pad
        self.count[slots] = 0
        self.grammar.copy_rows_(slots, job.grammar, indices)


# --- a step -----------------------------------------------------------------------------------------------------------


def look(model: EvatokForCausalLM, slots: Slots) -> torch.Tensor:
    """Passes the last ids through the network -> (S, V) scores of the next ones."""
    logits = model(
        input_ids=slots.token.view(-1, 1),
        attention_mask=slots.mask(),
        position_ids=slots.position.view(-1, 1),
        past_key_values=slots.cache,
        use_cache=True,
    ).logits[:, -1]  # (R, V)
    return score(logits.float().view(*slots.token.shape, -1), slots.grammar, **slots.settings)


def choose(slots: Slots, scores: torch.Tensor) -> None:
    """Draws an id for each slot and goes on by it."""
    noise = slots.noise.index_select(1, slots.turn)[:, 0]  # (S, V)
    drawn = (scores - noise.log()).argmax(-1)
    running = slots.grammar.running
    slots.drawn.scatter_(1, slots.count[:, None], torch.where(running, drawn, slots.pad)[:, None])
    slots.grammar.take(drawn)
    slots.count.add_(running.long())
    slots.position.add_(slots.grammar.running.long()[:, None])
    slots.token.copy_(drawn[:, None].expand_as(slots.token))
    slots.turn.add_(1)


def step(model: EvatokForCausalLM, slots: Slots, warpers: LogitsProcessorList) -> None:
    """Draws one id for each slot."""
    choose(slots, warpers(None, look(model, slots)))


def whole(model: EvatokForCausalLM, slots: Slots) -> None:
    """Draws one id for each slot without warpers, as one function to compile."""
    choose(slots, look(model, slots))


# --- compiled steps ---------------------------------------------------------------------------------------------------


class _Entry:
    """Compiled functions for one shape, and the slots of the last call, which CUDA graphs were recorded with."""

    def __init__(self, device: torch.device):
        # Every shape has its own code, so that one more of them is no recompilation of another.
        isolated = {"isolate_recompiles": True} if "isolate_recompiles" in _COMPILE_OPTIONS else {}
        options = {"fullgraph": True, "dynamic": False, **isolated}
        if device.type == "cuda":
            options["mode"] = "reduce-overhead"
        self.whole, self.look, self.choose = (torch.compile(part, **options) for part in (whole, look, choose))
        self.lock = threading.Lock()
        self.slots: Slots | None = None

    def step(self, model: EvatokForCausalLM, slots: Slots, warpers: LogitsProcessorList) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            if warpers:
                self.choose(slots, warpers(None, self.look(model, slots)))
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
) -> Iterator[tuple[Slots, Callable[[], None]]]:
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
        yield entry.slots, lambda: entry.step(model, entry.slots, warpers)


# --- a run ------------------------------------------------------------------------------------------------------------


class _Run:
    """Draws N sequences in S slots.

    Noise is drawn on the CPU, a row of ids a step, as the plain loop draws it, so that a seed is the same sample on
    every device. For a GPU it is drawn ahead, into pinned memory, while the steps before are at work.
    """

    def __init__(self, job: Job, slots: Slots):
        self.job, self.slots, count = job, slots, len(job.prompts)
        for name, value in job.drawing.settings().items():
            slots.settings[name].fill_(value)
        slots.noise.fill_(1.0)
        self.generators = job.drawing.generators(job.seeds)
        self.ahead: dict[int, torch.Tensor] = {}  # the noise of a sequence's next steps, (chunk, V)
        self.done = job.grammar.progress.clone()  # (N,)
        self.sequences: list[torch.Tensor | None] = [None] * count
        self.reach = [max(map(len, rows)) for rows in job.prompts]  # the place of each, which only grows by one a step
        self.at: list[int | None] = [None] * len(slots.count)  # which sequence a slot has
        self.waiting = iter(range(count))

    def finish(self, step: Callable[[], None], shrink: bool) -> list[torch.Tensor]:
        """Draws all sequences by steps. `shrink`: whether the batch may become smaller."""
        slots = self.slots
        slots.use(slots.length)
        self.job.progress(float(self.done.mean()))
        self._begin(range(len(self.at)))
        while running := [slot for slot, index in enumerate(self.at) if index is not None]:
            if shrink:
                if len(running) < len(self.at):
                    slots.select_(running)
                    self.at = [self.at[slot] for slot in running]
                slots.use(min(_aligned(max(self.reach[index] for index in self.at) + slots.chunk), slots.length))
            self._bring_noise()
            slots.turn.zero_()
            for _ in range(slots.chunk):
                step()
            for index in self.at:
                if index is not None:
                    self.reach[index] += slots.chunk
                    if self.generators and slots.noise.device.type != "cpu":
                        self.ahead[index] = self._draw_noise(index)
            self._look()
        return self.sequences

    def _bring_noise(self) -> None:
        for slot, index in enumerate(self.at if self.generators else ()):
            if index is not None:
                noise = self.ahead.pop(index) if index in self.ahead else self._draw_noise(index)
                self.slots.noise[slot].copy_(noise, non_blocking=True)

    def _draw_noise(self, index: int) -> torch.Tensor:
        _, chunk, size = self.slots.noise.shape
        noise = torch.empty(chunk, size, pin_memory=self.slots.noise.device.type == "cuda")
        for row in noise:
            row.exponential_(generator=self.generators[index])
        return noise

    def _look(self) -> None:
        """Sees which sequences have ended, and begins others in their slots."""
        slots = self.slots
        running, share, ended = slots.grammar.running.tolist(), slots.grammar.progress.cpu(), []
        for slot, index in enumerate(self.at):
            if index is not None:
                self.done[index] = share[slot]
                if not running[slot]:
                    ended.append(slot)
        if ended:
            drawn, counts = slots.drawn[ended].cpu(), slots.count[ended].tolist()
            for slot, ids, count in zip(ended, drawn, counts, strict=True):
                index, self.at[slot] = self.at[slot], None
                self.sequences[index] = torch.cat([self.job.prompts[index][0], ids[:count]])
            self._begin(ended)
        self.job.progress(float(self.done.mean()))

    def _begin(self, free: Sequence[int]) -> None:
        """Gives free slots to those that wait."""
        begun = dict(zip(free, self.waiting, strict=False))
        if begun:
            self.slots.fill_(self.job, list(begun), list(begun.values()))
        for slot, index in begun.items():
            self.at[slot] = index
