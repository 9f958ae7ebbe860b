"""EvatokForCausalLM, the generator: an autoregressive model of videos as variable-length token sequences (paper, section 4).

Its network is transformers' Llama, unchanged: conditions, lengths and codes are ids of one vocabulary, so the weights
load in anything that serves a Llama (`to_llama`). It decides the length of every block itself. `generate` is
transformers' method with the block grammar always on, so that every sample decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMode

from .base_evatok import CheckedWeights
from .configuration_evatok import EvatokGeneratorConfig, LengthsLike
from .tokens_evatok import VideoTokens

# What is kept of each row.
ROWS = ("forced", "limit", "later", "left", "block", "inside", "length")


# --- sequences --------------------------------------------------------------------------------------------------------


# A sequence is
#
#     BOS class [condition SEP] block_1 .. block_T EOS
#
# where class may be the null class, and the condition of frame prediction is a clip of blocks, too. In the layout
# "length-first" a block of k codes is `LEN_k code_1 .. code_k`; in "end-of-block" it is `code_1 .. code_k EOB`. Both
# are our choice: the paper does not say how its sequences are delimited.


class TokenKind(IntEnum):
    """What a place of a sequence is for the one who predicts it."""

    PROMPT = 0  # given: BOS, class, condition, separator
    MARKER = 1  # a length, or the end of a block
    CODE = 2
    END = 3


@dataclass
class Prompt:
    """What a clip is asked for with.

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
        self.config = config
        self.space = config.assignment_space

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
        parts = []
        for length, codes in list(zip(lengths.tolist(), ids.split(lengths.tolist()), strict=True))[:count]:
            marker = torch.tensor([self.marker(length)])
            parts += [marker, codes] if self.config.layout == "length-first" else [codes, marker]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def marker(self, length: int) -> int:
        """The id that marks a block of that many codes."""
        offset = self.space.block_lengths.index(length) if self.config.layout == "length-first" else 0
        return self.config.first_marker_id + offset

    def prompt(self, prompt: Prompt) -> torch.Tensor:
        """What a clip is generated after, int64 on the CPU. Raises ValueError for a class or condition that is none."""
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
        """A whole sequence, perhaps padded on either side -> lengths (T,) and ids (N,) of its clip.

        Raises:
            ValueError: a sequence that is none of `encode`; the message says where it goes wrong.
        """
        places = self._parse(sequence)
        kinds = torch.tensor([kind for kind, _ in places])
        blocks = torch.tensor([block for _, block in places])
        content = torch.as_tensor(sequence).to("cpu", torch.int64)
        content = content[content != self.config.pad_token_id]
        codes = kinds == TokenKind.CODE
        return torch.bincount(blocks[codes], minlength=self.space.num_blocks), content[codes]

    def describe(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each place of a sequence is: its `TokenKind`, and its block (T for places outside blocks).

        Returns:
            (L,) int64 each, for the sequence without padding.

        Raises:
            ValueError: as `decode`.
        """
        kinds, blocks = zip(*self._parse(sequence), strict=True)
        return torch.tensor(kinds), torch.tensor(blocks)

    def _parse(self, sequence: torch.Tensor) -> list[tuple[int, int]]:
        config, outside = self.config, self.space.num_blocks
        ids = [i for i in torch.as_tensor(sequence).tolist() if i != config.pad_token_id]
        if len(ids) < 2 or ids[0] != config.bos_token_id or not config.null_class_id <= ids[1] < config.vocab_size:
            raise ValueError(f"a sequence begins with {config.bos_token_id} (BOS) and a class, not with {ids[:2]}.")
        at = 2
        if config.separator_token_id in ids:
            separator = ids.index(config.separator_token_id)
            if self._clip(ids, at)[-1][0] != separator - 1:
                raise ValueError(f"the condition ends at place {separator}, in the middle of a clip.")
            at = separator + 1
        places = [(int(TokenKind.PROMPT), outside)] * at
        places += [(int(kind), block) for _, kind, block in self._clip(ids, at)]
        if ids[len(places) :] != [config.eos_token_id]:
            raise ValueError(f"after {outside} blocks a sequence has one {config.eos_token_id} (EOS) and ends.")
        return [*places, (int(TokenKind.END), outside)]

    def _clip(self, ids: list[int], at: int) -> list[tuple[int, TokenKind, int]]:
        """(place, kind, block) of the T blocks that begin there."""
        first, codes, places = self.config.first_marker_id, self.config.codebook_size, []
        for block in range(self.space.num_blocks):
            start = at
            if self.config.layout == "length-first":
                index = ids[at] - first if at < len(ids) else -1
                if not 0 <= index < len(self.space.block_lengths):
                    raise ValueError(f"place {at} must say the length of block {block}.")
                places.append((at, TokenKind.MARKER, block))
                start, at = at + 1, at + 1 + self.space.block_lengths[index]
            else:
                while at < len(ids) and ids[at] < codes:
                    at += 1
                if at - start not in self.space.block_lengths or at == len(ids) or ids[at] != first:
                    raise ValueError(f"block {block} has {at - start} codes up to place {at}, which is no candidate.")
            if at > len(ids) or any(i >= codes for i in ids[start:at]):
                raise ValueError(f"block {block} must have {at - start} codes from place {start} on.")
            places += [(place, TokenKind.CODE, block) for place in range(start, at)]
            if self.config.layout == "end-of-block":
                places.append((at, TokenKind.MARKER, block))
                at += 1
        return places

    def from_tokens(self, tokens: VideoTokens, labels: list[int | None] | None = None) -> list[torch.Tensor]:
        """The sequences of all clips of `VideoTokens`. Raises ValueError as `encode`, or without a label each."""
        labels = [None] * len(tokens) if labels is None else labels
        if len(labels) != len(tokens):
            raise ValueError(f"{len(tokens)} clips but {len(labels)} labels; give one a clip.")
        parts = tokens.ids.split(tokens.lengths.sum(-1).tolist())
        return [
            self.encode(row, ids, Prompt(label))
            for row, ids, label in zip(tokens.lengths.cpu(), parts, labels, strict=True)
        ]

    def to_tokens(self, sequences: list[torch.Tensor] | torch.Tensor) -> VideoTokens:
        """Sequences to `VideoTokens` of the tokenizer that the generator belongs to. Raises ValueError as `decode`."""
        clips = [self.decode(sequence) for sequence in sequences]
        tokens = VideoTokens(
            ids=torch.cat([ids for _, ids in clips]), lengths=torch.stack([lengths for lengths, _ in clips])
        )
        return replace(tokens, fingerprint=self.config.tokenizer_fingerprint)


# --- grammar ----------------------------------------------------------------------------------------------------------


# Only what can become a video may be generated. The grammar keeps a small state a row, on the device of the ids, and
# forbids every id that would break a sequence: markers where a block begins (or where it may end), codes inside, EOS
# after T blocks, padding after it. So every sample decodes, whatever the weights, the temperature or top-k. Lengths may
# be forced, limited by block, or limited by a budget over the clip, which is never passed (our choices; no source
# limits its budgets).


class BlockGrammar(LogitsProcessor):
    """A logits processor that masks the logits of a batch that is generated from prompts, one step at a time.

    Args:
        config: of the generator.
        batch_size: rows B.
        lengths: (T,) or (B, T): forces these lengths; 0 leaves a block free.
        budget: most codes of a clip.
        max_block_length: most codes of a block.
        known: (B, n): blocks that the prompts already hold after their condition, as the lengths of these blocks.

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
        self.config = config
        space = config.assignment_space
        self.candidates = torch.tensor(space.block_lengths)
        self.num_blocks = space.num_blocks
        forced = _forced(lengths, batch_size, config)
        known = torch.empty(batch_size, 0, dtype=torch.int64) if known is None else known.cpu()
        # What each block may hold at most: its own limit first, then what the budget leaves for it.
        limit = space.block_lengths[-1]
        if max_block_length is not None:
            allowed = [length for length in space.block_lengths if length <= max_block_length]
            if not allowed:
                raise ValueError(
                    f"max_block_length is {max_block_length}, but the shortest block has {space.block_lengths[0]}."
                )
            limit = allowed[-1]
        if (forced > limit).any():
            raise ValueError(
                f"lengths {forced.max()} contradict max_block_length {max_block_length}; give one of them."
            )
        # (B, T): the least that each block costs, and from it the least that the blocks after it cost.
        least = torch.where(forced > 0, forced, self.candidates[0])
        least[:, : known.shape[1]] = known
        if budget is not None and int(least.sum(-1).max()) > budget:
            raise ValueError(
                f"a budget of {budget} tokens is too small: with these lengths a clip takes at least "
                f"{int(least.sum(-1).max())}."
            )
        most = torch.where(forced > 0, forced, limit)
        most[:, : known.shape[1]] = known
        # (B,) the most codes that a clip can come to have.
        self.longest = most.sum(-1).clamp_max(budget if budget is not None else space.max_tokens)
        self.forced = forced
        self.limit = torch.full((batch_size,), limit)
        self.later = least.sum(-1, keepdim=True) - least.cumsum(-1)  # (B, T)
        spent = known.sum(-1)
        self.left = (budget if budget is not None else space.max_tokens) - spent  # (B,)
        self.block = torch.full((batch_size,), known.shape[1])  # (B,) of the block under way; T: EOS, T + 1: padding
        self.inside = torch.zeros(batch_size, dtype=torch.int64)  # codes of it so far
        self.length = torch.zeros(batch_size, dtype=torch.int64)  # its length, where that is known
        self.columns = _columns(config)  # (V,)
        self._seen: int | None = None

    @property
    def at_marker(self) -> torch.Tensor:
        """(B,) whether the next token decides a length."""
        return self.rules()[0]

    @property
    def progress(self) -> torch.Tensor:
        """(B,) how much of the clip's time is done, from 0 to 1."""
        within = self.inside / self.length.clamp_min(1)
        return ((self.block + torch.where(self.length > 0, within, 0.0)) / self.num_blocks).clamp_max(1)

    @property
    def running(self) -> torch.Tensor:
        """(B,) whether a row has not had its EOS."""
        return self.block <= self.num_blocks

    def to(self, device: torch.device) -> BlockGrammar:
        """Moves the state to a device, where it stays."""
        for name in ("candidates", "columns", *ROWS):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def copy_rows_(self, rows: torch.Tensor | Sequence[int], other: BlockGrammar, others: Sequence[int]) -> None:
        """Takes the state of rows of another grammar of the same configuration into rows of this one, in place."""
        for name in ROWS:
            mine = getattr(self, name)
            mine[rows] = getattr(other, name)[others].to(mine.device)

    def repeat_(self, times: int) -> None:
        """Makes several rows of each, one after the other."""
        for name in ROWS:
            setattr(self, name, getattr(self, name).repeat_interleave(times, 0))

    def end_within_(self, new_tokens: int) -> None:
        """Lowers the budgets so that each clip, with its markers and EOS, takes at most so many tokens from here on.

        Raises:
            ValueError: fewer tokens than a clip takes.
        """
        others = self.num_blocks - self.block + 1  # (B,) markers and EOS
        at = self.block.clamp_max(self.num_blocks - 1)[:, None]
        first = self.forced.gather(1, at)[:, 0].clamp_min(self.candidates[0])
        least = int((self.later.gather(1, at)[:, 0] + first + others).max())
        if new_tokens < least:
            raise ValueError(
                f"no whole clip fits in {new_tokens} new tokens; it takes at least {least}, which max_new_tokens (or "
                "max_length, with the prompt) must allow."
            )
        self.left.clamp_(max=new_tokens - others)

    def first(self, rows: int) -> BlockGrammar:
        """The grammar of the first rows: what happens to it happens to this one."""
        part = copy(self)
        for name in ROWS:
            setattr(part, name, getattr(self, name)[:rows])
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
        config, total = self.config, self.num_blocks
        running = self.block < total
        code = running & (last < config.codebook_size)
        marker = running & ~code
        inside = self.inside + code.long()
        length = self.length
        if config.layout == "length-first":
            said = self.candidates[(last - config.first_marker_id).clamp(0, len(self.candidates) - 1)]
            length = torch.where(marker, said, length)
            self.left.sub_(torch.where(marker, said, 0))
            done = running & (length > 0) & (inside == length)
        else:
            self.left.sub_(torch.where(marker, inside, 0))
            done = marker
        self.block.add_(done.long() + (self.block == total).long())  # the latter: EOS was taken
        self.inside.copy_(torch.where(done, 0, inside))
        self.length.copy_(torch.where(done, 0, length))

    def rules(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the next token of each row decides a length (B,), and which ids it may be (B, V), both bool."""
        config, total = self.config, self.num_blocks
        at = self.block.clamp_max(total - 1)[:, None]
        # (B,) codes of the block under way
        most = torch.minimum(self.left - self.later.gather(1, at)[:, 0], self.limit)
        forced = self.forced.gather(1, at)[:, 0]
        running = self.block < total
        # (B, m): which candidates may be the length of the block under way
        fits = (self.candidates <= most[:, None]) & ((forced == 0)[:, None] | (self.candidates == forced[:, None]))
        if config.layout == "length-first":
            at_marker = running & (self.length == 0)
            codes, markers = running & ~at_marker, fits & at_marker[:, None]
        else:
            here = (fits & (self.candidates == self.inside[:, None])).any(-1)
            longer = (fits & (self.candidates > self.inside[:, None])).any(-1)
            at_marker = running & here
            codes, markers = running & longer, at_marker[:, None]
        end, over, never = self.block == total, self.block > total, torch.zeros_like(running)
        groups = torch.cat([codes[:, None], markers, torch.stack([end, over, never], dim=1)], dim=1)
        return at_marker, groups[:, self.columns]


def _columns(config: EvatokGeneratorConfig) -> torch.Tensor:
    """(V,) to which group an id belongs: codes, each marker, EOS, padding, or those that only prompts have."""
    markers = config.bos_token_id - config.first_marker_id
    columns = torch.full((config.vocab_size,), markers + 3)
    columns[: config.codebook_size] = 0
    columns[config.first_marker_id : config.bos_token_id] = torch.arange(1, markers + 1)
    columns[config.eos_token_id], columns[config.pad_token_id] = markers + 1, markers + 2
    return columns


def _forced(lengths: LengthsLike | None, batch_size: int, config: EvatokGeneratorConfig) -> torch.Tensor:
    """(B, T) with 0 where a block is free."""
    space = config.assignment_space
    if lengths is None:
        return torch.zeros(batch_size, space.num_blocks, dtype=torch.int64)
    free = torch.as_tensor(lengths) == 0
    filled = torch.where(free, space.block_lengths[0], torch.as_tensor(lengths))
    checked = space.validate(filled, batch_size)
    return torch.where(free.expand_as(checked), 0, checked)


# --- the model --------------------------------------------------------------------------------------------------------


class EvatokForCausalLM(CheckedWeights, LlamaForCausalLM):
    """The generator. `forward` is that of `LlamaForCausalLM`, on sequences of `SequenceCodec`; `codec` is theirs."""

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
        but for beams and the like. `max_new_tokens` and `max_length` are limits as there; the grammar keeps to them as
        to a budget, so that the sequence ends with EOS before. Without a limit the longest clip has room.

        Args:
            inputs: (B, L) prompts (`codec.prompt`), padded on the left; None begins with BOS and no class.
            generation_config: options of transformers.
            logits_processor: applied after the grammar; a list that has a `BlockGrammar` of its own is used as it is.
            lengths, budget, max_block_length: see `BlockGrammar`.

        Returns:
            (B, L') ids, or what transformers returns with `return_dict_in_generate`.

        Raises:
            ValueError: a limit that no whole clip fits in; beams and other ways to generate that the grammar does not
                follow; and as `BlockGrammar`.
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
            raise ValueError(f"{mode.value} does not keep to the block grammar; sample, or search greedily.")
        if options.min_length or options.min_new_tokens:
            raise ValueError("a clip ends with its last block; for longer ones give lengths, not a least length.")
        processors = LogitsProcessorList(logits_processor or [])
        own = [getattr(one, "grammar", one) for one in processors]
        grammar = next((one for one in own if isinstance(one, BlockGrammar)), None)
        if grammar is None:
            grammar = BlockGrammar(self.config, len(inputs), lengths, budget, max_block_length)
            grammar.repeat_(options.num_return_sequences or 1)
            processors.insert(0, grammar)
        longest = self.config.assignment_space.max_tokens + self.config.num_blocks + 1
        limits = [options.max_new_tokens, *(given - inputs.shape[1] for given in max_length if given is not None)]
        limit = next((given for given in limits if given is not None), longest)
        grammar.end_within_(limit)
        options.max_new_tokens, options.max_length = min(limit, longest), None
        return super().generate(inputs, options, processors, **kwargs)

    def to_llama(self) -> LlamaForCausalLM:
        """The same network as a `LlamaForCausalLM`, with equal logits, for engines that serve Llama. A copy."""
        fields = {
            name: value
            for name, value in self.config.to_dict().items()
            if name in LlamaConfig.__dataclass_fields__ and name not in ("model_type", "architectures", "auto_map")
        }
        llama = LlamaForCausalLM(LlamaConfig(**fields)).to(self.dtype)
        llama.load_state_dict(self.state_dict())
        return llama.to(self.device).eval()


EvatokGenerator = EvatokForCausalLM  # its name until 0.1, which older checkpoints have in their configurations
