"""The card of a whole repository, made from the cards of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump

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


def make_card(repo_id: str, cards: Mapping[str, str | None], folders: Mapping[str, str]) -> str:
    """README.md of a repository.

    Args:
        repo_id: owner/name, which the lines of use name.
        cards: part -> text of its own card, None where it has none.
        folders: part -> its folder in the repository, "" for the root.

    Raises:
        ValueError: a card of a part whose front matter does not parse.
    """
    data = {}
    for part, text in cards.items():
        try:
            data[part] = ModelCard(text).data.to_dict() if text else {}
        except Exception as error:  # whatever YAML there is
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the front matter of the {part}'s card does not parse ({reason}); mend it.") from error
    return f"---\n{_front_matter(repo_id, data)}\n---\n\n{_body(repo_id, cards, folders)}"


def _front_matter(repo_id: str, parts: Mapping[str, dict[str, Any]]) -> str:
    def gather(field: str) -> list[Any]:
        found: list[Any] = []
        for part in parts.values():
            value = part.get(field)
            found += value if isinstance(value, list) else [] if value is None else [value]
        return list(dict.fromkeys(found))

    licences = gather("license")
    results = [result for part in parts.values() for result in part.get("model-index") or []]
    fields: dict[str, Any] = {
        # of several the Hub wants "other"; the parts' cards say which is whose
        "license": licences[0] if len(licences) == 1 else "other" if licences else None,
        "library_name": "evatok_hf",
        "pipeline_tag": "video-to-video" if "generator" in parts else "feature-extraction",
        "tags": list(dict.fromkeys([*_always(parts), *gather("tags")])),
        "datasets": gather("datasets") or None,
        "metrics": gather("metrics") or None,
        "base_model": gather("base_model") or None,
        "model-index": results or None,
    }
    return yaml_dump({key: value for key, value in fields.items() if value is not None}).strip()


def _always(parts: Iterable[str]) -> list[str]:
    kinds = ["video-generation", "video-prediction"] if "generator" in parts else []
    return ["video", "video-tokenizer", "adaptive-length", *kinds, f"arxiv:{PAPER}"]


def _body(repo_id: str, cards: Mapping[str, str | None], folders: Mapping[str, str]) -> str:
    rows = []
    for part in cards:
        folder = folders[part]
        where = f"`{folder}/`" if folder else "the root"
        card = f"[{folder}/README.md]({folder}/README.md)" if cards[part] and folder else ""
        rows.append(f"| {part} | {where} | {_WHAT[part]} | {card} |")
    folder = folders["tokenizer"]
    subfolder = f', subfolder="{folder}"' if folder else ""
    name = repo_id.rpartition("/")[2]
    return f"""# {name}

An EVATok checkpoint ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})): an adaptive-length video tokenizer, made with
`evatok_hf`, an independent implementation.

| part | where | what it does | card |
|---|---|---|---|
{chr(10).join(rows)}

## Use

{_use(repo_id, "generator" in cards)}
Without the package, from the code in this repository:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{repo_id}"{subfolder}, trust_remote_code=True)
```

## Citation

{_CITATION}"""


def _use(repo_id: str, with_generator: bool) -> str:
    text = f"""```python
from evatok_hf import VideoTokenizer

tokenizer = VideoTokenizer.from_pretrained("{repo_id}")
tokens = tokenizer.encode("video.mp4")
```
"""
    if with_generator:
        text += f"""
```python
from evatok_hf import EvatokPipeline

pipe = EvatokPipeline.from_pretrained("{repo_id}")
clips = pipe(num_videos=2, seeds=[0, 1]).frames
```
"""
    return text
