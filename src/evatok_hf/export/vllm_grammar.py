"""The block grammar as a logits processor of vLLM, `evatok_hf.export.vllm_grammar:BlockGrammarProcessor`.

vLLM has two interfaces for logits processors, that of its second model runner and that of the first one, which older
versions have and newer ones use with `VLLM_USE_V2_MODEL_RUNNER=0`; this works with either. The environment variable
`EVATOK_VOCABULARY` names the `vocabulary.json` of the served folder. Requests that want a video say so:
`extra_args={"grammar": True}`, with `lengths`, `budget` and `known` as `RequestGrammar` takes them.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..models.files_evatok import read_json
from .llama import RequestGrammar


@cache
def _words(path: str) -> dict[str, Any]:
    return read_json(path)


class Follower:
    """Masks the logits (V,) of one request after the ids of its answer so far."""

    def __init__(self, grammar: RequestGrammar):
        self.grammar, self.taken = grammar, 0

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        for token in output_ids[self.taken :]:
            self.grammar.take(token)
        self.taken = len(output_ids)
        return self.grammar.mask_(logits)


def new_follower(params: Any) -> Follower | None:
    """The mask of a request, by its sampling parameters; None for one that does not ask for it.

    Raises:
        ValueError: lengths or a budget that no clip can have; no vocabulary named.
    """
    extra = params.extra_args or {}
    if not extra.get("grammar"):
        return None
    path = os.environ.get("EVATOK_VOCABULARY")
    if path is None or not Path(path).is_file():
        raise ValueError(
            f"EVATOK_VOCABULARY is {path}; set it to the vocabulary.json that `evatok export-llama` wrote."
        )
    grammar = RequestGrammar(_words(path), extra.get("lengths"), extra.get("budget"), extra.get("known", ()))
    return Follower(grammar)


try:  # the second model runner
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        raise ImportError("the first one was asked for")
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class BlockGrammarProcessor(LogitsProcessor):
        """The grammar of all requests of a batch."""

        def __init__(self, vllm_config: Any, req_states: Any):
            self.states = req_states
            # By slot; slots are used again, so add_request sets them anew.
            self.followers: dict[int, Follower | None] = {}

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            new_follower(sampling_params)

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            self.followers[req_idx] = new_follower(sampling_params)
            return self.followers[req_idx] is not None

        def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
            for row, slot in enumerate(ctx.expanded_idx_mapping.tolist()):  # a row a request without speculation
                follower = self.followers.get(slot)
                if follower is not None:
                    begin = int(self.states.prompt_len.gpu[slot])
                    end = int(self.states.total_len.gpu[slot])
                    follower(self.states.all_token_ids.gpu[slot, begin:end].tolist(), logits[row])
            return logits

except ImportError:  # the first model runner
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class BlockGrammarProcessor(AdapterLogitsProcessor):
        """The grammar, made for each request."""

        @classmethod
        def validate_params(cls, params: Any) -> None:
            new_follower(params)

        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Follower | None:
            return new_follower(params)
