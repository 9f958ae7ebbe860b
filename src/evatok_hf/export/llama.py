"""A generator as a plain Llama, with what an engine that serves it must know: which ids are what, and what may follow.

`RequestGrammar` is the block grammar of one request in plain Python, for the hooks of such engines (`docs/serving.md`).
It allows what `modeling_evatok_generator.BlockGrammar` allows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.configuration_evatok import EvatokGeneratorConfig
from ..models.files_evatok import replacing_folder
from ..models.modeling_evatok_generator import CODE, BlockGrammar, EvatokForCausalLM, SequenceCodec

VOCABULARY = "vocabulary.json"


def vocabulary(config: EvatokGeneratorConfig) -> dict[str, Any]:
    """The meaning of a generator's ids, as plain JSON values."""
    by_length, marker = config.layout == "length-first", SequenceCodec(config).marker
    names = config.class_names or [str(label) for label in range(config.num_classes)]
    return {
        "layout": config.layout,
        "codebook_size": config.codebook_size,
        "block_lengths": list(config.block_lengths),
        "num_blocks": config.num_blocks,
        "codes": [0, config.codebook_size],  # from, to (exclusive)
        "length_ids": {str(n): marker(n) for n in config.block_lengths} if by_length else None,
        "end_of_block_id": None if by_length else marker(config.block_lengths[0]),
        "bos_id": config.bos_token_id,
        "eos_id": config.eos_token_id,
        "pad_id": config.pad_token_id,
        "separator_id": config.separator_token_id,
        "null_class_id": config.null_class_id,
        "class_ids": {name: config.class_id(label) for label, name in enumerate(names)},
        "vocab_size": config.vocab_size,
        "max_new_tokens": config.clip_places(),
        "known_frames": config.known_frames,
        "fps": config.fps,
        "tokenizer_fingerprint": config.tokenizer_fingerprint,
    }


def export_llama(generator: EvatokForCausalLM, folder: str | Path) -> None:
    """Writes a folder that `LlamaForCausalLM.from_pretrained` loads, with `generation_config.json` and
    `vocabulary.json`; the folder appears only when it is complete.

    Raises:
        ValueError: a folder that is there already and not empty, or that cannot be written to.
    """
    from transformers import GenerationConfig

    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; choose a new folder.")
    config = generator.config
    words = vocabulary(config)
    options = {"bos_token_id": words["bos_id"], "eos_token_id": words["eos_id"], "pad_token_id": words["pad_id"]}
    llama = generator.to_llama()
    llama.generation_config = GenerationConfig(**options, max_new_tokens=words["max_new_tokens"], do_sample=True)
    llama.generation_config.top_k = 0
    with replacing_folder(folder) as partial:
        llama.save_pretrained(partial)
        (partial / VOCABULARY).write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")


class RequestGrammar:
    """The grammar of one request, followed token by token after a prompt of `SequenceCodec.prompt`. It is
    `BlockGrammar` of one row in plain Python, which is quicker for a row alone.

    Args:
        words: of `vocabulary`, or read from `vocabulary.json`.
        lengths: T forced lengths, 0 where the model decides; None leaves all to it.
        budget: most codes of the clip.
        known: lengths of the blocks that the prompt already holds after its condition.

    Raises:
        ValueError: as `BlockGrammar`.
    """

    def __init__(
        self,
        words: dict[str, Any],
        lengths: Sequence[int] | None = None,
        budget: int | None = None,
        known: Sequence[int] = (),
    ):
        config = EvatokGeneratorConfig(
            **{name: words[name] for name in ("layout", "codebook_size", "block_lengths", "num_blocks")},
            num_classes=words["vocab_size"] - words["null_class_id"] - 1,
        )
        begun = BlockGrammar(config, 1, lengths, budget, known=torch.tensor([known], dtype=torch.int64).view(1, -1))
        self._table, self._first_marker = begun.table, config.first_marker_id
        self._fewest, self._most, self._later = (getattr(begun, n)[0].tolist() for n in ("fewest", "most", "later"))
        self._left, self._block = int(begun.left), int(begun.block)
        self._inside = self._state = 0

    @property
    def done(self) -> bool:
        """True once EOS was taken; only padding may follow."""
        return self._state == self._table.over

    def allowed(self) -> tuple[bool, list[int]]:
        """The ids that may follow: True if every code may, and the list of other ids."""
        at = min(self._block, len(self._fewest) - 1)
        fewest = self._fewest[at]
        most = max(fewest, min(self._most[at], self._left - self._later[at]))
        symbols = [
            symbol
            for symbol, (_, low, high) in enumerate(self._table.steps[self._state])
            if max(fewest, self._inside + low) <= min(most, self._inside + high)
        ]
        return CODE in symbols, [self._first_marker + symbol - 1 for symbol in symbols if symbol != CODE]

    def mask_(self, logits: torch.Tensor) -> torch.Tensor:
        """Sets the logits (V,) of all that may not follow to minus infinity, in place."""
        codes, others = self.allowed()
        forbidden = torch.ones_like(logits, dtype=torch.bool)
        forbidden[: self._first_marker] = not codes
        forbidden[others] = False
        return logits.masked_fill_(forbidden, -torch.inf)

    def take(self, token: int) -> None:
        """Goes on by one token that was allowed."""
        symbol = min(max(token - self._first_marker + 1, CODE), self._table.any_class)
        before, self._state = self._state, self._table.steps[self._state][symbol][0]
        self._inside += symbol == CODE
        if self._state == 0 and before != 0:
            self._left -= self._inside
            self._block, self._inside = self._block + 1, 0
            if self._block == len(self._fewest):
                self._state = self._table.end
