"""EvatokGenerator: an autoregressive model of videos as variable-length token sequences (paper, section 4).

Its network is transformers' Llama, unchanged: conditions, lengths and codes are ids of one vocabulary, so the weights
load in anything that serves a Llama (`to_llama`). It decides the length of every block itself. `generate` is
transformers' method with the block grammar always on, so that every sample decodes.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from .assignment import LengthsLike
from .base_evatok import CheckedWeights
from .configuration_evatok_generator import EvatokGeneratorConfig
from .grammar_evatok import BlockGrammar
from .sequences_evatok import SequenceCodec


class EvatokGenerator(CheckedWeights, LlamaForCausalLM):
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
        *args,
        lengths: LengthsLike | None = None,
        budget: int | None = None,
        max_block_length: int | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs,
    ):
        """As transformers' `generate`, of whole sequences: `codec.to_tokens` turns each into a clip of tokens.

        Args:
            inputs: (B, L) prompts (`codec.prompt`), padded on the left; None begins with BOS and no class.
            lengths, budget, max_block_length: see `BlockGrammar`.
            logits_processor: used after the grammar; a list that has a `BlockGrammar` of its own is used as it is.

        Raises:
            ValueError: beams, which the grammar does not follow; and as `BlockGrammar`.
        """
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        if inputs is None:
            inputs = torch.tensor([[self.config.bos_token_id, self.config.null_class_id]], device=self.device)
        options = kwargs.get("generation_config") or self.generation_config
        if (kwargs.get("num_beams") or options.num_beams or 1) > 1:
            raise ValueError("beam search does not keep to the block grammar; sample, or search greedily.")
        processors = LogitsProcessorList(logits_processor or [])
        if not any(isinstance(processor, BlockGrammar) or hasattr(processor, "grammar") for processor in processors):
            rows = len(inputs) * (kwargs.get("num_return_sequences") or options.num_return_sequences or 1)
            processors.insert(0, BlockGrammar(self.config, rows, lengths, budget, max_block_length))
        if kwargs.get("max_length") is None and kwargs.get("max_new_tokens") is None:
            space = self.config.assignment_space
            kwargs["max_new_tokens"] = space.max_tokens + space.num_blocks + 1
        return super().generate(inputs, *args, logits_processor=processors, **kwargs)

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
