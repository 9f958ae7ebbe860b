"""The card of a whole repository, made from the cards of its parts, or from the record of their training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump

from ..models.files_evatok import read_json
from .remote_code import PARTS

PAPER = "2603.12267"
_WHAT = {
    "tokenizer": "from clips to tokens and back",
    "router": "decides how many tokens each block of a clip gets",
    "generator": "makes clips of a class, and continues videos",
}
_CITATION = """```bibtex
@inproceedings{xiong2026evatok,
  title     = {EVATok: Adaptive Length Video Tokenization for Efficient Visual Autoregressive Generation},
  author    = {Xiong, Tianwei and Liew, Jun Hao and Huang, Zilong and Lin, Zhijie and Feng, Jiashi and Liu, Xihui},
  booktitle = {CVPR},
  year      = {2026},
}
```
"""


def make_card(
    repo_id: str,
    cards: Mapping[str, str | None],
    folders: Mapping[str, str],
    runs: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    """README.md of a repository.

    Args:
        repo_id: owner/name, which the lines of use name.
        cards: part -> text of its own card, None where it has none.
        folders: part -> its folder in the repository, "" for the root.
        runs: part -> what `training.json` says; those of parts without a card are told here.

    Raises:
        ValueError: a card of a part whose front matter does not parse.
    """
    data = {}
    for part, text in cards.items():
        try:
            data[part] = ModelCard(text).data.to_dict() if text else _of_the_hub((runs or {}).get(part, {}))
        except Exception as error:  # whatever YAML there is
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the front matter of the {part}'s card does not parse ({reason}); mend it.") from error
    untold = {part: run for part, run in (runs or {}).items() if not cards[part]}
    return f"---\n{_front_matter(repo_id, data)}\n---\n\n{_body(repo_id, cards, folders, untold)}"


def card_of_folder(repo_id: str, folder: Path) -> str:
    """The card for a folder that a model, a processor or a pipeline was saved into."""
    folders = {part: part for part in _WHAT if (folder / part / "config.json").is_file()}
    if not folders:
        path = folder / "config.json"
        kind = read_json(path).get("model_type") if path.is_file() else None
        folders = {PARTS.get(kind, "tokenizer"): ""}  # a processor by itself is of a tokenizer
    return make_card(repo_id, dict.fromkeys(folders), folders)


def _front_matter(repo_id: str, parts: Mapping[str, dict[str, Any]]) -> str:
    def gather(field: str) -> list[Any]:
        found: list[Any] = []
        for part in parts.values():
            value = part.get(field)
            found += value if isinstance(value, list) else [] if value is None else [value]
        return list(dict.fromkeys(found))

    licences = gather("license")
    tags, task = [], "feature-extraction" if "tokenizer" in parts else "video-classification"
    if "generator" in parts:
        tags, task = ["video-generation", "video-prediction"], "video-to-video"
    tags = ["video", "video-tokenizer", "adaptive-length", *tags, f"arxiv:{PAPER}", *gather("tags")]
    results = [result for part in parts.values() for result in part.get("model-index") or []]
    fields: dict[str, Any] = {
        # of several the Hub wants "other"; the parts' cards say which is whose
        "license": licences[0] if len(licences) == 1 else "other" if licences else None,
        "license_name": "of-the-parts" if len(licences) > 1 else None,
        "library_name": "evatok_hf",
        "pipeline_tag": task,
        "tags": list(dict.fromkeys(tags)),
        "datasets": gather("datasets"),
        "metrics": gather("metrics"),
        "base_model": gather("base_model") or None,
        "model-index": results or None,
    }
    return yaml_dump({key: value for key, value in fields.items() if value is not None}).strip()


def _of_the_hub(run: Mapping[str, Any]) -> dict[str, Any]:
    """What training noted of what it used of the Hub."""
    return {field: run[field] for field in ("datasets", "base_model") if run.get(field)}


def _body(
    repo_id: str, cards: Mapping[str, str | None], folders: Mapping[str, str], runs: Mapping[str, dict[str, Any]]
) -> str:
    rows = []
    for part in cards:
        folder = folders[part]
        where = f"`{folder}/`" if folder else "the root"
        card = f"[{folder}/README.md]({folder}/README.md)" if cards[part] and folder else ""
        rows.append(f"| {part} | {where} | {_WHAT[part]} | {card} |")
    name = repo_id.rpartition("/")[2]
    what = "an adaptive-length video tokenizer"
    if "tokenizer" not in cards:
        what = f"the {next(iter(cards))} of {what}"
    return f"""# {name}

An EVATok checkpoint ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})): {what}, made with
`evatok_hf`, an independent implementation.

| part | where | what it does | card |
|---|---|---|---|
{chr(10).join(rows)}

## Use

{_use(repo_id, cards)}
Without the package, from the code in this repository:

{_use_alone(repo_id, folders)}
{"".join(_training(part, run) for part, run in runs.items())}## Citation

{_CITATION}"""


def _use(repo_id: str, parts: Iterable[str]) -> str:
    blocks = []
    if "tokenizer" in parts:
        blocks.append(f"""from evatok_hf import VideoTokenizer

tokenizer = VideoTokenizer.from_pretrained("{repo_id}")
tokens = tokenizer.encode("video.mp4")""")
    elif "router" in parts:
        blocks.append(f"""from evatok_hf import EvatokRouter

router = EvatokRouter.from_pretrained("{repo_id}")  # router.assign(clips, quality=1.2) gives lengths""")
    if "generator" in parts and "tokenizer" in parts:
        blocks.append(f"""from evatok_hf import EvatokPipeline

pipe = EvatokPipeline.from_pretrained("{repo_id}")
clips = pipe(num_videos_per_prompt=2, seeds=[0, 1]).frames""")
    elif "generator" in parts:
        blocks.append(f"""from evatok_hf import EvatokForCausalLM

generator = EvatokForCausalLM.from_pretrained("{repo_id}")  # its ids are those of the tokenizer it was trained on""")
    return _fenced(blocks)


def _use_alone(repo_id: str, folders: Mapping[str, str]) -> str:
    blocks = []
    for part, folder in folders.items():
        name, auto = ("generator", "AutoModelForCausalLM") if part == "generator" else (part, "AutoModel")
        subfolder = f', subfolder="{folder}"' if folder else ""
        blocks.append(f"""from transformers import {auto}

{name} = {auto}.from_pretrained("{repo_id}"{subfolder}, trust_remote_code=True)""")
    if folders.get("tokenizer"):
        blocks.append(f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)""")
    return _fenced(blocks)


def _fenced(blocks: Iterable[str]) -> str:
    return "\n".join(f"```python\n{block}\n```\n" for block in blocks)


def _training(part: str, run: Mapping[str, Any]) -> str:
    """What a run says of itself, whether it is at its end or not."""
    arguments, rows = run.get("arguments", {}), []
    if "steps" in run:
        asked = arguments.get("steps")
        rows.append(("steps", f"{run['steps']:,}" + (f" of {asked:,}" if asked and asked != run["steps"] else "")))
    rows += [(name, f"{run[name]:,}") for name in ("clips", "sequences", "parameters") if name in run]
    rows += [(name, str(run[name])) for name in ("seed", "seconds", "machine", "torch") if name in run]
    held_out = {name.removeprefix("val/"): value for name, value in (run.get("held_out") or {}).items()}
    rows += [(f"held out, {name}", f"{value:.4g}") for name, value in held_out.items()]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    command = f"\n\n```\n{run['command']}\n```" if "command" in run else ""
    return f"## Training of the {part}\n\n| | |\n|---|---|\n{table}{command}\n\n"
