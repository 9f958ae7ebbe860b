"""The block grammar: only what can become a video may be generated.

A logits processor for `generate`. It keeps a small state a row, on the device of the ids, and forbids every id that
would break the sequence of `sequences_evatok`: markers where a block begins (or where it may end), codes inside, EOS
after T blocks, padding after it. So every sample decodes, whatever the weights, the temperature or top-k. Lengths may
be forced, limited by block, or limited by a budget over the clip, which is never passed (our choices; no source limits
its budgets).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from transformers import LogitsProcessor

from .assignment import LengthsLike
from .configuration_evatok_generator import EvatokGeneratorConfig

# What is kept of each row.
ROWS = ("forced", "limit", "later", "left", "block", "inside", "length")


class BlockGrammar(LogitsProcessor):
    """Masks the logits of a batch that is generated from prompts, one step at a time.

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
