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
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import TemplateError, meta
from safetensors import safe_open
from transformers import PreTrainedModel

from evatok_hf import EvatokForCausalLM, EvatokModel, EvatokRouter
from evatok_hf.hub.card import environment
from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import MISFITS, named, parse_json, read_json, read_text, write_text
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
    measured = [(evaluation["fingerprint"], "benchmarks/quality/reconstruction.py")]
    measured += [(score["tokenizer"]["fingerprint"], "training/evaluate.py") for score in scores]
    return _render(
        "tokenizer.md",
        texts,
        **_facts(EvatokModel, checkpoint, *measured),
        evaluation={**evaluation, "data_name": texts["data_name"]},
        metrics=[name for name in evaluation["lengths"][0]["model"] if name != "psnr"],
        scores=scores,
        score_columns=list(dict.fromkeys(name for score in scores for name in score["metrics"] if name != "tokens")),
    )


def render_router_card(router: Path, curves: dict, texts: dict) -> str:
    """Raises ValueError when the curves are of another router."""
    facts = _facts(EvatokRouter, router, (curves["router"], "benchmarks/quality/assignment_curves.py"))
    return _render("router.md", texts, **facts, curves=curves, default_quality=DEFAULT_QUALITY)


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
    found = report["checkpoints"]["model"]["generator_fingerprint"]
    facts = _facts(EvatokForCausalLM, generator, (found, "benchmarks/generation/measure.py"))
    return _render("generator.md", texts, **facts, report=report)


def _facts(kind: type[PreTrainedModel], folder: Path, *measured: tuple[str, str]) -> dict[str, Any]:
    """The rows that every card has of a model and its training.

    Args:
        kind: of the model.
        folder: of its weights.
        measured: fingerprints of the weights that were measured, each with the script that did it.

    Raises:
        ValueError: other weights were measured.
    """
    fingerprint = kind.from_pretrained(folder).fingerprint()
    for found, script in measured:
        if found != fingerprint:
            raise ValueError(
                f"the figures are of weights {found}, {folder} holds {fingerprint}; run {script} on it again."
            )
    runs = [training := read_json(folder / "training.json")]
    while earlier := runs[0].get("continues"):
        runs.insert(0, earlier)
    with safe_open(next(folder.glob("*.safetensors")), framework="pt") as file:
        dtype = str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")
    of_hub = {
        field: list(dict.fromkeys(name for run in runs for name in run.get(field, [])))
        for field in ("datasets", "base_model")
    }
    return {
        "config": read_json(folder / "config.json"),
        "training": training,
        "runs": runs,
        "of_hub": of_hub,
        "fingerprint": fingerprint,
        "dtype": dtype,
    }


def _render(name: str, texts: dict, **facts: Any) -> str:
    """A template of `model_cards/`; the texts are templates of the same facts."""
    templates = environment(TEMPLATES)
    used = meta.find_undeclared_variables(templates.parse((TEMPLATES / name).read_text()))
    told = {
        key: templates.from_string(text).render(**facts) if isinstance(text, str) else text
        for key, text in texts.items()
        if key in used
    }
    return templates.get_template(name).render(**facts, **told)


def main(argv: list[str] | None = None) -> Path:
    args, _ = parse_arguments(CardArguments, __doc__, argv)
    files: dict[Path, str] = {}
    try:
        texts = load_texts(Path(args.texts))
        if args.checkpoint:
            checkpoint, evaluation = Path(args.checkpoint), read_text(args.evaluation)
            scores, found = [read_json(path) for path in args.scores], parse_json(evaluation, args.evaluation)
            files[checkpoint / "README.md"] = render_card(checkpoint, found, texts, scores)
            files[checkpoint / "evaluation.json"] = evaluation
            files[checkpoint / "sources.csv"] = texts["sources"]["file"].read_text()
            if scores:
                files[checkpoint / "scores.json"] = json.dumps(scores, indent=2) + "\n"
        if args.router:
            router, curves = Path(args.router), read_text(args.curves)
            files[router / "README.md"] = render_router_card(router, parse_json(curves, args.curves), texts)
            files[router / "curves.json"] = curves
        if args.generator:
            generator, report = Path(args.generator), read_json(args.generation)
            if args.predictions:
                report = with_predictions(report, read_json(args.predictions))
            files[generator / "README.md"] = render_generator_card(generator, report, texts)
            files[generator / "generation.json"] = json.dumps(report, indent=2) + "\n"
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error
    except ValueError:
        raise
    except (TemplateError, *MISFITS) as error:
        given = (args.texts, args.checkpoint, args.evaluation, *args.scores, args.router, args.curves)
        given += (args.generator, args.generation, args.predictions)
        raise ValueError(
            f"something that the card says is not in its files ({type(error).__name__}: {error}); look into "
            f"{', '.join(filter(None, given))}, and make what is damaged again."
        ) from error
    for target, content in files.items():
        if target.name == "README.md":
            ModelCard(content)  # the front matter must parse
        write_text(target, content)
        print(f"wrote {target}")
    return next(iter(files))


if __name__ == "__main__":
    run_script(main)
