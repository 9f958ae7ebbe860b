"""Cards: what the Hub would refuse is found, all cards of this package pass, and no figure is typed by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import check_cards
import pytest
import yaml
from check_cards import check_card, kind_of

from evatok_hf import default_checkpoint
from evatok_hf.hub.data_cards import size_category
from evatok_hf.hub.push import collect

ROOT = Path(__file__).parents[2]

TEMPLATES = sorted([*(ROOT / "model_cards").glob("*.md"), ROOT / "src/evatok_hf/assets/dataset_tokens.md"])
MODEL = {
    "license": "mit",
    "library_name": "evatok_hf",
    "pipeline_tag": "video-to-video",
    "tags": ["arxiv:2603.12267"],
    "datasets": [],
    "metrics": ["psnr"],
}
FEATURES = [{"name": "ids", "list": "int32"}]
DATASET = {
    "license": "cc-by-4.0",
    "task_categories": ["text-to-video"],
    "size_categories": ["1K<n<10K"],
    "tags": ["arxiv:2603.12267"],
    "pretty_name": "Tokens",
    "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    "dataset_info": {"features": FEATURES, "splits": [{"name": "train", "num_bytes": 1, "num_examples": 1000}]},
    "source_datasets": ["original"],
}
SPACE = {
    "title": "EVATok",
    "emoji": "🎞️",
    "colorFrom": "blue",
    "colorTo": "gray",
    "sdk": "gradio",
    "sdk_version": "6.31.0",
    "app_file": "app.py",
}


def card(data: dict, body: str = "# Title\n") -> str:
    return f"---\n{yaml.safe_dump(data, allow_unicode=True)}---\n\n{body}"


def test_the_cards_of_this_package_are_right(capsys):
    assert len(check_cards.own_cards()) >= 3
    assert check_cards.main([]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("parts", [["tokenizer"], ["tokenizer", "router"], ["tokenizer", "router", "generator"]])
def test_the_card_of_a_whole_repository_is_right(parts, tmp_path):
    folder = tmp_path / "checkpoint"
    for part in parts:
        shutil.copytree(Path(default_checkpoint("generator")) / part, folder / part)
    for path, own in collect(folder, "someone/evatok-tiny").files.items():
        target = tmp_path / "repository" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(own if isinstance(own, bytes) else own.read_bytes())
    text = (tmp_path / "repository" / "README.md").read_text()
    assert check_card(text, "model", tmp_path / "repository") == []
    assert text.count("trust_remote_code=True") == len(parts) + 1


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("model", {}, None),
        ("model", {"license": "Apache 2"}, "license 'Apache 2' is none"),
        ("model", {"license": "other"}, "needs a license_name"),
        ("model", {"license": "other", "license_name": "mine"}, None),
        ("model", {"license": None}, "license is missing"),
        ("model", {"pipeline_tag": "video-tokenization"}, "pipeline_tag 'video-tokenization' is none"),
        ("model", {"pipeline_tag": "other"}, "pipeline_tag 'other' is none"),
        ("model", {"library_name": "Evatok HF"}, "no name of a library"),
        ("model", {"licence": "mit"}, "licence is no key of a model card"),
        ("model", {"tags": "video"}, "tags must be a list"),
        ("model", {"tags": ["video", "video"]}, "without repetition"),
        ("model", {"tags": ["video"]}, "do not name the paper"),
        ("model", {"datasets": ["clips/a/b"]}, "datasets 'clips/a/b' is no name"),
        ("model", {"base_model": "someone/evatok"}, None),
        ("model", {"model-index": [{"name": "x", "results": [{"task": {"type": "y"}}]}]}, "does not parse"),
        ("dataset", {}, None),
        ("dataset", {"size_categories": ["n<1K"]}, "not those of 1000 rows"),
        ("dataset", {"size_categories": ["many"]}, "size_categories 'many' is none"),
        ("dataset", {"task_categories": ["video-to-video"]}, "task_categories 'video-to-video' is none"),
        ("dataset", {"annotations_creators": ["us"]}, "annotations_creators 'us' is none"),
        ("dataset", {"dataset_info": {"features": FEATURES}}, "dataset_info has splits [], configs ['train']"),
        ("dataset", {"configs": [{"config_name": "default"}]}, "do not parse"),
        ("dataset", {"pretty_name": None}, "pretty_name is missing"),
        ("space", {}, None),
        ("space", {"sdk": "flask"}, "sdk 'flask' is none"),
        ("space", {"sdk_version": "latest"}, "sdk_version 'latest' is not"),
        ("space", {"colorTo": "grey"}, "colorTo 'grey' is none"),
        ("space", {"emoji": "film"}, "emoji 'film' is not"),
        ("space", {"short_description": "x" * 61}, "short_description"),
        ("space", {"app_file": None}, "app_file is missing"),
        ("space", {"models": ["a b"]}, "models 'a b' is no name"),
        ("space", {"suggested_hardware": "h1000"}, "suggested_hardware 'h1000' is none"),
    ],
)
def test_what_the_hub_would_refuse(kind, change, problem):
    data = {**{"model": MODEL, "dataset": DATASET, "space": SPACE}[kind], **change}
    text = card({key: value for key, value in data.items() if value is not None})
    found = check_card(text, kind)
    assert kind_of(text) == kind
    assert found == [] if problem is None else problem in found[0], found


def test_no_front_matter():
    assert check_card("# Title\n", "model") == ["there is no front matter between two lines ---"]
    assert "no YAML" in check_card("---\ntags: [a\n---\n", "model")[0]


def test_what_lies_beside_a_card(tmp_path):
    result = {"task": {"type": "video"}, "dataset": {"type": "x", "name": "x"}}
    metrics = [{"type": "psnr", "name": "PSNR", "value": 17.5}, {"type": "psnr", "name": "other", "value": 17.26}]
    text = card({**MODEL, "model-index": [{"name": "x", "results": [{**result, "metrics": metrics}]}]},
                "[a](there.md) ![b](gone.png) [c](https://x.org) [d](#e)\n```\n[f](code.md)\n```\n")  # fmt: skip
    (tmp_path / "there.md").touch()
    (tmp_path / "evaluation.json").write_text(json.dumps({"lengths": [{"psnr": 17.4999, "ssim": 17.26}]}))
    assert check_card(text, "model", tmp_path) == [
        "model-index: other is 17.26, but no psnr in the JSON beside it",
        "the link to gone.png leads nowhere",
    ]
    assert check_card(card(DATASET), "dataset", tmp_path) == ["split train: there is no file data/*.parquet"]
    assert check_card(card(SPACE), "space", tmp_path) == ["app_file app.py is not there"]


def test_the_command(tmp_path, capsys):
    assert check_cards.main([str(tmp_path)]) == 1 and "there is no such card" in capsys.readouterr().err
    (tmp_path / "README.md").write_text(card({**DATASET, "license": "x"}))
    assert check_cards.main([str(tmp_path)]) == 1
    assert f"{tmp_path / 'README.md'}: license 'x' is none of the Hub's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words"), [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**13, "n>1T")]
)
def test_sizes(rows, words):
    assert size_category(rows) == words


# What may stand in a card's own words: names, definitions of columns and of quality, and the notice of a licence.
NAMES = (
    r"2603\.12267 apache-2\.0 BSD-3-Clause fd-transnetv2 bfloat16 float32 bf16 SHA-256 H\.264 x264 MP4 uint8 UCF-101 "
    r"1D L1 2001-2018 -1\swithout and\s1\sif\smirrored 0\.\.1 \(quality\s[01]\) stage\s[1-4] tokens,\s0\sto 0\sto\s2, "
    r"95\s%\sintervals falling\sto\s0\sat 8\sbits\sa\svalue \|\s5\s%\s\| \|\s95\s%\s\|"
).split()


def own_words(template: str) -> str:
    """A template without what is filled in and without code, but with the words that are chosen from."""
    chosen = [
        word for part in re.findall(r"\{[{%](.*?)[%}]\}", template, re.DOTALL) for word in re.findall(r'"(.*?)"', part)
    ]
    words = [re.sub(r"%[.\d]*[a-z]|\{.*?\}", "", word) for word in chosen]
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", template, flags=re.DOTALL)
    text = re.sub(r"^ *```.*?^ *```|`[^`]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join([text, *words])


@pytest.mark.parametrize("path", [*TEMPLATES, ROOT / "model_cards" / "evatok_tiny.yaml"], ids=lambda path: path.stem)
def test_no_figure_of_a_card_is_typed_by_hand(path):
    words = own_words(path.read_text())
    for name in NAMES:
        words = re.sub(name, "", words)
    typed = [line.strip() for line in words.splitlines() if re.search(r"\d", line)]
    assert typed == []


def test_a_typed_figure_is_found():
    assert (
        own_words("{{ a }} clips, `b 1`, 7 of them {% if x %}{{ 2 }}{% endif %}").split()
        == "clips, , 7 of them".split()
    )
    assert "12" in own_words('{{ "12 clips" if x else "%.2f" | format(y) }}')
