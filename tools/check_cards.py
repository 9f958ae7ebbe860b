"""Checks cards without a network: `python tools/check_cards.py [README.md or folder ..]`, by default all that are here.

They are checked as the Hub would when they are pushed, and against the files beside them. Prints a line for each
problem; exit code 1 if there is one. The lists are those of huggingface/huggingface.js
(`packages/tasks/src/pipelines.ts`) and huggingface/hub-docs (`modelcard.md`, `datasetcard.md`,
`repositories-licenses.md`, `spaces-config-reference.md`), of August 2026.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from evatok_hf import bundled_checkpoints
from evatok_hf.hub.data_cards import LICENCES, SIZES, size_category

ROOT = Path(__file__).parents[1]
TASKS = frozenset(
    """text-classification token-classification table-question-answering question-answering zero-shot-classification
    translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech
    text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
    voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
    image-to-text image-to-image image-to-video unconditional-image-generation video-classification
    reinforcement-learning robotics tabular-classification tabular-regression tabular-to-text table-to-text
    multiple-choice text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text
    image-text-to-image image-text-to-video visual-question-answering document-question-answering
    zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d
    image-feature-extraction video-text-to-text keypoint-detection visual-document-retrieval any-to-any video-to-video
    other""".split()
)
_NOT_OF_MODELS = {"tabular-to-text", "table-to-text", "multiple-choice", "text-retrieval", "other"}
_NOT_OF_DATASETS = {"audio-text-to-text", "document-question-answering", "keypoint-detection", "video-to-video"}
_CREATORS = {"found", "crowdsourced", "expert-generated", "machine-generated", "no-annotation", "other"}
_COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
_HARDWARE = set(
    "cpu-basic cpu-upgrade t4-small t4-medium l4x1 l4x4 l40sx1 l40sx4 l40sx8 a10g-small a10g-large a10g-largex2 "
    "a10g-largex4 a100-large a100x4 a100x8 zero-a10g".split()
)
_SHARED = "license license_name license_link tags language".split()
KEYS = {
    "model": set(
        "library_name pipeline_tag datasets metrics base_model base_model_relation model-index thumbnail widget "
        "inference new_version".split()
    ).union(_SHARED),
    "dataset": set(
        "license_details annotations_creators language_creators language_details pretty_name size_categories "
        "source_datasets task_categories task_ids paperswithcode_id configs dataset_info extra_gated_fields "
        "extra_gated_prompt train-eval-index".split()
    ).union(_SHARED),
    "space": set(
        "title emoji colorFrom colorTo sdk python_version sdk_version suggested_hardware suggested_storage app_file "
        "app_build_command app_port base_path fullWidth header short_description models datasets thumbnail pinned "
        "hf_oauth hf_oauth_scopes hf_oauth_expiration_minutes hf_oauth_authorized_org disable_embedding "
        "startup_duration_timeout custom_headers preload_from_hub".split()
    ).union(_SHARED),
}
REQUIRED = {
    "model": "license library_name pipeline_tag tags datasets metrics".split(),
    "dataset": "license task_categories size_categories tags pretty_name configs dataset_info source_datasets".split(),
    "space": "title emoji colorFrom colorTo sdk".split(),
}
_LISTS = set(
    "tags datasets metrics task_categories size_categories source_datasets annotations_creators models".split()
)


def check_card(text: str, kind: str, folder: str | Path | None = None) -> list[str]:
    """Lists the faults of a card.

    Args:
        text: of README.md.
        kind: model, dataset or space.
        folder: of the repository; with it, links, data files and the figures of `model-index` are checked too.

    Returns:
        A sentence for each problem; none for a card that is right.
    """
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [f"the front matter is no YAML: {' '.join(str(error).split())}"]
    if not isinstance(data, dict):
        return ["there is no front matter between two lines ---"]
    place = None if folder is None else Path(folder)
    problems = [f"{key} is missing" for key in REQUIRED[kind] if key not in data]
    problems += [f"{key} is no key of a {kind} card" for key in data if key not in KEYS[kind]]
    problems += [
        f"{key} must be a list of words, without repetition"
        for key in _LISTS & data.keys()
        if not isinstance(data[key], list)
        or not all(isinstance(entry, str) for entry in data[key])
        or len(set(data[key])) < len(data[key])
    ]
    if problems:
        return problems
    problems += [*_licence(data), *_ids(data)]
    problems += {"model": _model, "dataset": _dataset, "space": _space}[kind](data, place)
    if kind != "space" and not any(re.fullmatch(r"arxiv:\d{4}\.\d{5}", tag) for tag in data["tags"]):
        problems.append("tags do not name the paper, arxiv:ID")
    return problems if place is None else [*problems, *_links(text[match.end() :], place)]


def kind_of(text: str) -> str:
    """model, dataset or space, by what the front matter speaks of."""
    front = text.split("\n---", 1)[0]
    if re.search(r"^sdk:", front, re.MULTILINE):
        return "space"
    return "dataset" if re.search(r"^(dataset_info|size_categories|configs):", front, re.MULTILINE) else "model"


def _licence(data: dict[str, Any]) -> Iterator[str]:
    if "license" not in data:
        return
    if data["license"] not in LICENCES:
        yield f"license {data['license']!r} is none of the Hub's"
    elif data["license"] == "other" and not data.get("license_name"):
        yield "license other needs a license_name"


def _ids(data: dict[str, Any]) -> Iterator[str]:
    for key in ("base_model", "datasets", "models"):
        names = data.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            try:
                validate_repo_id(name)
            except HFValidationError:
                yield f"{key} {name!r} is no name of a repository"


def _one_of(data: dict[str, Any], key: str, words: set[str] | frozenset[str] | list[str]) -> Iterator[str]:
    values = data.get(key, [])
    for value in values if isinstance(values, list) else [values]:
        if value not in words:
            yield f"{key} {value!r} is none of the Hub's"


def _model(data: dict[str, Any], folder: Path | None) -> Iterator[str]:
    yield from _one_of(data, "pipeline_tag", TASKS - _NOT_OF_MODELS)
    if not re.fullmatch(r"[a-z0-9][\w.-]*", str(data["library_name"])):
        yield f"library_name {data['library_name']!r} is no name of a library"
    try:
        results = ModelCardData(**data).eval_results or []
    except (ValueError, KeyError, TypeError) as error:
        yield f"model-index does not parse: {' '.join(str(error).split())}"
        return
    known = [] if folder is None else list(_figures(folder))
    for result in results:
        value = result.metric_value
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"model-index: {result.metric_name} is {value!r}, no number"
        elif folder is not None and not any(
            name == result.metric_type and _rounds_to(figure, value) for name, figure in known
        ):
            yield f"model-index: {result.metric_name} is {value}, but no {result.metric_type} in the JSON beside it"


def _figures(folder: Path) -> Iterator[tuple[str, float]]:
    """Every number of the JSON files of a repository, with the last key on the way to it."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict):
            for key, own in value.items():
                yield from walk(own, name if key == "value" else key)
        elif isinstance(value, list):
            for own in value:
                yield from walk(own, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value

    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        yield from walk(json.loads(path.read_text(encoding="utf-8")), "")


def _rounds_to(figure: float, shown: float) -> bool:
    places = max(2, len(repr(shown).partition(".")[2]))  # YAML reads 17.50 as 17.5
    return float(f"{figure:.{places}f}") == shown


def _dataset(data: dict[str, Any], folder: Path | None) -> Iterator[str]:
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict

    yield from _one_of(data, "task_categories", TASKS - _NOT_OF_DATASETS)
    yield from _one_of(data, "size_categories", SIZES)
    yield from _one_of(data, "annotations_creators", _CREATORS)
    try:
        infos = DatasetInfosDict.from_dataset_card_data(DatasetCardData(**data))
        info: DatasetInfo = infos["default"]
        counted = {name: split.num_examples for name, split in (info.splits or {}).items()}
        (config,) = data["configs"]
        named = {entry["split"]: entry["path"] for entry in config["data_files"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"configs and dataset_info do not parse: {' '.join(str(error).split()) or type(error).__name__}"
        return
    if not info.features:
        yield "dataset_info names no features"
    if counted.keys() != named.keys():
        yield f"dataset_info has splits {sorted(counted)}, configs {sorted(named)}"
    rows = sum(counted.values())
    if counted and data["size_categories"] != [size_category(rows)]:
        yield f"size_categories {data['size_categories']} are not those of {rows} rows"
    for split, pattern in named.items() if folder is not None else ():
        if not any(folder.glob(pattern)):
            yield f"split {split}: there is no file {pattern}"


def _space(data: dict[str, Any], folder: Path | None) -> Iterator[str]:
    words: dict[str, set[str]] = {
        "sdk": {"gradio", "docker", "static"},
        "colorFrom": _COLOURS,
        "colorTo": _COLOURS,
        "header": {"mini", "default"},
        "suggested_hardware": _HARDWARE,
    }
    for key, allowed in words.items():
        yield from _one_of(data, key, allowed)
    if data["sdk"] == "gradio":
        yield from (f"{key} is missing" for key in ("sdk_version", "app_file") if key not in data)
    forms: dict[str, Callable[[Any], bool]] = {
        "sdk_version": lambda value: bool(re.fullmatch(r"\d+\.\d+(\.\d+)?", str(value))),
        "python_version": lambda value: bool(re.fullmatch(r"3\.\d+(\.\d+)?", str(value))),
        "emoji": lambda value: isinstance(value, str) and 0 < len(value) <= 8 and not re.search(r"[\x00-\x7f]", value),
        "short_description": lambda value: isinstance(value, str) and len(value) <= 60,
        "pinned": lambda value: isinstance(value, bool),
    }
    for key, is_right in forms.items():
        if key in data and not is_right(data[key]):
            yield f"{key} {data[key]!r} is not what the Hub takes"
    if folder is not None and "app_file" in data and not (folder / str(data["app_file"])).is_file():
        yield f"app_file {data['app_file']} is not there"


def _links(body: str, folder: Path) -> Iterator[str]:
    """Links and pictures that lead to no file of the repository."""
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose)):
        if not re.match(r"[a-z]+:|#|//", target) and not (folder / target.partition("#")[0]).exists():
            yield f"the link to {target} leads nowhere"


# --- the command ------------------------------------------------------------------------------------------------------


def own_cards() -> list[Path]:
    """Those of the bundled checkpoints, and of Spaces."""
    bundled = (path for folder in bundled_checkpoints().values() for path in Path(folder).glob("*/README.md"))
    return sorted([*bundled, *ROOT.glob("spaces/*/README.md")])


def main(argv: list[str]) -> int:
    found = 0
    for path in map(Path, argv or own_cards()):
        path = path / "README.md" if path.is_dir() else path
        if not path.is_file():
            print(f"{path}: there is no such card", file=sys.stderr)
            return 1
        text = path.read_text(encoding="utf-8")
        for problem in check_card(text, kind_of(text), path.parent):
            print(f"{path}: {problem}", file=sys.stderr)
            found += 1
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
