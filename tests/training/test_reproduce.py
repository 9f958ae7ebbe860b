"""training/reproduce.py: what is run again and what is not, what counts as reproduced, and one quick run of it all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from video_samples import encode, moving_frames

from training import reproduce
from training.reproduce import Step, compare, load_steps, run_steps, typed

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "training"

TOLERANCES = {
    "fixed": {"psnr": {"absolute": 0.02}, "tokens": {"percent": 1}},
    "trained": {"psnr": {"absolute": 0.5}, "tokens": {"percent": 10}},
}


# --- comparison -------------------------------------------------------------------------------------------------------


def verdicts(expected: dict, measured: dict) -> dict[tuple[str, str, str], str]:
    return {(line.table, line.row, line.metric): line.verdict for line in compare(expected, measured, TOLERANCES)}


@pytest.mark.parametrize(
    ("row", "metric", "expected", "measured", "verdict"),
    [
        ("final", "psnr", 18.0, 18.5, "inside"),
        ("final", "psnr", 18.0, 17.49, "outside"),
        ("bundled, uniform 32", "psnr", 18.0, 18.5, "outside"),
        ("bundled, uniform 32", "psnr", 18.0, 17.98, "inside"),
        ("low resolution, 320 bits", "psnr", 18.0, 18.03, "outside"),
        ("final", "tokens", 200.0, 220.0, "inside"),
        ("final", "tokens", 200.0, 179.0, "outside"),
        ("bundled", "tokens", 200.0, 202.5, "outside"),
        ("final", "tokens", -200.0, -185.0, "inside"),
        ("final", "psnr", None, None, "inside"),
        ("final", "psnr", None, 1.0, "outside"),
        ("final", "psnr", 1.0, None, "outside"),
    ],
)
def test_a_number_lies_inside_or_outside(row, metric, expected, measured, verdict):
    made = verdicts({"t": {row: {metric: expected}}}, {"t": {row: {metric: measured}}})
    assert made == {("t", row, metric): verdict}


def test_missing_and_new_numbers_are_named():
    expected = {"t": {"final": {"psnr": 1.0, "tokens": 10.0}, "proxy": {"psnr": 1.0}}, "gone": {"final": {"psnr": 1.0}}}
    measured = {"t": {"final": {"psnr": 1.0, "other": 3.0}, "more": {"psnr": None}}, "added": {"final": {"psnr": 1.0}}}
    assert verdicts(expected, measured) == {
        ("t", "final", "psnr"): "inside",
        ("t", "final", "tokens"): "missing",
        ("t", "final", "other"): "new",
        ("t", "proxy", "psnr"): "missing",
        ("t", "more", "psnr"): "new",
        ("gone", "final", "psnr"): "missing",
        ("added", "final", "psnr"): "new",
    }


def test_a_number_needs_a_tolerance():
    numbers = {"t": {"final": {"ssim": 0.5}}}
    with pytest.raises(ValueError, match="no tolerance for 'ssim' of trained models; add"):
        compare(numbers, numbers, TOLERANCES)
    with pytest.raises(ValueError, match="no tolerance for 'ssim' of trained models; add"):
        compare(numbers, numbers, {})


# --- steps ------------------------------------------------------------------------------------------------------------


def needed(step: Step, steps: dict[str, Step]) -> set[str]:
    return {step.name}.union(*(needed(steps[name], steps) for name in step.needs))


@pytest.mark.parametrize("quick", [False, True])
def test_steps_read_only_what_they_or_steps_before_them_make(quick):
    steps = {step.name: step for step in load_steps(quick)}
    for step in steps.values():
        made = [path for name in needed(step, steps) for path in steps[name].makes]
        for command in step.commands:
            assert re.findall(r"\{(?!out\})", command.split("--model_overrides")[0]) == []
            for path in re.findall(r"\{out\}/([\w./-]+)", command):
                assert path.startswith("packages") or any(path == one or path.startswith(f"{one}/") for one in made)
            for file in re.findall(r"[\w/]+\.(?:py|yaml)", command):
                assert (ROOT / file).is_file()


def test_quick_steps_are_the_same_steps():
    full, quick = load_steps(), load_steps(quick=True)
    assert [(step.name, step.needs, step.makes) for step in quick] == [(s.name, s.needs, s.makes) for s in full]
    smaller = [step.name for step, other in zip(quick, full, strict=True) if step.commands != other.commands]
    assert {"vizdoom", "proxy", "curated", "router", "final", "teacher", "ablation-both", "curves"} <= set(smaller)


def test_a_step_comes_after_those_that_it_needs(tmp_path):
    entry = {"name": "a", "what": "", "needs": ["b"], "makes": [], "commands": []}
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"words": {}, "steps": [entry]}))
    with pytest.raises(ValueError, match="a needs b, which must come before it"):
        load_steps(path=path)


def test_commands_are_what_a_person_would_type(tmp_path):
    folder = tmp_path / "with space"
    text = typed("OMP_NUM_THREADS=1 torchrun x.py --data {out}/a=0.5", folder)
    torchrun = Path(sys.executable).parent / "torchrun"
    if torchrun.is_relative_to(ROOT):
        torchrun = torchrun.relative_to(ROOT)
    assert text == f"OMP_NUM_THREADS=1 {torchrun} x.py --data '{folder}/a=0.5'"
    assert typed("mkdir -p {out}/b", Path("o")) == "mkdir -p o/b"


# --- running ----------------------------------------------------------------------------------------------------------


def step(name: str, *needs: str, code: str = "0") -> Step:
    """Adds its name to `ran` and makes a file of its name that holds a variable of its environment."""
    made = f"open('{{out}}/{name}', 'w').write(os.environ['WORD'])"
    python = f"import os; open('{{out}}/ran', 'a').write('{name} '); {code}; {made}"
    return Step(name, "", needs, (name,), (f'WORD=hello python -c "{python}"',))


class Runs:
    """Runs steps in a folder and tells which of them ran."""

    def __init__(self, out: Path):
        self.out = out

    def __call__(self, *steps: Step) -> list[str]:
        (self.out / "markers").mkdir(parents=True, exist_ok=True)
        (self.out / "ran").write_text("")
        run_steps(self.out, steps, Console(quiet=True))
        return (self.out / "ran").read_text().split()


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path / "out")


def test_finished_steps_are_not_run_again(runs):
    steps = step("a"), step("b", "a"), step("c")
    assert runs(*steps) == ["a", "b", "c"]
    assert (runs.out / "b").read_text() == "hello"
    assert runs(*steps) == []
    noted = json.loads((runs.out / "markers" / "b.json").read_text())
    assert noted["commands"] == list(steps[1].commands) and noted["seconds"] > 0
    del noted["finished"]
    (runs.out / "markers" / "b.json").write_text(json.dumps(noted))
    assert runs(*steps) == ["b"]


def test_changed_steps_and_all_that_read_them_are_run_again(runs):
    runs(step("a"), step("b", "a"), step("c"), step("d", "b"))
    assert runs(step("a"), step("b", "a", code="pass"), step("c"), step("d", "b")) == ["b", "d"]
    assert runs(step("a", code="pass"), step("b", "a", code="pass"), step("c"), step("d", "b")) == ["a", "b", "d"]
    (runs.out / "c").unlink()
    assert runs(step("a", code="pass"), step("b", "a", code="pass"), step("c"), step("d", "b")) == ["c"]


def test_a_failure_ends_with_its_log_and_is_gone_on_from(runs):
    runs(step("a"), step("b", "a"))
    broken = step("a", code="print('the cause'); raise SystemExit(3)")
    with pytest.raises(ValueError) as failed:
        runs(broken, step("b", "a"))
    assert str(failed.value).startswith("a failed (3)") and str(failed.value).endswith("the cause")
    assert not (runs.out / "a").exists()  # what an earlier command made is no result of this one
    assert runs(step("a", code="pass"), step("b", "a")) == ["a", "b"]
    assert "WORD=hello" in (runs.out / "logs" / "a.log").read_text()


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("")
    with pytest.raises(ValueError, match="choose an empty folder"):
        run_steps(tmp_path, [step("a")], Console(quiet=True))
    assert (tmp_path / "a" / "mine").exists()


def test_the_newest_state_of_a_bar_is_its_last_line(tmp_path):
    (tmp_path / "log").write_bytes(b"one\n\n 1/3\r 2/3\r\nthree\r 3/3")
    assert reproduce.last_lines(tmp_path / "log", 2) == [" 2/3", " 3/3"]


# --- from results to the exit code ------------------------------------------------------------------------------------


def report(psnr: float) -> dict:
    metrics = {"psnr": {"value": psnr, "clips": 3}, "tokens": {"value": 150.0, "clips": 3}}
    return {"metrics": {**metrics, "codebook": {"use": 0.5, "perplexity": 300.0, "clips": 3}}, "clips": 3}


def finish(out: Path) -> None:
    """All that a run in full leaves, with made-up numbers."""
    for folder in ("markers", "tables", "curves"):
        (out / folder).mkdir(parents=True)
    quality = {"psnr": 17.0, "perceptual-effnet-lite0": 1.0}
    entry = {"tokens": 32, "bits": 320, "model": quality, "baseline": {**quality, "psnr": 16.0}}
    saved = {quality: {"uniform": {"percent": percent}} for quality, percent in (("1.2", 12.5), ("1.4", float("nan")))}
    tokenizer = {"curves": {"router": [[150.0, 0.7, 19.0]] * 2}, "savings": {"router": saved}}
    curves = {
        "metric": "perceptual-effnet-lite0",
        "tokenizers": {"final": tokenizer},
        "percentile": {"1.2": {"router": 95.0, "constant": 90.0}},
        "timings": {},
    }
    steps = load_steps()
    for step in steps:
        for path in step.makes:
            kind = path.removeprefix("tables/").partition("-")[0]
            if path.startswith("tables/"):
                content = {"lengths": [entry]} if kind == "reconstruction" else report(18.0)
                (out / path).write_text(json.dumps(content))
            else:
                (out / path).mkdir(parents=True, exist_ok=True)
        noted = {"commands": list(step.commands), "seconds": 60.0, "finished": "2026-01-01 00:00:00"}
        reproduce.marker(out, step.name).write_text(json.dumps(noted))
    (out / "curves" / "curves.json").write_text(json.dumps(curves))


def test_the_exit_code_says_whether_all_numbers_are_those_expected(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    finish(out)
    expected = tmp_path / "expected.json"
    page = tmp_path / "reproduction.md"
    page.write_text("\n".join(["before", reproduce.MARKS[0], "old", reproduce.MARKS[1], "after"]))
    monkeypatch.setattr(reproduce, "EXPECTED", expected)
    monkeypatch.setattr(reproduce, "PAGE", page)
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="no expected results.*--update"):
        reproduce.main([f"--output={out}"])
    results = json.loads((out / "results.json").read_text())
    assert results["tables"]["savings"]["final, router at 1.2"] == {
        "tokens": 150.0,
        "perceptual-effnet-lite0": 0.7,
        "psnr": 19.0,
        "saved against uniform, %": 12.5,
    }
    assert results["tables"]["reconstruction"]["low resolution, 320 bits"]["psnr"] == 16.0
    assert results["seconds"]["proxy"] == 60.0 and results["versions"]["torch"]
    text = (out / "results.md").read_text()
    cells = re.sub(" +", " ", text)  # columns are aligned
    assert "| final, router at 1.2 | 150.0 | 0.7000 | 19.00 | 12.5 |" in cells
    assert "| final, router at 1.4 | 150.0 | 0.7000 | 19.00 | - |" in cells
    assert "| discriminator | 18.00 | 150.0 | 300 | 3 |" in cells
    assert f"`make reproduce`: {len(load_steps())} minutes" in text

    assert reproduce.main([f"--output={out}", "--update"]) == 0
    shown = page.read_text()
    assert text in shown and "old" not in shown and shown.startswith("before\n") and shown.endswith("\nafter")
    assert reproduce.main([f"--output={out}"]) == 0
    assert "OUTSIDE" not in capsys.readouterr().out
    (out / "tables" / "evaluation-bundled.json").write_text(json.dumps(report(18.1)))
    assert reproduce.main([f"--output={out}"]) == 1
    printed = capsys.readouterr().out.splitlines()
    (line,) = [line for line in printed if "OUTSIDE" in line]
    assert re.sub(" +", " ", line).startswith(
        "| evaluation | bundled, router at 1.2 | psnr | 18.00 | 18.10 | +0.1 | 0.02 |"
    )
    assert json.loads((out / "results.json").read_text())["comparison"]


def test_a_quick_run_is_never_expected(capsys):
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["--quick", "--update"])
    assert ended.value.code == 2 and "--update needs a run in full" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    """Every step of it, with other videos, so that none has to be fetched."""
    out = tmp_path / "out"
    for split, count in (("train", 3), ("val", 2)):
        (out / "videos" / split).mkdir(parents=True)
        for index in range(count):
            noise = np.random.default_rng(index).normal(size=(40, 120, 160, 3)) * 10
            frames = np.clip(moving_frames(40, 120, 160) * 0.8 + noise + 20 * index, 0, 255).astype(np.uint8)
            encode(out / "videos" / split / f"{split}{index}.mp4", frames, options={"preset": "ultrafast"})
    (out / "markers").mkdir()
    videos = next(step for step in load_steps(quick=True) if step.name == "videos")
    noted = {"commands": list(videos.commands), "seconds": 0.0, "finished": "2026-01-01 00:00:00"}
    reproduce.marker(out, "videos").write_text(json.dumps(noted))
    command = [sys.executable, str(TRAINING / "reproduce.py"), "--quick", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    assert results["quick"] and set(results["seconds"]) == {step.name for step in load_steps()}
    assert set(results["tables"]["ablation"]) == {"neither", "alignment", "discriminator", "both"}
    assert len({row["psnr"] for row in results["tables"]["ablation"].values()}) == 4
    for rows in results["tables"].values():
        for row in rows.values():
            assert row.get("psnr", 10.0) > 3
    assert "| ablation |" in (out / "results.md").read_text() and "are not compared" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count(": done on ") == len(load_steps())


def test_the_documentation_shows_the_expected_numbers():
    expected = json.loads(reproduce.EXPECTED.read_text())
    about = {"seconds": {}, "machine": "", "versions": {}}
    tables = reproduce.results_in_markdown(expected["tables"], about).split("`make reproduce`")[0]
    shown = reproduce.PAGE.read_text().split(reproduce.MARKS[0])[1].split(reproduce.MARKS[1])[0]
    assert shown.strip().startswith(tables.strip())
