"""Fields of classes of options, and rules that are checked when options are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, field
from typing import Any


def option(help: str, default: Any = MISSING) -> Any:
    """A field of options with its help. A default may be a list, or a function that makes it; without one the option
    must be given."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(**{"default_factory" if callable(default) else "default": default}, metadata={"help": help})


def check_least(options: object, least: int, *names: str) -> None:
    """Raises ValueError for an option of these that is given and less, or holds something less."""
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise ValueError(f"--{name} must be at least {least}, got {number}.")


def check_among(options: object, **choices: Iterable[str]) -> None:
    """Raises ValueError for an option that is given and is, or holds, none of its choices."""
    for name, known in choices.items():
        value, known = getattr(options, name), list(known)
        given = value if isinstance(value, list) else [value]
        if wrong := [word for word in given if word is not None and word not in known]:
            some = "among" if isinstance(value, list) else "one of"
            raise ValueError(f"--{name} must be {some} {', '.join(known)}, got {', '.join(map(repr, wrong))}.")
