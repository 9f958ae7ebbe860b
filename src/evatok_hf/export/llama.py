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
from ..models.modeling_evatok_generator import EvatokForCausalLM

VOCABULARY = "vocabulary.json"


def vocabulary(config: EvatokGeneratorConfig) -> dict[str, Any]:
    """What the ids of a generator mean, as plain JSON values."""
    first = config.first_marker_id
    by_length = config.layout == "length-first"
    names = config.class_names or [str(label) for label in range(config.num_classes)]
    return {
        "layout": config.layout,
        "codebook_size": config.codebook_size,
        "block_lengths": list(config.block_lengths),
        "num_blocks": config.num_blocks,
        "codes": [0, config.codebook_size],  # from, to (exclusive)
        "length_ids": {str(n): first + i for i, n in enumerate(config.block_lengths)} if by_length else None,
        "end_of_block_id": None if by_length else first,
        "bos_id": config.bos_token_id,
        "eos_id": config.eos_token_id,
        "pad_id": config.pad_token_id,
        "separator_id": config.separator_token_id,
        "null_class_id": config.null_class_id,
        "class_ids": {name: config.class_id(label) for label, name in enumerate(names)},
        "vocab_size": config.vocab_size,
        "max_new_tokens": config.assignment_space.max_tokens + config.num_blocks + 1,
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
    """What may follow in one request, token by token, after a prompt of `SequenceCodec.prompt`.

    Args:
        words: of `vocabulary`, or read from `vocabulary.json`.
        lengths: T forced lengths, 0 where the model decides; None leaves all to it.
        budget: most codes of the clip.
        known: lengths of the blocks that the prompt already holds after its condition.

    Attributes:
        done: whether EOS was taken; only padding may follow.

    Raises:
        ValueError: forced lengths that are none, or a budget that is too small.
    """

    def __init__(
        self,
        words: dict[str, Any],
        lengths: Sequence[int] | None = None,
        budget: int | None = None,
        known: Sequence[int] = (),
    ):
        self._words, self._candidates = words, list(words["block_lengths"])
        total = words["num_blocks"]
        self._forced = [0] * total if lengths is None else [int(length) for length in lengths]
        if len(self._forced) != total or any(n and n not in self._candidates for n in self._forced):
            raise ValueError(f"lengths {self._forced} are not {total} of {self._candidates}, or 0 for a free block.")
        least = [n or self._candidates[0] for n in self._forced]
        least[: len(known)] = known
        most = total * self._candidates[-1] if budget is None else budget
        if budget is not None and sum(least) > budget:
            raise ValueError(f"a budget of {budget} tokens is too small: a clip takes at least {sum(least)}.")
        self._later = [sum(least[t + 1 :]) for t in range(total)]
        self._left = most - sum(known)
        self._block, self._inside, self._length = len(known), 0, 0
        self.done = False

    def allowed(self) -> tuple[bool, list[int]]:
        """Whether any code may follow, and which other ids may."""
        words, total = self._words, self._words["num_blocks"]
        if self.done:
            return False, [words["pad_id"]]
        if self._block == total:
            return False, [words["eos_id"]]
        most, forced = self._left - self._later[self._block], self._forced[self._block]
        fits = [n for n in self._candidates if n <= most and forced in (0, n)]
        if words["layout"] == "length-first":
            return (True, []) if self._length else (False, [words["length_ids"][str(n)] for n in fits])
        return any(n > self._inside for n in fits), [words["end_of_block_id"]] if self._inside in fits else []

    def mask_(self, logits: torch.Tensor) -> torch.Tensor:
        """Sets the logits (V,) of all that may not follow to minus infinity, in place."""
        codes, others = self.allowed()
        forbidden = torch.ones_like(logits, dtype=torch.bool)
        forbidden[: self._words["codebook_size"]] = not codes
        forbidden[others] = False
        return logits.masked_fill_(forbidden, -torch.inf)

    def take(self, token: int) -> None:
        """Goes on by one token that was allowed."""
        words, total = self._words, self._words["num_blocks"]
        if self._block == total:
            self.done = True
        elif token < words["codebook_size"]:
            self._inside += 1
            if self._inside == self._length:  # 0 in the other layout, where a marker ends the block
                self._left -= self._length
                self._end_block()
        elif words["layout"] == "length-first":
            self._length = self._candidates[token - words["codebook_size"]]
        else:
            self._left -= self._inside
            self._end_block()

    def _end_block(self) -> None:
        self._block, self._inside, self._length = self._block + 1, 0, 0
