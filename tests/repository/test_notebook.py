"""The notebook runs from its first cell to its last, and what is committed are the outputs of this code."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import evatok_hf

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def kinds(cell) -> list[str]:
    """What a reader sees under a cell: text, and pictures."""
    shown = ["text" for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"][:1]
    return shown + ["picture" for output in cell.outputs if "image/jpeg" in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs_and_shows_what_it_shows(path, tmp_path, monkeypatch):
    source = str(Path(evatok_hf.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # only what comes with the package
    committed = nbformat.read(path, as_version=4)
    made = nbformat.read(path, as_version=4)
    NotebookClient(made, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    cells = [cell for cell in made.cells if cell.cell_type == "code"]
    before = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [kinds(cell) for cell in cells] == [kinds(cell) for cell in before]
    assert sum(kinds(cell).count("picture") for cell in cells) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_is_committed_is_whole_and_small(path):
    assert path.stat().st_size < 600_000
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in cell.outputs)
