"""Writes the model card of a trained tokenizer from its own files: no number in it is typed by hand.

    python training/make_card.py --checkpoint runs/tiny/tokenizer --evaluation reconstruction.json \
        --texts model_cards/evatok_tiny.yaml
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open

from evatok_hf import EvatokModel

sys.path.insert(0, str(Path(__file__).parent))
from arguments import parse_arguments

TEMPLATES = Path(__file__).parents[1] / "model_cards"


@dataclass
class CardArguments:
    """Options of the card."""

    checkpoint: str = field(metadata={"help": "Folder of the trained tokenizer; the card becomes its README.md."})
    evaluation: str = field(metadata={"help": "JSON of benchmarks/reconstruction.py for this checkpoint."})
    texts: str = field(
        metadata={"help": "YAML with name, load_name, data_name, data_description, data_licence, intended_use."}
    )


def render_card(checkpoint: Path, evaluation: dict, texts: dict) -> str:
    """Raises ValueError when the evaluation is of other weights."""
    fingerprint = EvatokModel.from_pretrained(checkpoint).fingerprint()
    if evaluation["fingerprint"] != fingerprint:
        raise ValueError(
            f"the evaluation is of weights {evaluation['fingerprint']}, {checkpoint} holds {fingerprint}; "
            "run benchmarks/reconstruction.py on it again."
        )
    with safe_open(next(checkpoint.glob("*.safetensors")), framework="pt") as file:
        dtype = str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    metrics = [name for name in evaluation["lengths"][0]["model"] if name != "psnr"]
    return environment.get_template("tokenizer.md").render(
        config=json.loads((checkpoint / "config.json").read_text()),
        training=json.loads((checkpoint / "training.json").read_text()),
        evaluation={**evaluation, "data_name": texts["data_name"]},
        metrics=metrics,
        fingerprint=fingerprint,
        dtype=dtype,
        **texts,
    )


def main(argv: list[str] | None = None) -> Path:
    args, _ = parse_arguments(CardArguments, __doc__, argv)
    checkpoint = Path(args.checkpoint)
    try:
        evaluation = json.loads(Path(args.evaluation).read_text())
        texts = yaml.safe_load(Path(args.texts).read_text())
        text = render_card(checkpoint, evaluation, texts)
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error
    ModelCard(text)  # the front matter must parse
    target, temporary = checkpoint / "README.md", checkpoint / ".README.md.partial"
    temporary.write_text(text)
    os.replace(temporary, target)
    print(f"wrote {target}")
    return target


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
