"""The code beside the weights of each model, by which a repository works where this package is not installed."""

from __future__ import annotations

from pathlib import Path

from ..models.files_evatok import read_json

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


def part_in(folder: Path) -> str | None:
    """The part that a folder holds by itself, None for anything else. Raises ValueError for a damaged config.json."""
    path = folder / "config.json"
    return PARTS.get(str(read_json(path).get("model_type"))) if path.is_file() else None
