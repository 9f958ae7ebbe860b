"""The fast way to draw sequences: a static cache, no waiting for the device, and rows that are used again.

`sample` of `sampling_evatok` says what is drawn; `generate` of transformers, one batch after another, is the plain
reference, and this draws the same ids from the same seeds. A sequence that ends makes room in the batch for the next
one that waits; when none waits, an uncompiled batch becomes smaller. What a step needs lies on the device, the state of
the grammar included, and the host looks only every few steps whether sequences have ended. A step is one function
without branches on data, which `torch.compile` takes as a whole.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessorList

from .decoding_state_evatok import Noise, Slots
from .grammar_evatok import BlockGrammar
from .modeling_evatok_generator import EvatokGenerator

# What attention reads of the cache is a multiple of it long; kernels want aligned masks.
ALIGNMENT = 64
ATTENTION = ("sdpa", "eager")

Step = Callable[[Slots], None]


@dataclass
class Drawing:
    """How ids are drawn from logits; see `sampling_evatok.sample`.

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


@torch.no_grad()
def decode(
    model: EvatokGenerator,
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


def no_static_cache(model: EvatokGenerator) -> str | None:
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


# --- a step -----------------------------------------------------------------------------------------------------------


def score(model: EvatokGenerator, slots: Slots) -> torch.Tensor:
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


def step(model: EvatokGenerator, slots: Slots, warpers: LogitsProcessorList) -> None:
    """One id for each slot."""
    choose(slots, warpers(None, score(model, slots)))


def whole(model: EvatokGenerator, slots: Slots) -> None:
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

    def step(self, model: EvatokGenerator, slots: Slots, warpers: LogitsProcessorList) -> None:
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
_entries: WeakKeyDictionary[EvatokGenerator, dict[tuple, _Entry]] = WeakKeyDictionary()
_entries_lock = threading.Lock()


@contextmanager
def _compiled(
    model: EvatokGenerator, shape: tuple[int, int, int], warpers: LogitsProcessorList
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
        model: EvatokGenerator,
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
