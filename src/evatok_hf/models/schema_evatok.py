"""What files may say: every field has a rule, which is held against its value when a file is read.

A kind of file is a dataclass under `checked`, huggingface_hub's `strict` with errors in one line; configurations of
models are such dataclasses, too. Its fields are `ruled(rule)`, a rule being one of the functions below. `read_json`
reads a file and holds it against its kind.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError

T = TypeVar("T")

# Of a text file that is read whole: the index of a very large checkpoint has some megabytes.
MAX_BYTES = 64 << 20
# What interpreting a value may fail with that is not what it should be, in code that does not check it.
MISFITS = (ArithmeticError, AttributeError, AssertionError, LookupError, RecursionError, TypeError, ValueError)


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words, and whether one is that. A call raises ValueError for a value that is not."""

    words: str
    allows: Callable[[Any], bool]

    def __call__(self, value: Any) -> None:
        if not self.allows(value):
            raise ValueError(f"must be {self.words}, got {_shown(value)}")


def whole(low: int, high: int) -> Rule:
    """A whole number from `low` to `high`."""
    return Rule(
        f"a whole number from {low:,} to {high:,}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def number(low: float, high: float, above: bool = False) -> Rule:
    """A finite number from `low` to `high`; with `above` not `low` itself."""
    return Rule(
        f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}",
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and low <= value <= high
            and not (above and value == low)
        ),
    )


def flag() -> Rule:
    """True or false."""
    return Rule("true or false", lambda value: isinstance(value, bool))


def text(most: int = 4096) -> Rule:
    """A text of at most so many characters."""
    return Rule(f"a text of at most {most:,} characters", lambda value: isinstance(value, str) and len(value) <= most)


def one_of(*choices: str) -> Rule:
    """One of some words."""
    return Rule(f"one of {choices}", lambda value: isinstance(value, str) and value in choices)


def optional(rule: Rule) -> Rule:
    """That, or nothing."""
    return Rule(f"{rule.words}, or nothing", lambda value: value is None or rule.allows(value))


def list_of(rule: Rule, most: int, least: int = 0) -> Rule:
    """A list of such values."""
    count = f"{least:,} to {most:,}" if least else f"at most {most:,}"
    return Rule(
        f"a list of {count} values, each {rule.words}",
        lambda value: isinstance(value, list | tuple) and least <= len(value) <= most and all(map(rule.allows, value)),
    )


def table_of(rule: Rule, most: int = 1_000_000) -> Rule:
    """A table from names to such values."""
    return Rule(
        f"a table of at most {most:,} entries, each {rule.words}",
        lambda value: (
            isinstance(value, Mapping)
            and len(value) <= most
            and all(isinstance(name, str) and rule.allows(entry) for name, entry in value.items())
        ),
    )


def plain(depth: int = 8) -> Rule:
    """Whatever JSON can say, but not nested deeper than that."""
    return Rule(f"numbers, words, lists and tables nested at most {depth} deep", lambda value: _is_plain(value, depth))


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(entry, depth - 1) for entry in value)
    if isinstance(value, Mapping):
        return depth > 0 and all(isinstance(name, str) and _is_plain(value[name], depth - 1) for name in value)
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


@dataclass(frozen=True)
class _Record(Rule):
    kind: type

    def __call__(self, value: Any) -> None:
        if not isinstance(value, Mapping):
            super().__call__(value)
        try:
            check(self.kind, value)
        except ValueError as error:
            raise ValueError(f"is wrong: {error}") from error


def record(kind: type) -> Rule:
    """A table with the fields of a class under `checked`."""

    def allows(value: Any) -> bool:
        try:
            check(kind, value)
        except ValueError:
            return False
        return True

    return _Record(f"a table with {', '.join(field.name for field in fields(kind))}", allows, kind)


def ruled(rule: Rule, default: Any = MISSING) -> Any:
    """A field with a rule; without a default it must be there."""
    return validated_field(rule, default=default)


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except (RecursionError, ValueError):  # nested too deep; a number of too many digits
        return f"a {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:76]} .."


# --- kinds of files ---------------------------------------------------------------------------------------------------


def checked(kind: type[T]) -> type[T]:
    """`strict` of huggingface_hub for a dataclass, also for a configuration of transformers: every value is held
    against the rule and the type of its field, now and when it is set. What does not fit is a ValueError of one line
    that begins with the name of the field."""
    kind = strict(kind)
    set_value, initialize = kind.__setattr__, kind.__init__

    def __setattr__(self: Any, name: str, value: Any) -> None:
        try:
            set_value(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"{name} {_reason(kind, name, value, error)}.") from error

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            initialize(self, *args, **kwargs)
        except StrictDataclassError as error:  # of fields that do not fit together
            raise ValueError(" ".join(str(error.__cause__ or error).split())) from error

    kind.__setattr__, kind.__init__ = __setattr__, __init__
    return kind


def _reason(kind: type, name: str, value: Any, error: BaseException) -> str:
    for rule in kind.__dataclass_fields__[name].metadata.get("validator", ()):
        try:
            rule(value)
        except ValueError as unfit:
            return str(unfit)
    return f"does not fit ({' '.join(str(error.__cause__).split())[:200]})"


def check(kind: type[T], values: Any) -> T:
    """An object of a class under `checked`; fields that it does not know are left out.

    Raises:
        ValueError: no table, a field that is missing, or one that breaks its rule.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a table was expected, got {_shown(values)}.")
    for field in fields(kind):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{field.name} is missing.")
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


# --- reading ----------------------------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike, most: int = MAX_BYTES) -> str:
    """A text file, whole.

    Raises:
        ValueError: more than so many bytes, or no UTF-8.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, too many for such a file; get another copy.")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged (byte {error.start} is no UTF-8); get another copy.") from error


def parse_json(content: str | bytes, where: object, kind: type | None = None) -> dict[str, Any]:
    """A JSON object, held against a class under `checked` if one is named -> all that it says.

    Raises:
        ValueError: no such object, or one that breaks a rule; it begins with `where`.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where} is damaged ({reason}); get another copy.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} is damaged (it holds a {type(values).__name__}, no table); get another copy.")
    if kind is not None:
        with named(where):
            check(kind, values)
    return values


def read_json(path: str | os.PathLike, kind: type | None = None) -> dict[str, Any]:
    """The object in a JSON file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(Path(path)), path, kind)


@contextmanager
def named(place: object) -> Iterator[None]:
    """Whatever a value is misfit for inside, as a ValueError of one line that begins with the file it is from."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{place} is damaged (it is nested too deep); get another copy.") from error
    except MISFITS as error:
        if isinstance(error, ValueError) and str(error).startswith(str(place)):
            raise
        raise ValueError(f"{place} is damaged: {_message(error)}; mend it, or get another copy.") from error


def _message(error: BaseException) -> str:
    message = " ".join(str(error).split())[:500].rstrip(".")
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"


def refuse_hidden(values: Collection[str], kind: type, known: Collection[str] = ()) -> None:
    """Raises ValueError where a name that a file gives would hide an attribute of a class.

    Args:
        values: the names.
        kind: the class.
        known: names that may.
    """
    for name in values:
        own = inspect.getattr_static(kind, name, None)
        settable = isinstance(own, property) and own.fset is not None
        if own is not None and not settable and name not in known:
            raise ValueError(f"{name} is no field; leave it out.")
