"""Clips of tokens as sequences of the generator's vocabulary, and back.

A sequence is

    BOS class [condition SEP] block_1 .. block_T EOS

where class may be the null class, and the condition of frame prediction is a clip of blocks, too. In the layout
"length-first" a block of k codes is `LEN_k code_1 .. code_k`; in "end-of-block" it is `code_1 .. code_k EOB`. Both are
our choice: the paper does not say how its sequences are delimited.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from .assignment import LengthsLike
from .configuration_evatok_generator import EvatokGeneratorConfig
from .tokens_evatok import VideoTokens


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
