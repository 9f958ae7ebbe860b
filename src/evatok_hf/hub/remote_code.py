"""The code beside the weights of each model, by which a repository works where this package is not installed."""

from __future__ import annotations

from collections.abc import Mapping

from ..models.checkpoint_evatok import code_files

PROCESSOR_MAP = {"AutoVideoProcessor": "video_processing_evatok.EvatokVideoProcessor"}
# By the `model_type` in a configuration.
AUTO_MAPS = {
    "evatok": {"AutoConfig": "configuration_evatok.EvatokConfig", "AutoModel": "modeling_evatok.EvatokModel"},
    "evatok_router": {
        "AutoConfig": "configuration_evatok.EvatokRouterConfig",
        "AutoModel": "modeling_evatok_router.EvatokRouter",
    },
    "evatok_generator": {
        "AutoConfig": "configuration_evatok.EvatokGeneratorConfig",
        "AutoModelForCausalLM": "modeling_evatok_generator.EvatokForCausalLM",
    },
}
# The same kinds of models, as this package calls them.
PARTS = {"evatok": "tokenizer", "evatok_router": "router", "evatok_generator": "generator"}


def model_code(auto_map: Mapping[str, str]) -> dict[str, bytes]:
    """File name -> source of what an `auto_map` names."""
    return code_files(reference.partition(".")[0] for reference in auto_map.values())
