"""The frame of the benchmarks: options, reports, tables, pages; and intervals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common.benchmark import Benchmark, Options, aim
from benchmarks.common.bootstrap import bootstrap
from evatok_hf.models.files_evatok import write_json
from training.common.fields import option
from training.common.result_pages import markdown

SCRIPT = "tests/benchmarks/test_benchmark.py"
measured = []


@dataclass(kw_only=True)
class Arguments(Options):
    count: int = option("A number.")
    words: list[str] = option("Some words.", ["a"])

    def __post_init__(self):
        self.at_least(1, "count")
        self.one_of(words=("a", "b"))


def measure(args: Arguments) -> dict:
    measured.append(args.count)
    return {"machine": "mine", "count": args.count, "aims": {"few": aim("a small number", args.count, "<", 3)}}


def show(report: dict) -> str:
    return markdown(["what", "n"], [["count", report["count"]]])


def draw(report: dict, path: Path) -> None:
    path.write_bytes(b"picture")


main = Benchmark(Arguments, measure, show, "result", draw)


def test_a_run_prints_and_writes_report_picture_and_page(tmp_path, capsys):
    page, marks = tmp_path / "page.md", (f"<!-- made by: {SCRIPT} --page PAGE -->", "<!-- end -->")
    page.write_text(f"# Page\n\n{marks[0]}\nolder\n{marks[1]}\nMore.\n")
    report = main(["--count", "2", "--output", str(tmp_path / "new" / "out"), "--page", str(page)])
    assert json.loads((tmp_path / "new" / "out" / "result.json").read_text()) == report
    assert report["command"].startswith(f"python {SCRIPT} --count 2") and report["machine"] == "mine"
    assert report["settings"]["words"] == ["a"]
    assert (tmp_path / "new" / "out" / "result.png").is_file() and (tmp_path / "page.png").is_file()
    text = page.read_text()
    assert text.startswith("# Page") and text.endswith("\nMore.\n") and "older" not in text and "(page.png)" in text
    for shown in (text, capsys.readouterr().out):
        assert "| count | " in shown and "| a small number | < 3 | 2 | yes |" in " ".join(shown.split())


def test_what_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    measured.clear()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*result.json"):
        main(["--count", "2", "--output", str(tmp_path / "file" / "out")])
    with pytest.raises(ValueError, match="must be a page with the lines"):
        main(["--count", "2", "--page", str(tmp_path / "file")])
    for options, message in (
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--count", "1", "--words", "a", "c"], "--words must be among a, b, got 'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            main(options)
    assert not measured and (tmp_path / "file").read_text() == ""


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert [p.name for p in path.parent.iterdir()] == ["report.json"] and json.loads(path.read_text()) == {"a": 1}


def test_an_aim_is_reached_from_the_right_side():
    assert aim("", 0.4, "<=", 0.45)["reached"] and not aim("", 0.5, "<=", 0.45)["reached"]
    assert aim("", 1.6, ">=", 1.5)["reached"] and not aim("", None, ">=", 1.5)["reached"]
    assert not aim("", 0.0, ">", 0.0)["reached"]


def test_tables_are_aligned():
    lines = markdown(["name", "value"], [["a", 10], ["long name", None]]).splitlines()
    assert lines == [
        "| name      | value |",
        "| --------- | ----: |",
        "| a         |    10 |",
        "| long name |     - |",
    ]


def test_intervals_hold_the_mean_and_are_repeatable():
    values = np.random.default_rng(0).normal(3, 1, 100)
    low, high = bootstrap(lambda i: values[i].mean(), 100)
    assert low < values.mean() < high and high - low == pytest.approx(4 / 10, rel=0.2)
    assert (low, high) == bootstrap(lambda i: values[i].mean(), 100)
    assert bootstrap(lambda i: float("nan"), 100, rounds=5) == (None, None)
