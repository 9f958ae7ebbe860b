"""Short runs of `training/train_tokenizer.py` in processes of their own, of whose steps the first half warms up."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.benchmark import ROOT
from training.common.reporting import read_log

CONFIGS = {path.stem: path for path in sorted((ROOT / "training" / "configs").glob("*.yaml"))}


def train(config: str, steps: int, output: Path, **options: Any) -> dict[str, Any] | None:
    """The last line with a speed of the log of a run by one of `CONFIGS` and other options of the script, or None where
    memory did not suffice."""
    options |= {"config": CONFIGS[config], "output_dir": output, "steps": steps, "save_every": steps}
    options["log_every"] = steps // 2
    given = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(ROOT / "training" / "train_tokenizer.py"), *given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if "out of memory" in done.stderr.lower() or done.returncode in (-9, 137):
            return None
        raise ValueError(f"{shlex.join(command)} failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return [line for line in read_log(output / "log.jsonl") if "clips_per_second" in line][-1]
