"""Writes the model cards of a trained tokenizer, router and generator from their own files: no number is typed by hand.

Puts the measurements and the list of training videos beside them.

    python training/make_card.py --checkpoint runs/final/tokenizer --evaluation reconstruction.json \
        --router runs/router/router --curves out/curves/curves.json --texts model_cards/evatok_tiny.yaml
    python training/make_card.py --generator runs/generator/generator --generation out/generation.json \
        --texts model_cards/evatok_tiny.yaml
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError, meta
from safetensors import safe_open

from evatok_hf import EvatokForCausalLM, EvatokModel, EvatokRouter
from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import (
    MISFITS,
    checked,
    list_of,
    named,
    number,
    parse_json,
    read_json,
    read_text,
    record,
    ruled,
    table_of,
    text,
    whole,
    write_text,
)
from evatok_hf.models.modeling_evatok_router import DEFAULT_QUALITY

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.common.arguments import parse_arguments, read_yaml
from training.common.fields import option

TEMPLATES = Path(__file__).parents[1] / "model_cards"


@dataclass
class CardArguments:
    """Options of the card."""

    texts: str = option(
        "YAML with name, load_name, data_name, data_description, data_licence, intended_use, and sources: "
        "a CSV beside it of all training videos (folder, file, source, path, licence); for a generator also "
        "generator_data and generator_limits. Texts are templates of what the card is made of."
    )
    checkpoint: str | None = option("Folder of the trained tokenizer; the card becomes its README.md.", None)
    evaluation: str | None = option("JSON of benchmarks/quality/reconstruction.py for this checkpoint.", None)
    scores: list[str] = option("JSON files of training/evaluate.py for this checkpoint.", [])
    router: str | None = option("Folder of the trained router; it gets a card too.", None)
    curves: str | None = option("curves.json of benchmarks/quality/assignment_curves.py for this router.", None)

    generator: str | None = option("Folder of the trained generator.", None)
    generation: str | None = option("JSON of benchmarks/generation/measure.py for this generator.", None)
    predictions: str | None = option(
        "JSON of benchmarks/generation/measure.py --predictions_only, for that part of --generation.", None
    )

    def __post_init__(self):
        pairs = (("checkpoint", "evaluation"), ("router", "curves"), ("generator", "generation"))
        for model, figures in pairs:
            if (getattr(self, model) is None) != (getattr(self, figures) is None):
                raise ValueError(f"--{model} and --{figures} belong together; give both, or none.")
        if self.predictions is not None and self.generation is None:
            raise ValueError("--predictions replace a part of --generation; give that, too.")
        if not any(getattr(self, model) for model, _ in pairs):
            raise ValueError("nothing to write a card for; give --checkpoint, --router or --generator.")


@checked
@dataclass
class _Length:
    model: dict = ruled(table_of(number(-math.inf, math.inf)))


@checked
@dataclass
class _Evaluation:
    fingerprint: str = ruled(text())
    lengths: list = ruled(list_of(record(_Length), 1000, least=1))


@checked
@dataclass
class _Weights:
    fingerprint: str = ruled(text())


@checked
@dataclass
class _Score:
    tokenizer: dict = ruled(record(_Weights))
    metrics: dict


@checked
@dataclass
class _Curves:
    router: str = ruled(text())


@checked
@dataclass
class _Generated:
    generator_fingerprint: str = ruled(text())
    tokenizer_fingerprint: str = ruled(text())
    prediction: dict


@checked
@dataclass
class _Checkpoints:
    model: dict = ruled(record(_Generated))


@checked
@dataclass
class _Report:
    checkpoints: dict = ruled(record(_Checkpoints))
    test_clips: int = ruled(whole(0, 10**9))
    classes: list = ruled(list_of(text(), 100_000))
    aims: dict


def load_texts(path: Path) -> dict:
    """The texts, with a summary of the CSV in place of its name. Raises ValueError when one of them is incomplete."""
    with named(path):
        texts = read_yaml(path)
    if not isinstance(texts, dict) or not isinstance(texts.get("sources"), str):
        raise ValueError(f"{path} names no sources; give it `sources: FILE.csv`.")
    listed = path.parent / texts["sources"]
    with listed.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"source", "licence"} <= rows[0].keys():
        raise ValueError(f"{listed} must have columns source and licence, and at least one row.")
    licences = Counter(row["licence"] for row in rows).most_common()
    texts["sources"] = {
        "file": listed,
        "clips": len(rows),
        "places": len({row["source"] for row in rows}),
        "licences": ", ".join(f"{name} {count}" for name, count in licences),
    }
    return texts


def render_card(checkpoint: Path, evaluation: dict, texts: dict, scores: Sequence[dict] = ()) -> str:
    """Raises ValueError when the evaluation or one of the scores is of other weights."""
    fingerprint = EvatokModel.from_pretrained(checkpoint).fingerprint()
    measured = [(evaluation["fingerprint"], "benchmarks/quality/reconstruction.py")]
    measured += [(score["tokenizer"]["fingerprint"], "training/evaluate.py") for score in scores]
    for found, script in measured:
        if found != fingerprint:
            raise ValueError(
                f"the evaluation is of weights {found}, {checkpoint} holds {fingerprint}; run {script} on it again."
            )
    metrics = [name for name in evaluation["lengths"][0]["model"] if name != "psnr"]
    training = read_json(checkpoint / "training.json")
    runs = [training]
    while earlier := runs[0].get("continues"):
        runs.insert(0, earlier)
    return _render(
        "tokenizer.md",
        texts,
        config=read_json(checkpoint / "config.json"),
        training=training,
        runs=runs,
        of_hub=_of_the_hub(runs),
        evaluation={**evaluation, "data_name": texts["data_name"]},
        metrics=metrics,
        scores=scores,
        score_columns=list(dict.fromkeys(name for score in scores for name in score["metrics"] if name != "tokens")),
        fingerprint=fingerprint,
        dtype=_dtype(checkpoint),
    )


def render_router_card(router: Path, curves: dict, texts: dict) -> str:
    """Raises ValueError when the curves are of another router."""
    fingerprint = EvatokRouter.from_pretrained(router).fingerprint()
    if curves["router"] != fingerprint:
        raise ValueError(
            f"the curves are of router {curves['router']}, {router} holds {fingerprint}; "
            "run benchmarks/quality/assignment_curves.py on it again."
        )
    training = read_json(router / "training.json")
    return _render(
        "router.md",
        texts,
        config=read_json(router / "config.json"),
        training=training,
        of_hub=_of_the_hub([training]),
        curves=curves,
        fingerprint=fingerprint,
        dtype=_dtype(router),
        default_quality=DEFAULT_QUALITY,
    )


def with_predictions(report: dict, predictions: dict) -> dict:
    """A report whose part on predictions is that of another, and says by which command.

    Raises:
        ValueError: reports of other weights, or of other test clips.
    """
    ours, theirs = (one["checkpoints"]["model"] for one in (report, predictions))
    for name in ("tokenizer_fingerprint", "generator_fingerprint"):
        if ours[name] != theirs[name]:
            raise ValueError(f"the predictions are of {name} {theirs[name]}, the report is of {ours[name]}.")
    if report["test_clips"] != predictions["test_clips"] or report["classes"] != predictions["classes"]:
        raise ValueError("the predictions are of other test clips than the report.")
    measured = {name: predictions[name] for name in ("command", "machine", "torch")}
    model = ours | {"prediction": theirs["prediction"] | {"measured": measured}}
    aims = report["aims"] | predictions["aims"]
    return report | {"checkpoints": report["checkpoints"] | {"model": model}, "aims": aims}


def render_generator_card(generator: Path, report: dict, texts: dict) -> str:
    """Raises ValueError when the report is of another generator."""
    fingerprint = EvatokForCausalLM.from_pretrained(generator).fingerprint()
    if (found := report["checkpoints"]["model"]["generator_fingerprint"]) != fingerprint:
        raise ValueError(
            f"the report is of generator {found}, {generator} holds {fingerprint}; "
            "run benchmarks/generation/measure.py on it."
        )
    training = read_json(generator / "training.json")
    return _render(
        "generator.md",
        texts,
        config=read_json(generator / "config.json"),
        training=training,
        of_hub=_of_the_hub([training]),
        report=report,
        fingerprint=fingerprint,
        dtype=_dtype(generator),
    )


def _render(name: str, texts: dict, **facts: Any) -> str:
    """A template of `model_cards/`; the texts are templates of the same facts."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    used = meta.find_undeclared_variables(environment.parse((TEMPLATES / name).read_text()))
    told = {
        key: environment.from_string(text).render(**facts) if isinstance(text, str) else text
        for key, text in texts.items()
        if key in used
    }
    return environment.get_template(name).render(**facts, **told)


def _of_the_hub(runs: Sequence[dict]) -> dict[str, list[str]]:
    """Data sets and base models of the Hub that the runs noted."""
    return {
        field: list(dict.fromkeys(name for run in runs for name in run.get(field, [])))
        for field in ("datasets", "base_model")
    }


def _dtype(checkpoint: Path) -> str:
    """Of the weights on disk."""
    with safe_open(next(checkpoint.glob("*.safetensors")), framework="pt") as file:
        return str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")


def main(argv: list[str] | None = None) -> Path:
    args, _ = parse_arguments(CardArguments, __doc__, argv)
    files: dict[Path, str] = {}
    try:
        texts = load_texts(Path(args.texts))
        if args.checkpoint:
            checkpoint, evaluation = Path(args.checkpoint), read_text(args.evaluation)
            scores = [read_json(path, _Score) for path in args.scores]
            found = parse_json(evaluation, args.evaluation, _Evaluation)
            files[checkpoint / "README.md"] = render_card(checkpoint, found, texts, scores)
            files[checkpoint / "evaluation.json"] = evaluation
            files[checkpoint / "sources.csv"] = texts["sources"]["file"].read_text()
            if scores:
                files[checkpoint / "scores.json"] = json.dumps(scores, indent=2) + "\n"
        if args.router:
            router, curves = Path(args.router), read_text(args.curves)
            found = parse_json(curves, args.curves, _Curves)
            files[router / "README.md"] = render_router_card(router, found, texts)
            files[router / "curves.json"] = curves
        if args.generator:
            generator, report = Path(args.generator), read_json(args.generation, _Report)
            if args.predictions:
                report = with_predictions(report, read_json(args.predictions, _Report))
            files[generator / "README.md"] = render_generator_card(generator, report, texts)
            files[generator / "generation.json"] = json.dumps(report, indent=2) + "\n"
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error
    except ValueError:
        raise
    except (TemplateError, *MISFITS) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"something that the card says is not in its files ({reason}); make them again.") from error
    for target, content in files.items():
        if target.name == "README.md":
            ModelCard(content)  # the front matter must parse
        write_text(target, content)
        print(f"wrote {target}")
    return next(iter(files))


if __name__ == "__main__":
    run_script(main)
