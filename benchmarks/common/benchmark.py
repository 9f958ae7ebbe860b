"""The frame of a benchmark: options, a report with what it was measured by and on, its tables, and where these go."""

from __future__ import annotations

import operator
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from benchmarks.common.machine import machine_name
from evatok_hf.interrupts import run_script
from evatok_hf.models.files_evatok import prepare, write_json
from training.common.fields import OptionClass, option
from training.common.result_pages import check_page, markdown, update_page

ROOT = Path(__file__).resolve().parents[2]
SIGNS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}


@dataclass(kw_only=True)
class Options(OptionClass):
    """Options of every benchmark."""

    output: str | None = option("JSON file to write.", None)
    page: str | None = option("Markdown page that gets the results, between two marks that an error names.", None)


@dataclass(frozen=True)
class Benchmark:
    """The `main` of a benchmark's script."""

    options: type[Options]
    measure: Callable[[Any], dict[str, Any]]  # options to a report, which can be JSON; its "aims" are made by `aim`
    show: Callable[[dict[str, Any]], str]  # a report as Markdown
    folder: str | None = None  # the name of files under --output, if that is a folder: NAME.json, and NAME.png
    draw: Callable[[dict[str, Any], Path], None] | None = None  # writes the picture of a report

    def __call__(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Measures, prints and writes; returns the report.

        Raises:
            ValueError: wrong options, or an output or page that cannot be written, before anything is measured.
        """
        about = self.measure.__globals__
        script = Path(about["__file__"]).resolve().relative_to(ROOT).as_posix()
        (args,) = HfArgumentParser(self.options, description=about["__doc__"]).parse_args_into_dataclasses(argv)
        marks = (f"<!-- made by: {script} --page PAGE -->", "<!-- end -->")
        file = args.output and (Path(args.output, f"{self.folder}.json") if self.folder else Path(args.output))
        if file:
            prepare(file)
        if args.page:
            check_page(Path(args.page), marks)
        report = {
            "command": shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)]),
            "machine": machine_name(),
            "torch": torch.__version__,
            "settings": asdict(args),
        }
        report |= self.measure(args)
        parts = [aims_table(report["aims"])] if report.get("aims") else []
        print("\n\n".join([self.show(report), *parts]), flush=True)
        if file:
            write_json(file, report)
            if self.draw:
                self.draw(report, file.with_suffix(".png"))
        if args.page:
            page = Path(args.page)
            if self.draw:
                self.draw(report, page.with_suffix(".png"))
                parts.append(f"![what the tables below say, as curves and bars]({page.stem}.png)")
            update_page(page, marks, "\n\n".join([about_machine(report), *parts, self.show(report)]) + "\n")
        return report

    def run(self) -> None:
        """The script's end: mistakes are a line, and signals end it as a command."""
        run_script(self)


def about_machine(report: Mapping[str, Any]) -> str:
    """The command and the machine of a report, in a line."""
    where = report["machine"]
    if isinstance(where, Mapping):
        name = where["gpu"] or f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
        where = f"{name}, {where['instructions']}, {where['dtype']}, torch {where['torch']}"
    else:
        where += f", torch {report['torch']}"
    return f"`{report['command']}` ({where})"


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of columns, header and format as "{bits:.1f}", and of rows that have what the formats name."""
    cells = [[form.format(**row) for _, form in columns] for row in rows]
    return markdown([header for header, _ in columns], cells)


def aim(what: str, measured: float | None, sign: str, bound: float) -> dict[str, Any]:
    """A figure beside what it should be: `sign` is one of <=, <, >= and >. No figure does not reach it."""
    reached = measured is not None and SIGNS[sign](measured, bound)
    return {"what": what, "sign": sign, "aim": bound, "measured": measured, "reached": bool(reached)}


def aims_table(aims: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for row in aims.values():
        measured = None if row["measured"] is None else f"{row['measured']:.3g}"
        rows.append([row["what"], f"{row['sign']} {row['aim']:g}", measured, "yes" if row["reached"] else "no"])
    return markdown(["", "aim", "measured", "reached"], rows)
