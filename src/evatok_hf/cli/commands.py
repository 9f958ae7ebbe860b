"""The command line, `evatok`.

Exit codes: 0 done, 1 failed, 2 wrong usage, 129, 130 and 143 ended by SIGHUP, SIGINT and SIGTERM, 141 by nobody reading
what it writes. Whatever fails says so in one line on stderr and leaves no output behind. Torch and transformers are
imported only inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..bundled import bundled_checkpoints, find_checkpoint
from ..models.files_evatok import is_special, is_stdout, readable
from ..video.source_files import printable
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
from .bulk import tokenize_dataset
from .demo import demo
from .generate import classes, export_llama, generate
from .predict import predict
from .push import push
from .route import RouteCommand, route
from .support import (
    OUTPUT,
    BatchOption,
    BlendOption,
    DeviceOption,
    DtypeOption,
    FpsOption,
    Group,
    JsonOption,
    MaxClipsOption,
    ModelOption,
    OverlapOption,
    QuietOption,
    RefineOption,
    VideoArgument,
    check_distinct,
    decibels,
    load,
    open_input,
    open_writer,
    option,
    prepare_output,
    prepare_outputs,
    progress,
    seconds_since,
    set_debug,
    show,
    summarize,
)

if TYPE_CHECKING:
    import numpy as np

    from ..models.modeling_evatok_generator import EvatokForCausalLM
    from ..models.modeling_evatok_router import EvatokRouter
    from ..pictures.clips import SideBySide
    from ..tokenize.clips import ReconstructedClip
    from ..tokenize.video_tokenizer import VideoTokenizer

_output = partial(option, panel=OUTPUT)
SideBySideOption = _output(
    bool, "Show the original beside it, and the tokens of each block under them.", "--side-by-side"
)
ScaleOption = _output(
    int | None, "Show frames so many times larger.", default="1, side by side up to 256 pixels", min=1, max=64
)
PictureOption = _output(Path | None, "Also write a picture that compares a few clips.", default=False)
PerceptualOption = _output(
    str | None,
    "Also measure lpips-vgg, lpips-alex, perceptual-effnet-lite0 or perceptual-hed-vgg16.",
    default=False,
    metavar="NAME",
)
CodecOption = _output(
    str | None,
    "Also show the clips of --picture as h264, hevc or av1 has them at the bits of their tokens.",
    default=False,
    metavar="NAME",
)

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


@app.command()
def info(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|VIDEO|TOKENS",
            help="Folder, Hub id or bundled name of a checkpoint, a video, a token file, or the folder of a token data "
            "set.",
            show_default="the bundled checkpoint",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a checkpoint, a video, a token file, or a data set of tokens, all of which is read then."""
    if what is not None and (Path(what).is_file() or is_special(what)):
        report = _describe_file(what)
    elif what is not None and _holds_token_data(Path(what)):
        report = _describe_token_data(what)
    elif not Path(find_checkpoint(what)).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(what)):
        raise ValueError(
            f"there is no file or folder {what}; a model on the Hub is written owner/name, and those that come with "
            f"the package are {', '.join(bundled_checkpoints())}."
        )
    else:
        report = _describe_model(what)
    show(report, as_json)


@app.command()
def encode(
    video: VideoArgument,
    tokens: Annotated[
        Path, typer.Argument(metavar="TOKENS.safetensors", help="The token file to write.", show_default=False)
    ],
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
    overlap: OverlapOption = 0,
    refine: RefineOption = 0,
    tokens_only: Annotated[
        bool,
        typer.Option("--tokens-only", help="Refuse what would need the decoder; else it is loaded for a search alone."),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a video into a file of tokens.

    Only what encoding needs is loaded; max-proxy-reward, threshold and --refine,
    which reconstruct clips to search, also load the decoder.
    """
    told = {"budget": budget, "budget_per_clip": budget_per_clip, "threshold": threshold, "metric": metric}
    allocation = choose(strategy, lengths, uniform, quality=quality, bounds=bounds, **told)
    check_distinct({"TOKENS": tokens, "--json": Path("-") if as_json else None})
    if tokens_only and (allocation.searches or refine):
        reason = f"strategy {allocation.strategy}" if allocation.searches else "--refine"
        raise typer.BadParameter(f"{reason} reconstructs clips", param_hint="--tokens-only")
    with open_input(video) as reader:
        tokenizer = load(model, device, dtype, decoder=allocation.searches or refine > 0, batch_clips=batch_clips)
        allocation = bind(allocation, tokenizer, quiet)
        prepare_output(tokens, video)
        started = time.perf_counter()
        options = {"max_clips": max_clips, "progress": not quiet, "overlap": overlap, "refinement_steps": refine}
        result = tokenizer.encode(reader, allocation, fps=fps, **options)
        result.save(tokens)
    report = summarize(result) | allocation.report() | {"refinement_steps": refine or None}
    show(report | {"output": str(tokens), "seconds": seconds_since(started)}, as_json, quiet, aside=is_stdout(tokens))


@app.command()
def decode(
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS.safetensors", help="A token file.", show_default=False)],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.mp4", help="The video to write: .mp4, .mkv, .webm, .avi, .mpg or .gif.", show_default=False
        ),
    ],
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_clips: BatchOption = None,
    fps: Annotated[
        float | None,
        typer.Option(min=0.01, max=1000, help="Play at this rate.", show_default="that of the encoded frames"),
    ] = None,
    blend: BlendOption = "fade",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a file of tokens back into a video."""
    from ..models.tokens_evatok import VideoTokens

    check_distinct({"OUT": out, "--json": Path("-") if as_json else None})
    codes = VideoTokens.load(tokens)
    tokenizer = load(model, device, dtype, batch_clips=batch_clips)
    tokenizer.check_tokens(codes)
    _check_blend(blend)
    rate = fps or codes.fps
    if rate is None:
        raise ValueError(f"{tokens} does not say its frame rate; give one with --fps.")
    prepare_output(out, tokens)
    view = _View(tokenizer)
    started = time.perf_counter()
    with open_writer(out, rate, *view.size) as writer:
        for frames in progress(tokenizer.decode(codes, blend), len(codes), quiet):
            writer.write(frames)
        report = summarize(codes) | {"frames": writer.frames_written, "fps": rate}
    show(report | {"output": str(out), "seconds": seconds_since(started)}, as_json, quiet, aside=is_stdout(out))


@app.command()
def reconstruct(
    video: VideoArgument,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT.mp4", help="The video to write; without it only measure.", show_default=False),
    ] = None,
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
    overlap: OverlapOption = 0,
    refine: RefineOption = 0,
    blend: BlendOption = "fade",
    side_by_side: SideBySideOption = False,
    scale: ScaleOption = None,
    picture: PictureOption = None,
    perceptual: PerceptualOption = None,
    codec: CodecOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Encode and decode a video, and measure what is lost.

    PSNR and the perceptual distance are means over clips, each over the true
    frames of a clip, as they are shown. They compare 8-bit frames in memory, after resizing and
    cropping and before any video codec. --codec has the same clips at the same
    bits, headers left out; where its coarsest setting needs more, it is that.
    """
    told = {"budget": budget, "budget_per_clip": budget_per_clip, "threshold": threshold, "metric": metric}
    allocation = choose(strategy, lengths, uniform, quality=quality, bounds=bounds, **told)
    _check_blend(blend)
    if out is None and (side_by_side or scale):
        option = "--side-by-side" if side_by_side else "--scale"
        raise typer.BadParameter("it needs a video to write, OUT", param_hint=option)
    if codec and picture is None:
        raise typer.BadParameter("it needs a picture to show it in, --picture", param_hint="--codec")
    check_distinct({"OUT": out, "--picture": picture, "--json": Path("-") if as_json else None})
    with open_input(video) as reader:
        tokenizer = load(model, device, dtype, batch_clips=batch_clips)
        allocation = bind(allocation, tokenizer, quiet)
        distance = _Perceptual(perceptual, tokenizer) if perceptual else None
        prepare_outputs(video, picture, out)
        view = _View(tokenizer, side_by_side, scale)
        rate = tokenizer.output_fps(reader, fps)
        rival = _Codec(codec, tokenizer, rate, distance) if codec else None
        total = tokenizer.count_clips(reader, fps, max_clips=max_clips, overlap=overlap)
        shown = {int((i + 0.5) * total / 3) for i in range(3)}  # clips of the picture, spread over the video
        rows: list[dict[str, Any]] = []
        pictured: list[ReconstructedClip] = []
        frames = 0
        started = time.perf_counter()
        with open_writer(out, rate, *view.size) as writer:
            options = {"max_clips": max_clips, "progress": not quiet, "overlap": overlap, "refinement_steps": refine}
            clips = tokenizer.reconstruct(reader, allocation, fps=fps, blend=blend, **options)
            for clip in clips:
                row = {"lengths": clip.lengths, "tokens": sum(clip.lengths), "psnr": clip.psnr}
                rows.append(row | ({"perceptual": distance(clip.original, clip.reconstruction)} if distance else {}))
                frames += len(clip.original)
                if writer is not None:
                    writer.write(view.frames(clip))
                if picture is not None and clip.index in shown:
                    pictured.append(clip)
            pictured = pictured or [clip]
            compressed, others = rival.compress(pictured) if rival else (None, [])
            report: dict[str, Any] = {
                "tokens": sum(row["tokens"] for row in rows),
                "psnr": sum(row["psnr"] for row in rows) / len(rows),
                "perceptual": distance.summary(rows) if distance else None,
                "codec": compressed,
                "frames": frames,
                "fps": rate,
                "overlap": overlap,
                "refinement_steps": refine or None,
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
    show(report | {"seconds": seconds_since(started)}, as_json, quiet, aside=is_stdout(out))


app.command(cls=RouteCommand)(route)
for command in (tokenize_dataset, generate, predict, classes, export_llama, push, demo):
    app.command()(command)


def _check_blend(blend: str) -> None:
    from ..tokenize.seams import check_blend

    try:
        check_blend(blend)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--blend") from error


class _Perceptual:
    """A perceptual distance over the true frames of clips."""

    def __init__(self, name: str, tokenizer: VideoTokenizer) -> None:
        from ..metrics.perceptual import load_perceptual

        self.name = name
        self._metric = load_perceptual(name).to(tokenizer.model.device)

    def __call__(self, original: np.ndarray, shown: np.ndarray) -> float:
        return self._metric.between(original, shown)

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"name": self.name, "distance": sum(row["perceptual"] for row in rows) / len(rows)}


class _Codec:
    """A conventional codec at the bits of the tokens of clips, quick rather than thorough."""

    def __init__(self, name: str, tokenizer: VideoTokenizer, fps: float | None, distance: _Perceptual | None) -> None:
        from ..video.codecs import find_codec

        self._codec, self._fps = find_codec(name).quick(), fps or 25.0
        self._config, self._distance = tokenizer.model.config, distance

    def compress(self, clips: list[ReconstructedClip]) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Means over the clips for the report, and the frames of each."""
        import torch

        from ..metrics import psnr
        from ..video.codecs import CodecBaseline

        rows, shown = [], []
        for clip in clips:
            allowed = self._config.bits(clip.lengths)
            made = CodecBaseline(clip.original, self._codec, self._fps).at_bits(allowed)
            quality = psnr(*(torch.from_numpy(frames)[None] for frames in (clip.original, made.frames)))
            rows.append({"bits": made.bits, "psnr": float(quality), "tokens_bits": allowed, "tokens_psnr": clip.psnr})
            if self._distance:
                for key, frames in (("perceptual", made.frames), ("tokens_perceptual", clip.reconstruction)):
                    rows[-1][key] = self._distance(clip.original, frames)
            shown.append(made.frames)
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        return {"name": self._codec.name, "clips": len(clips), **means}, shown


class _View:
    """What the written video shows: the reconstruction as it is, enlarged, or beside the original."""

    def __init__(self, tokenizer: VideoTokenizer, side_by_side: bool = False, scale: int | None = None) -> None:
        config = tokenizer.model.config
        side = config.image_size
        self._scale = scale or (max(1, round(256 / side)) if side_by_side else 1)
        self.size = side * self._scale, side * self._scale
        self._both: SideBySide | None = None
        if side_by_side:
            from ..pictures.clips import SideBySide

            self._both = SideBySide(side, side, max(config.block_lengths), config.num_frames, self._scale)
            self.size = self._both.size

    def frames(self, clip: ReconstructedClip) -> Any:
        """uint8 (f, height, width, 3)."""
        if self._both is not None:
            return self._both.frames(clip)
        if self._scale == 1:
            return clip.reconstruction
        from ..pictures.clips import enlarge

        return enlarge(clip.reconstruction, *self.size)


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

    tokenizer = load(name, "cpu", "float32")
    generator = load_generator(find_checkpoint(name), torch.device("cpu"), torch.bfloat16)
    config = tokenizer.model.config
    return {
        "kind": "model",
        "checkpoint": tokenizer.name,
        "parameters": sum(p.numel() for p in tokenizer.model.parameters()),
        "fingerprint": tokenizer.model.fingerprint(),
        "candidates": list(config.block_lengths),
        "blocks": config.num_blocks,
        "assignments": len(config.assignment_space),
        "clip": f"{config.num_frames} frames of {config.image_size} x {config.image_size}",
        "codebook": config.codebook_size,
        "router": _describe_router(tokenizer.router),
        "generator": _describe_generator(generator),
        "config": config.to_dict(),
    }


def _describe_router(router: EvatokRouter | None) -> dict[str, Any] | None:
    if router is None:
        return None
    return {
        "parameters": sum(p.numel() for p in router.parameters()),
        "quality": router.config.quality,
        "distance": router.config.distance,
        "fingerprint": router.fingerprint(),
    }


def _describe_generator(generator: EvatokForCausalLM | None) -> dict[str, Any] | None:
    if generator is None:
        return None
    config = generator.config
    return {
        "parameters": sum(p.numel() for p in generator.parameters()),
        "classes": config.num_classes,
        "layout": config.layout,
        "known_frames": config.known_frames,
        "fps": config.fps,
        "tokenizer_fingerprint": config.tokenizer_fingerprint,
        "fingerprint": generator.fingerprint(),
    }


def _describe_file(name: str) -> dict[str, Any]:
    with readable(name) as path:
        with open(path, "rb") as file:
            head = file.read(9)
        # a safetensors file: eight bytes of length, then a JSON object
        describe = _describe_tokens if head[8:] == b"{" or path.endswith(".safetensors") else _describe_video
        try:
            report = describe(path)
        except ValueError as error:
            raise ValueError(str(error).replace(path, name)) from error
    return report | ({"video": name} if "video" in report else {})


def _describe_video(path: str) -> dict[str, Any]:
    with open_input(path) as video:
        frames = video.num_frames
        return {
            "kind": "video",
            "video": path,
            "frames": frames,
            "fps": video.fps,
            "height": video.height,
            "width": video.width,
            "seconds": frames / video.fps,
            "reader": video.backend,
        }


def _describe_tokens(path: str) -> dict[str, Any]:
    from ..models.tokens_evatok import VideoTokens

    return {"kind": "tokens"} | summarize(VideoTokens.load(path))


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
