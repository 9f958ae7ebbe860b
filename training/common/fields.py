"""Options of scripts: their fields, and the checks that classes of options make when options are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import MISSING, field
from typing import Any


def option(help: str, default: Any = MISSING, **more: Any) -> Any:
    """A field of options with its help, and whatever else argparse shall know. A default may be a list, or a function
    that makes it; without one the option must be given."""
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


class OptionClass:
    """Base of dataclasses of options. A subclass that gives an option another default keeps its help."""

    def __init_subclass__(cls):
        inherited = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= base.__dict__.get("__dataclass_fields__", {})
        for name in cls.__dict__.get("__annotations__", {}).keys() & inherited.keys() & cls.__dict__.keys():
            given, metadata = cls.__dict__[name], inherited[name].metadata
            if not isinstance(given, dataclasses.Field):
                setattr(cls, name, field(default=given, metadata=metadata))
            elif not given.metadata:
                given.metadata = metadata

    def __post_init__(self):
        """Checks the options; subclasses add theirs."""

    def at_least(self, least: int, *names: str) -> None:
        """Raises ValueError for an option of these that is given and less, or holds something less."""
        for name in names:
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and number < least:
                    raise ValueError(f"--{name} must be at least {least}, got {number}.")

    def above_zero(self, *names: str) -> None:
        """Raises ValueError for an option of these that is given and no finite number above 0."""
        for name in names:
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name} must be more than 0, got {value}.")

    def fractions(self, *names: str) -> None:
        """Raises ValueError for an option of these that is no share or probability."""
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in [0, 1], got {getattr(self, name)}.")

    def one_of(self, **choices: Iterable[str]) -> None:
        """Raises ValueError for an option that is given and is, or holds, none of its choices."""
        for name, known in choices.items():
            value, known = getattr(self, name), list(known)
            given = value if isinstance(value, list) else [value]
            if wrong := [word for word in given if word is not None and word not in known]:
                some = "among" if isinstance(value, list) else "one of"
                raise ValueError(f"--{name} must be {some} {', '.join(known)}, got {', '.join(map(repr, wrong))}.")
