"""EvatokForCausalLM, the generator: an autoregressive model of videos as token sequences (paper, section 4).

The grammar of those sequences stands here too: `BlockTable` says what may follow what, `SequenceCodec` writes and reads
clips, `BlockGrammar` masks what may not be drawn.

Its network is transformers' Llama, unchanged: conditions, lengths and codes are ids of one vocabulary, so the weights
load in anything that serves a Llama (`to_llama`). It decides the length of every block itself. `generate` is
transformers' method with the block grammar always on, so that every sample decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMode

from .base_evatok import CheckedWeights
from .configuration_evatok import EvatokGeneratorConfig, LengthsLike
from .tokens_evatok import VideoTokens, check_is_tokens

# --- what may stand where ---------------------------------------------------------------------------------------------


# A sequence is
#
#     BOS class [condition SEP] block_1 .. block_T EOS
#
# where class may be the null class, and the condition of frame prediction is a clip of blocks, too. In the layout
# "length-first" a block of k codes is `LEN_k code_1 .. code_k`; in "end-of-block" it is `code_1 .. code_k EOB`. Both
# are our choice: the paper does not say how its sequences are delimited.

CODE = 0  # the symbol of every code
_NEVER, _ANY = (1 << 40, -1), (0, 1 << 40)  # bounds that no length keeps, and that every length does


class BlockTable:
    """The one table of what may stand where in a clip. Sequences are written, read and masked by it.

    It sees ids as symbols: `CODE` for every code, 1 to m for the m markers, then one each for BOS, EOS, padding and
    separator, and one for all classes. Symbols but for `CODE` have the order of ids.

    Attributes:
        spelled: the symbols of a block, by its length. All else follows from these.
        steps: [state][symbol] -> the next state; the fewest and the most codes that the block then comes to have from
            here on. State 0 is the beginning of a block, `end` that of EOS, `over` what comes after it.
        after, fewest, most: the same as tensors (states, symbols).
        codes_left: (states,) codes of the block that are still to come, where nothing else is; 0 elsewhere.
        symbols: (V,) the symbol of every id.
    """

    def __init__(self, layout: str, block_lengths: Sequence[int], codebook_size: int, vocab_size: int):
        if layout == "length-first":
            self.markers = len(block_lengths)
            self.spelled = {n: bytes([1 + index, *bytes(n)]) for index, n in enumerate(block_lengths)}
        else:
            self.markers = 1
            self.spelled = {n: bytes([*bytes(n), 1]) for n in block_lengths}
        self.bos, self.eos, self.pad, self.separator, self.any_class = range(self.markers + 1, self.markers + 6)
        # A state is what may still come of a block: the rests of all spellings that begin as it has begun.
        states = [frozenset(self.spelled.values())]
        numbers = {states[0]: 0}
        found: list[dict[int, tuple[int, int, int]]] = []
        for rests in states:  # which grows meanwhile
            found.append({})
            for symbol in {rest[0] for rest in rests}:
                tails = frozenset(rest[1:] for rest in rests if rest[0] == symbol)
                counts = [tail.count(CODE) + (symbol == CODE) for tail in tails]
                if tails != {b""} and tails not in numbers:
                    numbers[tails] = len(states)
                    states.append(tails)
                found[-1][symbol] = (numbers.get(tails, 0), min(counts), max(counts))
        self.end, self.over = len(states), len(states) + 1
        found += [{self.eos: (self.over, *_ANY)}, {self.pad: (self.over, *_ANY)}]
        # What may not come changes nothing.
        self.steps = [
            [row.get(symbol, (state, *_NEVER)) for symbol in range(self.any_class + 1)]
            for state, row in enumerate(found)
        ]
        left = [len(next(iter(rests))) if len(rests) == 1 and not any(*rests) else 0 for rests in states]
        with torch.device("cpu"):
            self.after, self.fewest, self.most = torch.tensor(self.steps).unbind(-1)
            self.codes_left = torch.tensor([*left, 0, 0])
            self.symbols = (torch.arange(vocab_size) - codebook_size + 1).clamp(CODE, self.any_class)


_cached_table = lru_cache(maxsize=16)(BlockTable)


def table_of(config: EvatokGeneratorConfig) -> BlockTable:
    """The table of a generator's vocabulary and layout, made once."""
    return _cached_table(config.layout, tuple(config.block_lengths), config.codebook_size, config.vocab_size)


# --- sequences --------------------------------------------------------------------------------------------------------


class TokenKind(IntEnum):
    """The kind of a place of a sequence."""

    PROMPT = 0  # given: BOS, class, condition, separator
    MARKER = 1  # a length, or the end of a block
    CODE = 2
    END = 3


@dataclass
class Prompt:
    """A request for a clip: its class and the condition of frame prediction.

    Attributes:
        label: class index, None for no class.
        condition_lengths: (T,) lengths of the condition of frame prediction, None without one.
        condition_ids: (N,) its codes.
    """

    label: int | None = None
    condition_lengths: torch.Tensor | None = None
    condition_ids: torch.Tensor | None = None


class SequenceCodec:
    """Turns clips into sequences and sequences into clips, for the vocabulary and layout of a configuration."""

    def __init__(self, config: EvatokGeneratorConfig):
        self.config, self.space, self.table = config, config.assignment_space, table_of(config)

    def blocks(self, lengths: LengthsLike, ids: torch.Tensor, count: int | None = None) -> torch.Tensor:
        """The blocks of a clip with their markers.

        Args:
            lengths: (T,) tokens of each block.
            ids: (N,) codes, block after block.
            count: only the first `count` blocks.

        Returns:
            (N + T,) int64 on the CPU.

        Raises:
            ValueError: lengths outside the assignment space, another number of ids, ids that are no codes.
        """
        lengths = self.space.validate(lengths)
        ids = torch.as_tensor(ids).to("cpu", torch.int64)
        if lengths.ndim != 1 or ids.ndim != 1 or len(ids) != int(lengths.sum()):
            raise ValueError(
                f"a sequence is one clip of {int(lengths.sum())} ids in one row, got ids of {tuple(ids.shape)}."
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.codebook_size:
            raise ValueError(
                f"ids must lie in 0..{self.config.codebook_size - 1}, got {int(ids.min())} to {int(ids.max())}; this "
                "generator belongs to a tokenizer with another codebook."
            )
        written = lengths[:count].tolist()
        symbols = torch.tensor([symbol for n in written for symbol in self.table.spelled[n]], dtype=torch.int64)
        sequence = symbols - 1 + self.config.first_marker_id
        sequence[symbols == CODE] = ids[: sum(written)]
        return sequence

    def marker(self, length: int) -> int:
        """The id that marks a block of that many codes."""
        return self.config.first_marker_id + max(self.table.spelled[length]) - 1

    def prompt(self, prompt: Prompt) -> torch.Tensor:
        """The ids before a generated clip, int64 on CPU. Raises ValueError for a class or condition that is none."""
        start = torch.tensor([self.config.bos_token_id, self.config.class_id(prompt.label)])
        if prompt.condition_lengths is None:
            return start
        separator = torch.tensor([self.config.separator_token_id])
        return torch.cat([start, self.blocks(prompt.condition_lengths, prompt.condition_ids), separator])

    def encode(self, lengths: LengthsLike, ids: torch.Tensor, prompt: Prompt | None = None) -> torch.Tensor:
        """The whole sequence of a clip, int64 on the CPU. Arguments and errors as `blocks` and `prompt`."""
        end = torch.tensor([self.config.eos_token_id])
        return torch.cat([self.prompt(prompt or Prompt()), self.blocks(lengths, ids), end])

    def decode(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The lengths (T,) and ids (N,) of the clip of a whole sequence, which may be padded on either side.

        Raises:
            ValueError: a sequence that is none of `encode`; the message says where it goes wrong.
        """
        ids, symbols, start, lengths = self._read(sequence)
        return torch.tensor(lengths), ids[start:][symbols[start:] == CODE]

    def describe(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Describes each place of a sequence by its `TokenKind` and its block (T for places outside blocks).

        Returns:
            (L,) int64 each, for the sequence without padding.

        Raises:
            ValueError: as `decode`.
        """
        _, symbols, start, lengths = self._read(sequence)
        kinds = torch.where(symbols == CODE, int(TokenKind.CODE), int(TokenKind.MARKER))
        kinds[:start], kinds[-1] = TokenKind.PROMPT, TokenKind.END
        outside = self.space.num_blocks
        sizes = [start, *(len(self.table.spelled[length]) for length in lengths), 1]
        return kinds, torch.tensor([outside, *range(outside), outside]).repeat_interleave(torch.tensor(sizes))

    def begun(self, prompt: torch.Tensor) -> list[int]:
        """The lengths of the blocks that a prompt holds already after class and condition, often none.

        Raises:
            ValueError: something else than a prompt and whole blocks.
        """
        return self._read(prompt, whole=False)[-1]

    def _read(self, sequence: torch.Tensor, whole: bool = True) -> tuple[torch.Tensor, torch.Tensor, int, list[int]]:
        """The ids without padding, their symbols, where the clip begins and the lengths of its blocks, all T of them
        unless it is not `whole`."""
        table, total = self.table, self.space.num_blocks
        ids = torch.as_tensor(sequence).to("cpu", torch.int64)
        ids = ids[ids != self.config.pad_token_id]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(table.symbols):
            raise ValueError(
                f"a sequence has ids in 0..{len(table.symbols) - 1}, got {int(ids.min())} to {int(ids.max())}."
            )
        symbols = table.symbols[ids]
        text = bytes(symbols.tolist())
        start = 2
        if text[:start] != bytes([table.bos, table.any_class]):
            raise ValueError(
                f"a sequence begins with {self.config.bos_token_id} (BOS) and a class, not with {ids[:2].tolist()}."
            )
        lengths, at = self._clip(text, start)
        if len(lengths) == total and text[at : at + 1] == bytes([table.separator]):  # that was the condition
            start = at + 1
            lengths, at = self._clip(text, start)
        if text[at:] == (bytes([table.eos]) if whole else b"") and (len(lengths) == total or not whole):
            return ids, symbols, start, lengths
        if len(lengths) == total:
            raise ValueError(f"after {total} blocks, at place {at}, a sequence has one EOS or, of a condition, SEP.")
        raise ValueError(
            f"block {len(lengths)}, from place {at} on, is not {', '.join(map(str, table.spelled))} codes and a marker."
        )

    def _clip(self, text: bytes, at: int) -> tuple[list[int], int]:
        """The lengths of the blocks, at most T, that begin there, and where they end."""
        lengths: list[int] = []
        while len(lengths) < self.space.num_blocks:
            spelled = ((n, block) for n, block in self.table.spelled.items() if text.startswith(block, at))
            length, block = next(spelled, (None, b""))
            if length is None:
                break
            lengths.append(length)
            at += len(block)
        return lengths, at

    def from_tokens(self, tokens: VideoTokens, labels: list[int | None] | None = None) -> list[torch.Tensor]:
        """The sequences of all clips of `VideoTokens`. Raises ValueError as `encode`, or without a label each."""
        check_is_tokens(tokens)
        labels = [None] * len(tokens) if labels is None else labels
        if len(labels) != len(tokens):
            raise ValueError(f"{len(tokens)} clips but {len(labels)} labels; give one a clip.")
        parts = tokens.ids.split(tokens.lengths.sum(-1).tolist())
        return [
            self.encode(row, ids, Prompt(label))
            for row, ids, label in zip(tokens.lengths.cpu(), parts, labels, strict=True)
        ]

    def to_tokens(self, sequences: list[torch.Tensor] | torch.Tensor) -> VideoTokens:
        """The `VideoTokens` of sequences, for the generator's tokenizer. Raises ValueError as `decode`."""
        clips = [self.decode(sequence) for sequence in sequences]
        ids, lengths = torch.cat([ids for _, ids in clips]), torch.stack([lengths for lengths, _ in clips])
        return VideoTokens(ids, lengths, fingerprint=self.config.tokenizer_fingerprint)


# --- grammar ----------------------------------------------------------------------------------------------------------


# Only what can become a video may be generated. The grammar keeps a small state a row, on the device of the ids, and
# forbids every id that would break a sequence: markers where a block begins (or where it may end), codes inside, EOS
# after T blocks, padding after it. So every sample decodes, whatever the weights, the temperature or top-k. Lengths may
# be forced, limited by block, or limited by a budget over the clip, which is never passed (our choices; no source
# limits its budgets).

# What is kept of each row.
ROWS = ("fewest", "most", "later", "left", "block", "inside", "state")


class BlockGrammar(LogitsProcessor):
    """A logits processor that masks the logits of a batch that is generated from prompts, one step at a time.

    Args:
        config: of the generator.
        batch_size: rows B.
        lengths: (T,) or (B, T): forces these lengths; 0 leaves a block free.
        budget: most codes of a clip.
        max_block_length: most codes of a block.
        known: (B, n): the lengths of the blocks that the prompts already hold after their condition; 0 where a row has
            fewer of them than others.

    Raises:
        ValueError: lengths that are no candidates, a budget under the shortest assignment or under what the forced
            lengths need, a maximum under the shortest candidate.
    """

    def __init__(
        self,
        config: EvatokGeneratorConfig,
        batch_size: int,
        lengths: LengthsLike | None = None,
        budget: int | None = None,
        max_block_length: int | None = None,
        known: torch.Tensor | None = None,
    ):
        space, table = config.assignment_space, table_of(config)
        self.table, self.num_blocks = table, space.num_blocks
        limit = space.block_lengths[-1]
        if max_block_length is not None:
            allowed = [length for length in space.block_lengths if length <= max_block_length]
            if not allowed:
                raise ValueError(
                    f"max_block_length is {max_block_length}, but the shortest block has {space.block_lengths[0]}."
                )
            limit = allowed[-1]
        # (B, T) 0 where a block is free
        given = torch.zeros(batch_size, self.num_blocks, dtype=torch.int64)
        if lengths is not None:
            free = torch.as_tensor(lengths).cpu() == 0
            filled = torch.where(free, space.block_lengths[0], torch.as_tensor(lengths).cpu())
            given = space.validate(filled, batch_size).masked_fill(free, 0)
        if (given > limit).any():
            raise ValueError(f"lengths {given.max()} contradict max_block_length {max_block_length}; give one of them.")
        known = torch.zeros(batch_size, 0) if known is None else known
        known = F.pad(known.to("cpu", torch.int64), (0, self.num_blocks - known.shape[1]))
        given = torch.where(known > 0, known, given)
        # (B, T) bounds of each block, and the least that the blocks after it take
        self.fewest = torch.where(given > 0, given, space.block_lengths[0])
        self.most = torch.where(given > 0, given, limit)
        least = self.fewest.sum(-1, keepdim=True)
        self.later = least - self.fewest.cumsum(-1)
        if budget is not None and int(least.max()) > budget:
            raise ValueError(
                f"a budget of {budget} tokens is too small: with these lengths a clip takes at least {least.max()}."
            )
        budget = space.max_tokens if budget is None else budget
        self.longest = self.most.sum(-1).clamp_max(budget)  # (B,) the most codes that a clip can come to have
        self.left = budget - known.sum(-1)  # (B,) of which so many are left for the block under way and those after it
        self.block = (known > 0).sum(-1)  # (B,) under way; T after the last
        self.inside = torch.zeros(batch_size, dtype=torch.int64)  # codes of it so far
        self.state = torch.where(self.block < self.num_blocks, 0, table.end)  # of the table
        self.symbols, self.codes_left = table.symbols, table.codes_left
        self.after, self.fewest_after, self.most_after = table.after, table.fewest, table.most
        self._seen: int | None = None

    @property
    def at_marker(self) -> torch.Tensor:
        """True for rows whose next token decides a length, (B,) bool."""
        return self.rules()[0]

    @property
    def progress(self) -> torch.Tensor:
        """The share of each clip's time that is done, (B,) 0 to 1; a block under way counts if its length is known."""
        left = self.codes_left[self.state]
        within = torch.where(left > 0, self.inside / (self.inside + left).clamp_min(1), 0.0)
        return ((self.block + within) / self.num_blocks).clamp_max(1)

    @property
    def running(self) -> torch.Tensor:
        """True for rows that have not had their EOS yet, (B,) bool."""
        return self.state != self.table.over

    def to(self, device: torch.device) -> BlockGrammar:
        """Moves the state to a device, where it stays."""
        for name in ("symbols", "codes_left", "after", "fewest_after", "most_after", *ROWS):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def copy_rows_(self, rows: torch.Tensor | Sequence[int], other: BlockGrammar, others: Sequence[int]) -> None:
        """Takes the state of rows of another grammar of the same configuration into rows of this one, in place."""
        for name in ROWS:
            mine = getattr(self, name)
            mine[rows] = getattr(other, name)[others].to(mine.device)

    def end_within_(self, new_tokens: int) -> None:
        """Lowers the budgets so that each clip, with its markers and EOS, takes at most so many tokens from here on.

        Raises:
            ValueError: fewer tokens than a clip takes.
        """
        others = self.num_blocks - self.block + 1  # (B,) markers and EOS
        to_come = torch.arange(self.num_blocks, device=self.block.device) >= self.block[:, None]
        least = int((self.fewest.where(to_come, 0).sum(-1) + others).max())
        if new_tokens < least:
            raise ValueError(
                f"no whole clip fits in {new_tokens} new tokens; it takes at least {least}, which max_new_tokens (or "
                "max_length, with the prompt) must allow."
            )
        self.left.clamp_(max=new_tokens - others)

    def select(self, rows: torch.Tensor | Sequence[int]) -> BlockGrammar:
        """A grammar of these rows, in this order, any of them more than once."""
        part = copy(self)
        for name in ROWS:
            setattr(part, name, getattr(self, name)[rows])
        return part

    def advance(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Takes in the last token of each row (B, L) and says what may follow: (B, V) bool on the same device."""
        if self.block.device != input_ids.device:
            self.to(input_ids.device)
        if self._seen is not None:
            if input_ids.shape[1] != self._seen + 1:
                raise ValueError("BlockGrammar follows one generation, token by token; make a new one for each.")
            self.take(input_ids[:, -1])
        self._seen = input_ids.shape[1]
        return self.rules()[1]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.masked_fill(~self.advance(input_ids), -torch.inf)

    def take(self, last: torch.Tensor) -> None:
        """Goes on by a token of each row (B,). The state changes in place, and nothing waits for the device."""
        symbols = self.symbols[last]
        state = self.after[self.state, symbols]
        done = (state == 0) & (self.state != 0)
        self.inside.add_((symbols == CODE).long())
        self.left.sub_(torch.where(done, self.inside, 0))
        self.inside.masked_fill_(done, 0)
        self.block.add_(done.long())
        self.state.copy_(torch.where(done & (self.block == self.num_blocks), self.table.end, state))

    def rules(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two bool masks for the next token of each row: it decides a length (B,), and the ids it may be (B, V)."""
        at = self.block.clamp_max(self.num_blocks - 1)[:, None]
        fewest = self.fewest.gather(1, at)  # (B, 1) codes of the block under way
        most = torch.minimum(self.most.gather(1, at), self.left[:, None] - self.later.gather(1, at)).maximum(fewest)
        # (B, symbols) those that it can still come to have with each symbol
        fewest = fewest.maximum(self.inside[:, None] + self.fewest_after[self.state])
        most = most.minimum(self.inside[:, None] + self.most_after[self.state])
        allowed = fewest <= most
        return allowed[:, 1 : self.table.markers + 1].any(-1), allowed[:, self.symbols]


# --- the model --------------------------------------------------------------------------------------------------------


def _numbers(value: int | Sequence[int] | torch.Tensor | None) -> set[int]:
    """The numbers of an option of `generate`, which may be one, several or none."""
    return set() if value is None else set(torch.as_tensor(value).flatten().tolist())


class EvatokForCausalLM(CheckedWeights, LlamaForCausalLM):
    """The generator of videos as tokens. `forward` is that of `LlamaForCausalLM`, on sequences that `codec` writes."""

    config_class = EvatokGeneratorConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: EvatokGeneratorConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"

    @property
    def codec(self) -> SequenceCodec:
        return SequenceCodec(self.config)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        *,
        lengths: LengthsLike | None = None,
        budget: int | None = None,
        max_block_length: int | None = None,
        **kwargs,
    ):
        """Generates whole sequences, each of which `codec.to_tokens` turns into a clip.

        All options of transformers' `generate` hold, from `generation_config`, keywords or `self.generation_config`,
        but for beams and the like, and for those that cut sequences or forbid what must come; `suppress_tokens` and its
        kin may forbid codes, though not all. `max_new_tokens` and `max_length` are limits as there; the grammar keeps
        to them as to a budget, so that the sequence ends with EOS before. Without a limit the longest clip has room.

        Args:
            inputs: (B, L) prompts (`codec.prompt`), padded on the left, perhaps with the first blocks of the clip
                (`codec.blocks`); None begins with BOS and no class.
            generation_config: options of transformers.
            logits_processor: applied after the grammar; a list that has a `BlockGrammar` of its own is used as it is.
            lengths, budget, max_block_length: see `BlockGrammar`.

        Returns:
            (B, L') ids, or what transformers returns with `return_dict_in_generate`.

        Raises:
            ValueError: inputs that are no prompts; a limit that no whole clip fits in; beams and other ways to generate
                that the grammar does not follow; options that do not go with whole clips; and as `BlockGrammar`.
        """
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        if inputs is None:
            inputs = torch.tensor([[self.config.bos_token_id, self.config.null_class_id]], device=self.device)
        # Before transformers puts its own default, which is not ours, in the place of none.
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        max_length = [kwargs.get("max_length"), *(config.max_length for config in configs)]
        options, kwargs = self._prepare_generation_config(generation_config, **kwargs)
        mode = options.get_generation_mode(kwargs.get("assistant_model"))
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            name = mode.value.replace("_", " ")
            raise ValueError(f"{name} does not keep to the block grammar; sample, or search greedily.")
        self._check_options(options)
        options.pad_token_id = self.config.pad_token_id  # EOS in its place, as is usual, would be more than one
        processors = LogitsProcessorList(logits_processor or [])
        own = [getattr(one, "grammar", one) for one in processors]
        grammar = next((one for one in own if isinstance(one, BlockGrammar)), None)
        if grammar is None:
            known = pad_sequence([torch.tensor(self.codec.begun(row), dtype=torch.int64) for row in inputs], True)
            grammar = BlockGrammar(self.config, len(inputs), lengths, budget, max_block_length, known)
            grammar = grammar.select(torch.arange(len(inputs)).repeat_interleave(options.num_return_sequences or 1))
            processors.insert(0, grammar)
        longest = self.config.clip_places()
        limits = [options.max_new_tokens, *(given - inputs.shape[1] for given in max_length if given is not None)]
        limit = next((given for given in limits if given is not None), longest)
        grammar.end_within_(limit)
        options.max_new_tokens, options.max_length = min(limit, longest), None
        return super().generate(inputs, options, processors, **kwargs)

    def _check_options(self, options: GenerationConfig) -> None:
        """Raises ValueError for options with which a sequence would not be a whole clip."""
        if options.min_length or options.min_new_tokens or options.exponential_decay_length_penalty is not None:
            raise ValueError("a clip ends with its last block; for longer ones give lengths, not a least length.")
        for name in ("max_time", "stop_strings", "forced_eos_token_id"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name} would cut a clip; leave it out, and give budget or max_new_tokens.")
        end, padding = self.config.eos_token_id, self.config.pad_token_id
        for name, needed in (("eos_token_id", {end}), ("pad_token_id", set())):
            given = _numbers(getattr(options, name))
            if given and not needed <= given <= {end, padding}:
                raise ValueError(
                    f"{name} is {sorted(given)}, but a clip ends with {end} and is padded with {padding}; leave it out."
                )
        for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            if getattr(options, name):
                raise ValueError(f"{name} would forbid markers, which a clip repeats; leave it out.")
        forbidden = _numbers(options.suppress_tokens) | _numbers(options.begin_suppress_tokens)
        forbidden |= {word[-1] for word in options.bad_words_ids or () if isinstance(word, list) and word}
        codes = set(range(self.config.codebook_size))
        if not forbidden < codes:
            raise ValueError(
                "suppress_tokens, begin_suppress_tokens and bad_words_ids may forbid codes, though not all, and nothing"
                " else; to rule lengths out give lengths or max_block_length."
            )
        biases = options.sequence_bias or {}
        biases = list(biases.values()) if isinstance(biases, dict) else [bias for _, bias in biases]
        if not torch.tensor(biases, dtype=torch.float32).isfinite().all():
            raise ValueError("sequence_bias must be finite, so that what must come is not forbidden.")

    def to_llama(self) -> LlamaForCausalLM:
        """A copy of the network as a `LlamaForCausalLM`, with equal logits, for engines that serve Llama."""
        fields = {
            name: value
            for name, value in self.config.to_dict().items()
            if name in LlamaConfig.__dataclass_fields__ and name not in ("model_type", "architectures", "auto_map")
        }
        llama = LlamaForCausalLM(LlamaConfig(**fields)).to(self.dtype)
        llama.load_state_dict(self.state_dict())
        return llama.to(self.device).eval()


EvatokGenerator = EvatokForCausalLM  # its name until 0.1, which older checkpoints have in their configurations
