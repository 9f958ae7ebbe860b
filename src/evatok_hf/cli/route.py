"""`evatok route`: what a video would cost, without making its tokens."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from ..models.files_evatok import write_text
from .allocation import (
    BoundsOption,
    BudgetOption,
    BudgetPerClipOption,
    LengthsOption,
    MetricOption,
    QualityOption,
    StrategyOption,
    ThresholdOption,
    UniformOption,
    bind,
    choose,
)
from .support import (
    OUTPUT,
    BatchOption,
    DeviceOption,
    DtypeOption,
    FpsOption,
    MaxClipsOption,
    ModelOption,
    QuietOption,
    VideoArgument,
    check_distinct,
    load,
    open_input,
    option,
    prepare_outputs,
    print_table,
    seconds_since,
    show,
)

if TYPE_CHECKING:
    from ..tokenize.clips import RoutedClip
    from ..tokenize.video_tokenizer import VideoTokenizer

_output = partial(option, panel=OUTPUT)
RoutePictureOption = _output(
    Path | None,
    "Write a picture: frames, and a bar of tokens under each block.",
    "--out",
    "--picture",
    "-o",
    default=False,
)
RouteJsonOption = _output(
    bool, "Print one JSON object on stdout, nothing else; followed by FILE.json, write it there.", "--json"
)
_CLIPS_IN_PICTURE = 24
_ROWS_IN_TABLE = 40


class RouteCommand(typer.core.TyperCommand):
    """Lets `--json` be followed by a name. It must be - or end in .json, since the video may follow as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        found: list[str] = []
        for word in args:
            if found and found[-1] == "--json" and (word == "-" or word.endswith(".json")):
                found[-1:] = ["--json"] if word == "-" else ["--json-file", word]
            else:
                found.append(word)
        return super().parse_args(ctx, found)


def route(
    video: VideoArgument,
    strategy: StrategyOption = None,
    quality: QualityOption = None,
    budget: BudgetOption = None,
    budget_per_clip: BudgetPerClipOption = None,
    lengths: LengthsOption = None,
    uniform: UniformOption = None,
    threshold: ThresholdOption = None,
    metric: MetricOption = None,
    bounds: BoundsOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_clips: BatchOption = None,
    fps: FpsOption = None,
    max_clips: MaxClipsOption = None,
    picture: RoutePictureOption = None,
    as_json: RouteJsonOption = False,
    json_file: Annotated[Path | None, typer.Option("--json-file", hidden=True)] = None,
    quiet: QuietOption = False,
) -> None:
    """Show how many tokens each block of a video gets.

    Router and budget look at each clip once; no decoder runs. The searches,
    max-proxy-reward and threshold, try every assignment of every clip.
    """
    told = {"budget": budget, "budget_per_clip": budget_per_clip, "threshold": threshold, "metric": metric}
    allocation = choose(strategy, lengths, uniform, quality=quality, bounds=bounds, **told)
    check_distinct({"--out": picture, "--json FILE": json_file})
    with open_input(video) as reader:
        tokenizer = load(model, device, dtype, decoder=allocation.searches, batch_clips=batch_clips)
        allocation = bind(allocation, tokenizer, quiet)
        prepare_outputs(video, picture, json_file)
        total = tokenizer.count_clips(reader, fps, max_clips=max_clips)
        count = min(total, _CLIPS_IN_PICTURE)
        shown = {int((i + 0.5) * total / count) for i in range(count)}  # spread over the video
        rows: list[dict[str, Any]] = []
        pictured: list[RoutedClip] = []
        frames = 0
        started = time.perf_counter()
        clips = tokenizer.route(reader, allocation, fps=fps, max_clips=max_clips, progress=not quiet)
        for clip in clips:
            rows.append({"start": clip.start, "end": clip.end, "lengths": clip.lengths, "tokens": clip.tokens})
            frames += len(clip.original)
            if picture is not None and clip.index in shown:
                pictured.append(clip)
        report = {
            "video": video,
            "frames": frames,
            "fps": tokenizer.output_fps(reader, fps),
            **allocation.report(),
            **_totals(tokenizer, rows),
            "clips": rows,
            "checkpoint": tokenizer.name,
            "fingerprint": tokenizer.model.fingerprint(),
            "router_fingerprint": tokenizer.router and tokenizer.router.fingerprint(),
            "picture": picture and str(picture),
            "seconds": seconds_since(started),
        }
    if picture is not None:
        _write_picture(picture, pictured, tokenizer, report, allocation.label())
    if json_file is not None:
        write_text(json_file, json.dumps(report, allow_nan=False, indent=2) + "\n")
    if not as_json and not quiet:
        _print_clips(rows, max(tokenizer.model.config.block_lengths))
    show(_for_people(report) if not as_json else report, as_json, quiet)


def _totals(tokenizer: VideoTokenizer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    space = tokenizer.model.assignment_space
    tokens = sum(row["tokens"] for row in rows)
    middle = space.block_lengths[len(space.block_lengths) // 2] * space.num_blocks
    return {
        "tokens": tokens,
        "tokens_per_clip": tokens / len(rows),
        "share_of_uniform": tokens / (middle * len(rows)),
        "share_of_maximum": tokens / (space.max_tokens * len(rows)),
    }


def _print_clips(rows: list[dict[str, Any]], most: int) -> None:
    """A table of clips, with a row of bars for the blocks."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for title, justify in (("clip", "right"), ("seconds", "left"), ("tokens of blocks", "left"), ("", "left")):
        table.add_column(title, justify=justify)
    table.add_column("tokens", justify="right")
    width = len(str(most))
    for index, row in enumerate(rows[:_ROWS_IN_TABLE]):
        lengths = " ".join(f"{length:>{width}}" for length in row["lengths"])
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, 8 * length // (most + 1))] for length in row["lengths"])
        times = f"{row['start']:.2f} to {row['end']:.2f}"
        table.add_row(str(index + 1), times, lengths, bars, f"{row['tokens']:,}")
    if len(rows) > _ROWS_IN_TABLE:
        table.add_row("..", f"{len(rows) - _ROWS_IN_TABLE:,} more clips", "--json has them all", "", "")
    print_table(table)


def _for_people(report: dict[str, Any]) -> dict[str, Any]:
    shares = {name: f"{report[name]:.1%}" for name in ("share_of_uniform", "share_of_maximum")}
    return {key: shares.get(key, value) for key, value in report.items() if not key.endswith("fingerprint")}


def _write_picture(
    path: Path, clips: list[RoutedClip], tokenizer: VideoTokenizer, report: dict[str, Any], label: str
) -> None:
    from ..pictures.clips import routing_picture, save_picture

    config = tokenizer.model.config
    count = len(report["clips"])
    title = f"{report['tokens']:,} tokens for {report['frames']:,} frames: {label}"
    subtitle = (
        f"{Path(report['video']).name}; {report['tokens_per_clip']:.1f} tokens a clip, "
        f"{report['share_of_uniform']:.0%} of the middle uniform length; checkpoint {tokenizer.name}"
    )
    if len(clips) < count:
        subtitle += f"; {len(clips)} of {count:,} clips shown, evenly chosen"
    save_picture(routing_picture(clips, max(config.block_lengths), config.num_frames, title, subtitle), path)
