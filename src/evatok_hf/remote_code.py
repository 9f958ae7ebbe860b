"""The code that goes beside the weights, so that a repository works where this package is not installed.

transformers reads `auto_map` of a configuration and fetches the named file from the root of the repository, also for a
model in a subfolder, and with it whatever the file imports relatively. diffusers does the same with `pipeline.py`, but
wants a file beside the weights of every part, and takes only what the files name themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROCESSOR_MAP = {"AutoVideoProcessor": "video_processing_evatok.EvatokVideoProcessor"}
# By the `model_type` in a configuration.
AUTO_MAPS = {
    "evatok": {"AutoConfig": "configuration_evatok.EvatokConfig", "AutoModel": "modeling_evatok.EvatokModel"},
    "evatok_router": {
        "AutoConfig": "configuration_evatok.EvatokRouterConfig",
        "AutoModel": "modeling_evatok_router.EvatokRouter",
    },
    "evatok_generator": {
        "AutoConfig": "configuration_evatok_generator.EvatokGeneratorConfig",
        "AutoModelForCausalLM": "modeling_evatok_generator.EvatokGenerator",
    },
}
# The same kinds of models, as this package calls them.
PARTS = {"evatok": "tokenizer", "evatok_router": "router", "evatok_generator": "generator"}
_RELATIVE = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
_PIPELINE = '''"""The pipeline of this checkpoint, of the package evatok_hf if it is installed, else of these files."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # diffusers copies the files that are named here
{files}

try:
    EvatokPipeline = import_module("evatok_hf").EvatokPipeline
except ModuleNotFoundError as error:
    if error.name != "evatok_hf":
        raise
    EvatokPipeline = import_module(".pipeline_evatok", __package__).EvatokPipeline
'''
_PARTS = '''"""The classes of this checkpoint's parts, for `pipeline.py` of its root."""

from importlib import import_module

try:
    _code = import_module("evatok_hf")
except ModuleNotFoundError as error:
    if error.name != "evatok_hf":
        raise
    _code = import_module(".pipeline_evatok", __package__)  # diffusers puts it beside this

'''
_PART_CLASSES = {
    "tokenizer": "EvatokModel",
    "processor": "EvatokVideoProcessor",
    "router": "EvatokRouter",
    "generator": "EvatokGenerator",
}


def code_files(modules: Iterable[str]) -> dict[str, bytes]:
    """File name -> source of these modules of the package and of what they import of it."""
    waiting, found = list(modules), {}
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in found:
            found[name] = (HERE / name).read_bytes()
            waiting.extend(_RELATIVE.findall(found[name].decode()))
    return dict(sorted(found.items()))


def model_code(auto_map: Mapping[str, str]) -> dict[str, bytes]:
    """File name -> source of what an `auto_map` names."""
    return code_files(reference.partition(".")[0] for reference in auto_map.values())


def pipeline_files(parts: Iterable[str]) -> dict[str, bytes]:
    """What diffusers' `DiffusionPipeline.from_pretrained(.., trust_remote_code=True)` needs besides the parts.

    Args:
        parts: those that there are, of tokenizer, processor, router and generator.

    Returns:
        Path in the checkpoint -> content.
    """
    import diffusers

    parts = set(parts)
    index: dict[str, Any] = {"_class_name": ["pipeline", "EvatokPipeline"]}
    index["_diffusers_version"] = diffusers.__version__
    for part, name in _PART_CLASSES.items():
        index[part] = ["parts_evatok", name] if part in parts else [None, None]
    files = code_files(["pipeline_evatok"])
    names = "\n".join(f"    from .{Path(name).stem} import __name__ as _" for name in files)
    classes = "".join(f"{name} = _code.{name}\n" for name in _PART_CLASSES.values())
    files["pipeline.py"] = _PIPELINE.replace("{files}", names).encode()
    files["model_index.json"] = (json.dumps(index, indent=2) + "\n").encode()
    return files | {f"{part}/parts_evatok.py": (_PARTS + classes).encode() for part in _PART_CLASSES if part in parts}
