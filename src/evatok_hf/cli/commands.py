"""The command line, `evatok`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 129, 130 and 143 ended by SIGHUP, SIGINT and SIGTERM, 141 by nobody reading
what it writes. Whatever fails says so in one line on stderr and leaves no output behind. Torch and transformers are
imported only inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..bundled import bundled_checkpoints, checkpoint_of, find_checkpoint
from ..models.files_evatok import is_special, is_stdout
from ..video.source import SourceFile, is_url
from ..video.source_files import printable
from .allocation import Choice, bind, choose
from .bulk import tokenize_dataset
from .demo import demo
from .generate import classes, export_llama, generate
from .options import BLEND, JSON, PLAY, SCALE, VIDEO, Batches, EncodedClips, Report, argument, opened, option, output
from .predict import predict
from .push import push
from .route import RouteCommand, route
from .support import (
    Group,
    check_distinct,
    decibels,
    open_writer,
    prepare_outputs,
    seconds_since,
    set_debug,
    show,
    summarize,
    wrong_usage,
)

if TYPE_CHECKING:
    import numpy as np

    from ..tokenize.clips import ReconstructedClip
    from ..tokenize.video_tokenizer import VideoTokenizer
    from ..video.codecs import Codec

app = typer.Typer(
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"evatok_hf {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Log more, show tracebacks (or set EVATOK_DEBUG=1).")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Adaptive-length video tokenization: a video becomes discrete tokens, more of them where more happens."""
    set_debug(context, debug or bool(os.environ.get("EVATOK_DEBUG")))
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def info(
    what: str | None = argument(
        "Folder, Hub id or bundled name of a checkpoint, a video, a token file, or the folder of a token data set.",
        "MODEL|VIDEO|TOKENS",
        None,
        "the bundled checkpoint",
    ),
    as_json: bool = JSON,
) -> None:
    """Describe a checkpoint, a video, a token file, or a data set of tokens, all of which is read then."""
    if what is not None and (Path(what).is_file() or is_special(what) or is_url(what)):
        report = _describe_file(what)
    elif what is not None and _holds_token_data(Path(what)):
        report = _describe_token_data(what)
    elif not Path(find_checkpoint(what)).is_dir() and str(what).count("/") != 1:
        raise ValueError(
            f"there is no file or folder {what}; a model on the Hub is written owner/name, and those that come with "
            f"the package are {', '.join(bundled_checkpoints())}."
        )
    else:
        report = _describe_model(what)
    show(report, as_json)


def encode(
    choice: Choice,
    place: Batches,
    clips: EncodedClips,
    told: Report,
    video: str = VIDEO,
    tokens: Path = argument("The token file to write.", "TOKENS.safetensors"),
    tokens_only: bool = option(
        False, "Refuse what would need the decoder; else it is loaded for a search alone.", "--tokens-only"
    ),
) -> None:
    """Turn a video into a file of tokens.

    Only what encoding needs is loaded; max-proxy-reward, threshold and --refine,
    which reconstruct clips to search, also load the decoder.
    """
    from ..video.read import open_video

    allocation = choose(choice)
    check_distinct({"TOKENS": tokens}, told.as_json)
    decoder = allocation.searches or clips.refinement_steps > 0
    if tokens_only and decoder:
        reason = f"strategy {allocation.strategy}" if allocation.searches else "--refine"
        raise typer.BadParameter(f"{reason} reconstructs clips", param_hint="--tokens-only")
    with open_video(video) as reader:
        tokenizer = place.load(decoder)
        allocation = bind(allocation, tokenizer, told.quiet)
        prepare_outputs(video, tokens)
        started = time.perf_counter()
        result = tokenizer.encode(reader, allocation, progress=not told.quiet, **vars(clips))
        result.save(tokens)
    report = summarize(result) | allocation.report() | {"refinement_steps": clips.refinement_steps or None}
    told.show(report | {"output": str(tokens), "seconds": seconds_since(started)}, is_stdout(tokens))


def decode(
    place: Batches,
    told: Report,
    tokens: Path = argument("A token file.", "TOKENS.safetensors"),
    out: Path = argument("The video to write: .mp4, .mkv, .webm, .avi, .mpg or .gif.", "OUT.mp4"),
    fps: float | None = PLAY(shown="that of the encoded frames"),
    blend: str = BLEND,
) -> None:
    """Turn a file of tokens back into a video.

    Without --model, by the bundled checkpoint that made them.
    """
    from tqdm import tqdm

    from ..models.tokens_evatok import VideoTokens

    check_distinct({"OUT": out}, told.as_json)
    codes = VideoTokens.load(tokens)
    place.model = place.model or checkpoint_of(codes.fingerprint)
    tokenizer = place.load()
    tokenizer.check_tokens(codes)
    _check_blend(blend)
    rate = fps or codes.fps
    if rate is None:
        raise ValueError(f"{tokens} does not say its frame rate; give one with --fps.")
    prepare_outputs(tokens, out)
    side = tokenizer.model.config.image_size
    started = time.perf_counter()
    bar = tqdm(total=len(codes), unit="clip", leave=False, file=sys.stderr, disable=True if told.quiet else None)
    with open_writer(out, rate, side, side) as writer, bar:
        for frames in tokenizer.decode(codes, blend):
            writer.write(frames)
            bar.update()
        report = summarize(codes) | {"frames": writer.frames_written, "fps": rate}
    told.show(report | {"output": str(out), "seconds": seconds_since(started)}, is_stdout(out))


def reconstruct(
    *,
    choice: Choice,
    place: Batches,
    clips: EncodedClips,
    blend: str = BLEND,
    side_by_side: bool = output(
        False, "Show the original beside it, and the tokens of each block under them.", "--side-by-side"
    ),
    scale: int | None = SCALE(shown="1, side by side up to 256 pixels"),
    picture: Path | None = output(None, "Also write a picture that compares a few clips.", shown=False),
    perceptual: str | None = output(
        None,
        "Also measure lpips-vgg, lpips-alex, perceptual-effnet-lite0 or perceptual-hed-vgg16.",
        shown=False,
        metavar="NAME",
    ),
    codec: str | None = output(
        None,
        "Also show the clips of --picture as h264, hevc or av1 has them at the bits of their tokens.",
        shown=False,
        metavar="NAME",
    ),
    told: Report,
    video: str = VIDEO,
    out: Path | None = argument("The video to write; without it only measure.", "OUT.mp4", None),
) -> None:
    """Encode and decode a video, and measure what is lost.

    PSNR and the perceptual distance are means over clips, each over the true
    frames of a clip, as they are shown. They compare 8-bit frames in memory, after resizing and
    cropping and before any video codec. --codec has the same clips at the same
    bits, headers left out; where its coarsest setting needs more, it is that.
    Where PyAV comes without its encoder, the picture does without it.
    """
    from ..metrics.perceptual import load_perceptual
    from ..pictures.clips import COMPARED, spread
    from ..video.read import open_video

    allocation = choose(choice)
    _check_blend(blend)
    if out is None and (side_by_side or scale):
        hint = "--side-by-side" if side_by_side else "--scale"
        raise typer.BadParameter("it needs a video to write, OUT", param_hint=hint)
    if codec and picture is None:
        raise typer.BadParameter("it needs a picture to show it in, --picture", param_hint="--codec")
    check_distinct({"OUT": out, "--picture": picture}, told.as_json)
    with open_video(video) as reader:
        tokenizer = place.load()
        allocation = bind(allocation, tokenizer, told.quiet)
        metric = None
        if perceptual is not None:
            metric = load_perceptual(perceptual).to(tokenizer.model.device)
        prepare_outputs(video, out, picture=picture)
        size, seen = _view(tokenizer, side_by_side, scale)
        rate = tokenizer.output_fps(reader, clips.fps)
        rival = codec and _find_codec(codec)
        total = tokenizer.count_clips(reader, clips.fps, max_clips=clips.max_clips, overlap=clips.overlap)
        shown = spread(total, COMPARED)  # clips of the picture
        pictured: list[ReconstructedClip] = []
        started = time.perf_counter()
        rows: list[dict[str, Any]] = []

        def measure(clip: ReconstructedClip) -> None:
            rows.append({"lengths": clip.lengths, "tokens": sum(clip.lengths), "psnr": clip.psnr})
            if metric is not None:
                rows[-1]["perceptual"] = metric.between(clip.original, clip.reconstruction)

        with open_writer(out, rate, *size) as writer, ThreadPoolExecutor(2) as threads:

            def write(clip: ReconstructedClip) -> None:
                if writer is not None:
                    writer.write(seen(clip))

            options = {"blend": blend, "progress": not told.quiet, **vars(clips)}
            jobs: list[Future[None]] = []  # a clip is measured and written while the models make the next one
            for clip in tokenizer.reconstruct(reader, allocation, **options):
                for job in jobs:
                    job.result()
                jobs = [threads.submit(measure, clip), threads.submit(write, clip)]
                if picture is not None and clip.index in shown:
                    pictured.append(clip)
            for job in jobs:
                job.result()
            pictured = pictured or [clip]
            compressed, others = _compress(rival, pictured, rate, tokenizer, metric) if rival else (None, [])
            report: dict[str, Any] = {
                "tokens": sum(row["tokens"] for row in rows),
                "psnr": _mean(rows, "psnr"),
                "perceptual": metric and {"name": metric.name, "distance": _mean(rows, "perceptual")},
                "codec": compressed,
                "frames": clip.first + len(clip.original),
                "fps": rate,
                "overlap": clips.overlap,
                "refinement_steps": clips.refinement_steps or None,
                "blend": blend,
                **allocation.report(),
                "clips": rows,
                "checkpoint": tokenizer.name,
                "fingerprint": tokenizer.model.fingerprint(),
                "output": out and str(out),
                "picture": picture and str(picture),
            }
            if picture is not None:  # before the video is put in place, so that a failure leaves neither
                about = f"{printable(Path(video).name)}, {allocation.label()}"
                _write_picture(picture, pictured, others, tokenizer, report, about)
    told.show(report | {"seconds": seconds_since(started)}, is_stdout(out))


app.command(cls=RouteCommand)(opened(route))
for command in (info, encode, decode, reconstruct, tokenize_dataset):
    app.command()(opened(command))
for command in (generate, predict, classes, export_llama, push, demo):
    app.command()(opened(command))


def _check_blend(blend: str) -> None:
    from ..tokenize.seams import check_blend

    with wrong_usage("--blend"):
        check_blend(blend)


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _find_codec(name: str) -> Codec | None:
    """The codec at a quick setting; None, with a line that says so, where this build of PyAV does not have it."""
    from ..video.codecs import MissingCodec, find_codec

    try:
        return find_codec(name).quick()
    except MissingCodec as error:
        typer.echo(f"Note: the picture has no row of {name}: {error}", err=True)
        return None


def _compress(
    codec: Codec, clips: list[ReconstructedClip], fps: float | None, tokenizer: VideoTokenizer, metric: Any
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """A codec at the bits of the tokens of clips: means over the clips for the report, and the frames of each."""
    from ..metrics.pixels import frame_psnr
    from ..video.codecs import CodecBaseline

    rows, shown = [], []
    for clip in clips:
        allowed = tokenizer.model.config.bits(clip.lengths)
        made = CodecBaseline(clip.original, codec, fps or 25.0).at_bits(allowed)
        quality = frame_psnr(clip.original, made.frames)
        rows.append({"bits": made.bits, "psnr": quality, "tokens_bits": allowed, "tokens_psnr": clip.psnr})
        if metric is not None:
            for key, frames in (("perceptual", made.frames), ("tokens_perceptual", clip.reconstruction)):
                rows[-1][key] = metric.between(clip.original, frames)
        shown.append(made.frames)
    return {"name": codec.name, "clips": len(clips), **{key: _mean(rows, key) for key in rows[0]}}, shown


def _view(
    tokenizer: VideoTokenizer, side_by_side: bool, scale: int | None
) -> tuple[tuple[int, int], Callable[[ReconstructedClip], np.ndarray]]:
    """The written video: its height and width, and the frames of a clip in it, enlarged or beside the original."""
    from ..pictures.clips import SideBySide, enlarge

    config = tokenizer.model.config
    side = config.image_size
    if side_by_side:
        scale = scale or max(1, round(256 / side))
        both = SideBySide(side, side, max(config.block_lengths), config.num_frames, scale)
        return both.size, both.frames
    size = (side * (scale or 1), side * (scale or 1))
    return size, lambda clip: enlarge(clip.reconstruction, *size)


def _write_picture(
    path: Path,
    clips: list[ReconstructedClip],
    others: list[np.ndarray],
    tokenizer: VideoTokenizer,
    report: dict[str, Any],
    about: str,
) -> None:
    from ..pictures.clips import comparison_picture, save_picture

    config = tokenizer.model.config
    title = f"{report['tokens']:,} tokens for {report['frames']:,} frames, PSNR {decibels(report['psnr'])}"
    subtitle = f"{about}; {config.image_size} x {config.image_size}, checkpoint {tokenizer.name}"
    if report["perceptual"]:
        subtitle += f", {report['perceptual']['name']} {report['perceptual']['distance']:.3f}"
    if codec := report["codec"]:
        theirs, ours = (
            f"{codec[prefix + 'bits']:,.0f} bits, {codec[prefix + 'psnr']:.2f} dB"
            + (f", {codec[prefix + 'perceptual']:.3f}" if report["perceptual"] else "")
            for prefix in ("", "tokens_")
        )
        subtitle += f"; these clips: {ours} each, {codec['name']} {theirs}"
    rival = codec and (codec["name"].replace(" (", "\n("), others)
    picture = comparison_picture(clips, max(config.block_lengths), config.num_frames, title, subtitle, rival=rival)
    save_picture(picture, path)


def _describe_model(name: str | None) -> dict[str, Any]:
    import torch

    from ..models.checkpoint_evatok import load_generator

    tokenizer = Batches(name, "cpu", "float32", None).load()
    generator = load_generator(find_checkpoint(name), torch.device("cpu"), torch.bfloat16)
    config = tokenizer.model.config

    def describe(model: Any, *fields: str) -> dict[str, Any] | None:
        if model is None:
            return None
        told = {"parameters": sum(p.numel() for p in model.parameters())}
        told |= {field.removeprefix("num_"): getattr(model.config, field) for field in fields}
        return told | {"fingerprint": model.fingerprint()}

    return {
        "kind": "model",
        "checkpoint": tokenizer.name,
        **describe(tokenizer.model),
        "candidates": list(config.block_lengths),
        "blocks": config.num_blocks,
        "assignments": len(config.assignment_space),
        "clip": f"{config.num_frames} frames of {config.image_size} x {config.image_size}",
        "codebook": config.codebook_size,
        "router": describe(tokenizer.router, "quality", "distance"),
        "generator": describe(generator, "num_classes", "layout", "known_frames", "fps", "tokenizer_fingerprint"),
        "config": config.to_dict(),
    }


def _describe_file(name: str) -> dict[str, Any]:
    from ..video.read import open_video

    with closing(SourceFile(name)) as file:
        path = file.path()
        try:
            # a safetensors file: eight bytes of length, then a JSON object
            if file.head[8:9] == b"{" or name.endswith(".safetensors"):
                from ..models.tokens_evatok import VideoTokens  # with torch, which takes seconds

                return {"kind": "tokens"} | summarize(VideoTokens.load(path))
            with open_video(path) as video:
                return {
                    "kind": "video",
                    "video": name,
                    "frames": video.num_frames,
                    "fps": video.fps,
                    "height": video.height,
                    "width": video.width,
                    "seconds": video.num_frames / video.fps,
                    "reader": video.backend,
                }
        except ValueError as error:
            raise ValueError(str(error).replace(path, name)) from error


def _holds_token_data(path: Path) -> bool:
    return (path / "tokens.json").is_file() or any(path.glob("data/tokens-*.parquet"))


def _describe_token_data(path: str) -> dict[str, Any]:
    from ..data.token_dataset import SHARDS, TokenDataset

    data = TokenDataset.load(path)
    return {
        "kind": "token data set",
        "folder": path,
        "clips": len(data),
        "tokens": int(data.counts().sum()),
        "classes": len(data.classes),
        "shards": len(SHARDS.list(data.folder)),
        "candidates": data.summary["block_lengths"],
        "blocks": data.summary["num_blocks"],
        "codebook": data.summary["codebook_size"],
        "fingerprint": data.summary["tokenizer_fingerprint"],
    }
