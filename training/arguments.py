"""Arguments of the training scripts: a YAML file, every field of which the command line can override."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser

_Arguments = TypeVar("_Arguments")


def parse_arguments(
    kind: type[_Arguments], description: str, argv: Sequence[str] | None = None
) -> tuple[_Arguments, dict]:
    """Reads `--config FILE.yaml` (optional) and then the options, which win.

    Returns:
        The filled dataclass, and all of its fields as a dict for logging and for the model card.

    Raises:
        SystemExit: code 2 with a one-line message for unknown options, unknown YAML fields or wrong values.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(kind, description=description, conflict_handler="resolve")
    parser.add_argument("--config", type=Path, help="YAML file of options; the command line overrides it.")
    chosen = parser.parse_known_args(argv)[0].config if "--help" not in argv and "-h" not in argv else None
    if chosen is not None:
        try:
            values = yaml.safe_load(chosen.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"cannot read --config {chosen}: {' '.join(str(error).split())}")
        known = {field.name for field in dataclasses.fields(kind)}
        if not isinstance(values, dict) or set(values) - known:
            unknown = sorted(set(values) - known) if isinstance(values, dict) else "no mapping of options"
            parser.error(f"{chosen} has unknown fields: {unknown}; known are {sorted(known)}.")
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    namespace = parser.parse_args(argv)
    del namespace.config
    try:
        arguments = kind(**vars(namespace))
    except ValueError as error:
        parser.error(str(error))
    return arguments, dataclasses.asdict(arguments)
