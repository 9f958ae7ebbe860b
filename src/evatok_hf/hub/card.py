"""The card of a whole repository, made from the cards of its parts, or from the record of their training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .remote_code import PARTS, part_in

PAPER = "2603.12267"
TEMPLATE = Path(__file__).parents[1] / "assets" / "repository.md.jinja"


def render(template: Path, /, **facts: object) -> str:
    """The text that a Jinja template makes of these facts, none missing."""
    return environment(template.parent).get_template(template.name).render(facts)


def environment(folder: Path) -> Environment:
    """The Jinja templates of a folder, which do without no fact."""
    return Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, keep_trailing_newline=True)


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
        run = (runs or {}).get(part, {})
        noted = {field: run[field] for field in ("datasets", "base_model") if run.get(field)}  # of the Hub, by training
        try:
            data[part] = ModelCard(text).data.to_dict() if text else noted
        except Exception as error:  # whatever YAML there is
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the front matter of the {part}'s card does not parse ({reason}); mend it.") from error
    told = {part: run for part, run in (runs or {}).items() if not cards[part]}
    return render(
        TEMPLATE,
        front_matter=_front_matter(data),
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        paper=PAPER,
        cards=cards,
        folders=folders,
        runs={part: {"rows": _training(run), "command": run.get("command")} for part, run in told.items()},
    )


def card_of_folder(repo_id: str, folder: Path) -> str:
    """The card for a folder that a model, a processor or a pipeline was saved into."""
    folders = {part: part for part in PARTS.values() if (folder / part / "config.json").is_file()}
    if not folders:
        folders = {part_in(folder) or "tokenizer": ""}  # a processor by itself is of a tokenizer
    return make_card(repo_id, dict.fromkeys(folders), folders)


def _front_matter(parts: Mapping[str, dict[str, Any]]) -> str:
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


def _training(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures that a run notes of itself, at its end or before."""
    arguments, rows = run.get("arguments", {}), []
    if "steps" in run:
        asked = arguments.get("steps")
        rows.append(("steps", f"{run['steps']:,}" + (f" of {asked:,}" if asked and asked != run["steps"] else "")))
    rows += [(name, f"{run[name]:,}") for name in ("clips", "sequences", "parameters") if name in run]
    rows += [(name, str(run[name])) for name in ("seed", "seconds", "machine", "torch") if name in run]
    held_out = {name.removeprefix("val/"): value for name, value in (run.get("held_out") or {}).items()}
    rows += [(f"held out, {name}", f"{value:.4g}") for name, value in held_out.items()]
    return rows
