"""`evatok route`: what a video would cost, without making its tokens."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer.core

from ..models.files_evatok import write_text
from .allocation import Choice, bind, choose
from .options import VIDEO, Batches, Clips, Report, option, output
from .support import check_distinct, prepare_outputs, print_table, seconds_since

if TYPE_CHECKING:
    from ..tokenize.clips import RoutedClip
    from ..tokenize.video_tokenizer import VideoTokenizer

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


@dataclass
class Written(Report):
    """The way in which `route` says what it found."""

    picture: Path | None = output(
        None,
        "Write a picture: frames, and a bar of tokens under each block.",
        "--out",
        "--picture",
        "-o",
        shown=False,
    )
    as_json: bool = output(
        False, "Print one JSON object on stdout, nothing else; followed by FILE.json, write it there.", "--json"
    )
    json_file: Path | None = option(None, "", "--json-file", hidden=True)


def route(choice: Choice, place: Batches, part: Clips, told: Written, video: str = VIDEO) -> None:
    """Show how many tokens each block of a video gets.

    Router and budget look at each clip once; no decoder runs. The searches,
    max-proxy-reward and threshold, try every assignment of every clip.
    """
    from ..pictures.clips import spread
    from ..video.read import open_video

    allocation = choose(choice)
    check_distinct({"--out": told.picture, "--json FILE": told.json_file})
    with open_video(video) as reader:
        tokenizer = place.load(decoder=allocation.searches)
        allocation = bind(allocation, tokenizer, told.quiet)
        prepare_outputs(video, told.json_file, picture=told.picture)
        shown = spread(tokenizer.count_clips(reader, **vars(part)), _CLIPS_IN_PICTURE)
        rows: list[dict[str, Any]] = []
        pictured: list[RoutedClip] = []
        frames = 0
        started = time.perf_counter()
        for clip in tokenizer.route(reader, allocation, progress=not told.quiet, **vars(part)):
            rows.append({"start": clip.start, "end": clip.end, "lengths": clip.lengths, "tokens": clip.tokens})
            frames += len(clip.original)
            if told.picture is not None and clip.index in shown:
                pictured.append(clip)
        report = {
            "video": video,
            "frames": frames,
            "fps": tokenizer.output_fps(reader, part.fps),
            **allocation.report(),
            **_totals(tokenizer, rows),
            "clips": rows,
            "checkpoint": tokenizer.name,
            "fingerprint": tokenizer.model.fingerprint(),
            "router_fingerprint": tokenizer.router and tokenizer.router.fingerprint(),
            "picture": told.picture and str(told.picture),
            "seconds": seconds_since(started),
        }
    if told.picture is not None:
        _write_picture(told.picture, pictured, tokenizer, report, allocation.label())
    if told.json_file is not None:
        write_text(told.json_file, json.dumps(report, allow_nan=False, indent=2) + "\n")
    if not told.as_json and not told.quiet:
        _print_clips(rows, max(tokenizer.model.config.block_lengths))
    told.show(report if told.as_json else _for_people(report))


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
