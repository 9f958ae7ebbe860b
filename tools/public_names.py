"""Writes docs/api/names.md: every public name of the package, with its arguments.

    python tools/public_names.py

Public are the names in `__all__` of the package and of its folders, and those that the pages in docs/api describe. A
test compares the page with the code, so that no name or argument comes, goes or changes unseen.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

PACKAGE = "evatok_hf"
API = Path(__file__).parents[1] / "docs" / "api"
PAGE = API / "names.md"
HEAD = """# Every name

Made by `python tools/public_names.py`, in the order of the alphabet. What is not here may change without notice; what
is here keeps working for a release after it was renamed, and warns of that (`FutureWarning`) when it is used.
"""


def names() -> dict[str, list[str]]:
    """Module -> its public names, each once: where it is shortest to import."""
    source = Path(import_module(PACKAGE).__file__).parent
    folders = sorted(path.parent.name for path in source.glob("*/__init__.py"))
    wanted = [
        (module, name)
        for module in (PACKAGE, *(f"{PACKAGE}.{folder}" for folder in folders))
        for name in getattr(import_module(module), "__all__", ())
    ]
    pages = (path.read_text() for path in sorted(API.glob("*.md")) if path != PAGE)
    wanted += [tuple(path.rsplit(".", 1)) for page in pages for path in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    found: dict[str, list[str]] = {}
    seen: set[int] = set()
    for module, name in wanted:
        value = getattr(import_module(module), name)
        if id(value) not in seen:
            seen.add(id(value))
            found.setdefault(module, []).append(name)
    return {module: sorted(own, key=str.lower) for module, own in sorted(found.items())}


def arguments(function: Any) -> str:
    """Names and defaults of the arguments in brackets; nothing for what has none of its own."""
    if not inspect.isroutine(function) and not inspect.isclass(function):
        return ""
    if inspect.isclass(function) and issubclass(function, Exception):
        return ""
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls")
    ]
    if inspect.isclass(function) and issubclass(function, PretrainedConfig):
        return f"({', '.join(settings(function))})"
    return re.sub(r"<.*? at 0x\w+>|<factory>", "..", str(inspect.Signature(parameters)))


def settings(kind: type) -> list[str]:
    """Fields of a configuration that are written in the package, with their defaults."""
    own = {name for base in kind.__mro__ if base.__module__.startswith(PACKAGE) for name in vars(base)}
    return [f"{entry.name}={getattr(kind, entry.name)!r}" for entry in fields(kind) if entry.name in own]


def members(kind: type) -> Iterator[str]:
    """Public methods and properties of a class that are written in the package, the constructor left out."""
    own = {
        name: value
        for base in reversed(kind.__mro__)
        if base.__module__.startswith(PACKAGE)
        for name, value in vars(base).items()
        if not name.startswith("_") or name == "__call__"
    }
    for name, value in sorted(own.items()):
        if isinstance(value, property | cached_property):
            yield f"`{name}`"
        elif isinstance(value, classmethod | staticmethod) or inspect.isfunction(value):
            yield f"`{name}{arguments(getattr(kind, name))}`"


def page() -> str:
    lines = [HEAD]
    for module, own in names().items():
        lines.append(f"## {module}\n")
        for name in own:
            value = getattr(import_module(module), name)
            lines.append(f"- `{name}{arguments(value)}`")
            lines += [f"    - {member}" for member in members(value)] if inspect.isclass(value) else []
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
