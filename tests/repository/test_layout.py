"""Which folder may import which, and that files which travel with weights are where they are looked for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import evatok_hf

PACKAGE = Path(evatok_hf.__file__).parent
ROOT = Path(__file__).parents[2]
# A folder imports those before it, and modules right under the package; the models import neither.
ORDER = "models video metrics allocation tokenize pictures data hub export bulk demo cli".split()
# For the package alone: without it the general card stays, and no checkpoint has a name.
ASKED_FOR = {
    "models/base_evatok.py": "evatok_hf.hub.card",
    "models/pipeline_evatok.py": "evatok_hf.bundled",
}
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if "checkpoints" not in path.parts]


def imported(path: Path, root: Path) -> set[str]:
    """The dotted names that a file imports, wherever and however, for type checkers too; those of its package whole."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = [root.name, *path.relative_to(root).parts[: -node.level], *base]
            found |= {".".join([*base, name.name]) for name in node.names}
        elif isinstance(node, ast.Call):
            for name in named(node):
                level = len(name) - len(name.lstrip("."))
                base = [root.name, *path.relative_to(root).parts[:-level]] if level else []
                found.add(".".join([*base, name[level:]]))
    return found


def named(call: ast.Call) -> list[str]:
    """The modules that a call has as words: one that it imports, or a table of lazy names."""
    called = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if called == "lazy":
        return [f".{module.value}" for module in call.args[1].keys]
    words = call.args[:1] if called == "import_module" else []
    return [word.value for word in words if isinstance(word, ast.Constant)]


def needed(path: Path) -> set[str]:
    """The names of the package that a file of it cannot do without."""
    names = {name for name in imported(path, PACKAGE) if name.startswith(f"{PACKAGE.name}.")}
    return names - {ASKED_FOR.get(str(path.relative_to(PACKAGE)))}


def folders(path: Path) -> set[str]:
    """The folders of the package that a file imports from."""
    return {name for name in (name.split(".")[1] for name in needed(path)) if (PACKAGE / name).is_dir()}


def test_imports_by_name_are_seen():
    assert all(name in imported(PACKAGE / file, PACKAGE) for file, name in ASKED_FOR.items())
    assert "evatok_hf.tokenize.video_tokenizer" in imported(PACKAGE / "__init__.py", PACKAGE)
    assert "evatok_hf._registration" in imported(PACKAGE / "__init__.py", PACKAGE)
    assert "evatok_hf.allocation.strategies" in imported(PACKAGE / "allocation" / "__init__.py", PACKAGE)


def test_every_folder_of_the_package_has_its_place():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_from_a_folder_to_those_before_it(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        wrong = folders(path) - set(ORDER[: ORDER.index(folder) + 1])
        assert not wrong, f"{path.relative_to(PACKAGE)} must not import {', '.join(sorted(wrong))}"


def test_models_import_nothing_else_of_the_package():
    for path in (PACKAGE / "models").glob("*.py"):
        wrong = {name for name in needed(path) if not name.startswith(f"{PACKAGE.name}.models.")}
        assert not wrong, f"{path.name} goes to the Hub without {', '.join(sorted(wrong))}"


def test_what_scripts_import_is_no_command():
    for path in [*(ROOT / "training").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        wrong = [name for name in imported(path, ROOT) if name.startswith(f"{PACKAGE.name}.cli")]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(wrong)}"


def test_names_say_what_travels_with_weights():
    for path in MODULES:
        travels = "_evatok" in path.stem
        assert travels == (path.parent == PACKAGE / "models" and path.stem != "__init__"), path.relative_to(PACKAGE)
