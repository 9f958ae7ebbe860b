"""The picture of `all.py`: a panel for each part of its report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evatok_hf.pictures.figures import pyplot, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN, OTHER, LIMIT = "tab:red", "tab:grey", "black"


def plain_ticks(axis: Axes, which: str, values: list[float], limits: tuple[float, float] = (0, math.inf)) -> None:
    """Numbers instead of powers of ten on a logarithmic axis, those within the limits."""
    shown = [value for value in values if limits[0] <= value <= limits[1]]
    getattr(axis, f"set_{which}ticks")(shown, [f"{value:g}" for value in shown])
    getattr(axis, f"set_{which}ticks")([], minor=True)


def tokenizer(axis: Axes, part: dict[str, Any]) -> None:
    rows = part["speeds"]
    points = [row for name, row in rows.items() if name.isdigit()]
    for side, style in (("encode", "-"), ("decode", "--")):
        speeds = [row[side]["clips_per_second"] for row in points]
        axis.plot([row["tokens"] for row in points], speeds, style, marker="o", color=OWN, label=f"EVATok {side}")
        for name, marker in (("larp", "s"), ("adaptok", "^")):
            row, label = rows[name], f"{rows[name]['name']} {side}"
            face = OTHER if side == "encode" else "none"
            axis.plot(
                row["tokens"], row[side]["clips_per_second"], marker, color=OTHER, markerfacecolor=face, label=label
            )
    axis.set(title="tokenizer", xlabel="tokens a clip", ylabel="clips a second", xscale="log", yscale="log")
    plain_ticks(axis, "x", [row["tokens"] for row in points])
    plain_ticks(axis, "y", [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100], axis.get_ylim())
    axis.legend(fontsize=7)


def sampling(axis: Axes, part: dict[str, Any]) -> None:
    rows = part["rows"]
    names = [f"{row['implementation']}, {row['batch']} at once, guidance {row['guidance']:g}" for row in rows]
    axis.barh(names, [row["tokens_per_second"] for row in rows], color=OWN)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.set(title="drawing clips", xlabel="tokens a second")


def search(axis: Axes, part: dict[str, Any]) -> None:
    axis.bar(["prefix tree", "one by one"], [part["seconds"], part["brute_force_seconds"]], color=[OWN, OTHER])
    axis.set(title=f"all assignments of {part['clips']} clips", ylabel="seconds")


def loading(axis: Axes, part: dict[str, Any]) -> None:
    rows = part["rows"]
    axis.bar([str(row["num_workers"]) for row in rows], [100 * row["data_wait"] for row in rows], color=OWN)
    axis.axhline(10, color=LIMIT, linewidth=1)
    axis.set(title="training", xlabel="loader processes", ylabel="% of a step waiting for clips")


def memory(axis: Axes, part: dict[str, Any]) -> None:
    rows = part["memory"]
    for task, style in (("encode", "-"), ("decode", "--")):
        most = [row[task]["peak_mib"] for row in rows]
        axis.plot([row["seconds"] for row in rows], most, style, marker="o", color=OWN, label=task)
    axis.set(title="most memory", xlabel="seconds of video", ylabel="MiB", xscale="log")
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    plain_ticks(axis, "x", [row["seconds"] for row in rows])
    axis.legend(fontsize=7)


def bulk(axis: Axes, part: dict[str, Any]) -> None:
    workers, loops = part["workers"], part["loop_clips_per_second"]
    bars = {f"loop\ntimes {workers}": sum(loops) / len(loops) * workers}
    for row in part["rows"]:
        bars["bulk,\na worker killed" if row["worker_killed"] else "bulk"] = row["clips_per_second_steady"]
    axis.bar(list(bars), list(bars.values()), color=[OTHER, OWN, OWN])
    axis.set(title="many videos", ylabel="clips a second")


PANELS = {
    "tokenizer": tokenizer,
    "sampling": sampling,
    "search": search,
    "loading": loading,
    "memory": memory,
    "bulk": bulk,
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG with a panel for each part that the report has."""
    plt = pyplot()
    parts = report["parts"]
    if not parts:
        return
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.8 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(parts) :]:
        axis.remove()
    for axis, (name, part) in zip(axes.flat[: len(parts)], parts.items(), strict=True):
        PANELS[name](axis, part)
        axis.grid(alpha=0.3)
    about = report["machine"]
    figure.suptitle(f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}", fontsize=9)
    save_figure(figure, path)
