"""Scripts run as a person would run them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState


def error_of_script(
    script: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> str:
    """The one line that a script says when it ends with code 1."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    monkeypatch.setattr(sys, "argv", [str(script), *argv])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 1
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "\n" not in error
    return error
