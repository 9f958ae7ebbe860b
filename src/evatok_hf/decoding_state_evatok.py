"""What a step of decoding reads and writes: rows of a batch, each at a place of its own in its sequence.

All of it lies on the device in tensors that keep their addresses, so that a compiled step can be recorded once as a
CUDA graph and played again for other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer

from .grammar_evatok import ROWS, BlockGrammar
from .modeling_evatok_generator import EvatokGenerator

# Steps between two looks whether rows have ended. On a GPU the host runs ahead meanwhile; on a CPU a look costs
# nothing, and a row that has ended costs as much as one that runs.
CHUNK, CPU_CHUNK = 16, 1


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

    def __init__(self, model: EvatokGenerator, slots: int, copies: int, length: int):
        config, device = model.config, model.device
        self.shape, self.length, self.pad = (slots, copies), length, config.pad_token_id
        self.most = config.assignment_space.max_tokens + config.num_blocks + 1
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
        model: EvatokGenerator,
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
