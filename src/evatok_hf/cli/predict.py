"""`evatok predict`: how a video goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.files_evatok import is_stdout
from .sampling import (
    BudgetOption,
    ClassOption,
    CompileOption,
    LengthsOption,
    PictureOption,
    PredictionGuidanceOption,
    ScaleOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    check_outputs,
    load_pipeline,
    made_by,
    sampling_options,
    write_enlarged,
)
from .support import (
    OUTPUT,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    QuietOption,
    VideoArgument,
    decibels,
    open_input,
    open_writer,
    option,
    prepare_outputs,
    seconds_since,
    show,
)

if TYPE_CHECKING:
    import numpy as np

    from ..models.pipeline_evatok import EvatokPipeline
    from ..tokenize.video_tokenizer import VideoTokenizer
    from ..video.read import VideoReader

# How many frames after the last known one a prediction is measured: frames 9, 13 and 16 after 5 known ones.
_MEASURED = (4, 8, 11)
HoldOption = option(
    float | None,
    "Share of the last known frame in those after it, halving every 16 frames; 0 moves more, and is further from the "
    "truth.",
    default="0.8",
    min=0,
    max=1,
)
PredictionOutOption = option(Path | None, "The video to write.", "--out", "-o", default=False, panel=OUTPUT)


def predict(
    video: VideoArgument,
    frames: Annotated[int, typer.Option(min=2, help="Frames of the predicted video, the known ones included.")] = 16,
    known: Annotated[
        int | None, typer.Option(min=1, help="How many frames are known.", show_default="the generator's, 5")
    ] = None,
    going_on: Annotated[
        bool, typer.Option("--continue", help="Know the last frames rather than the first; OUT begins with the video.")
    ] = False,
    fps: Annotated[
        float | None,
        typer.Option(min=0.01, max=1000, help="Resample to this rate first.", show_default="the generator's"),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Take every n-th frame of the video instead.", show_default=False)
    ] = None,
    class_name: ClassOption = None,
    seed: SeedOption = 0,
    guidance: PredictionGuidanceOption = 1.0,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = None,
    top_p: TopPOption = 1.0,
    lengths: LengthsOption = None,
    budget: BudgetOption = None,
    compiled: CompileOption = None,
    hold: HoldOption = None,
    decoded: Annotated[
        bool,
        typer.Option("--decoded", help="Show frames as they are decoded: known ones, too, and nothing of them held."),
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: PredictionOutOption = None,
    scale: ScaleOption = None,
    picture: PictureOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Predict how a video goes on after its first frames, or after its end.

    Where the video has the true frames, PSNR is measured against them, and that
    of repeating the last known frame beside it.
    """
    import numpy as np
    import torch

    from ..models.pipeline_evatok import to_uint8
    from ..models.video_processing_evatok import HOLD, check_known_frames
    from ..tokenize.video_tokenizer import VideoTokenizer

    check_outputs({"--out": out, "--picture": picture}, as_json, required=False)
    if decoded and hold is not None:
        raise typer.BadParameter("give one of the two, not both", param_hint="--decoded and --hold")
    if fps is not None and stride is not None:
        raise typer.BadParameter("give one of the two, not both", param_hint="--fps and --stride")
    with open_input(video) as reader:
        pipe = load_pipeline(model, device, dtype, quiet)
        options = sampling_options(pipe, guidance, temperature, top_k, top_p, lengths, budget, compiled)
        prepare_outputs(video, picture, out)
        seen = known or pipe.require_generator().config.known_frames
        check_known_frames(seen, pipe.tokenizer.config.num_frames)
        if frames <= seen:
            raise typer.BadParameter(f"counts the {seen} known frames, too; give more", param_hint="--frames")
        rate = None if stride is not None else fps or pipe.fps
        videos = VideoTokenizer.from_pipe(pipe)
        played = videos.output_fps(reader, rate, stride or 1)
        started = time.perf_counter()
        side = pipe.tokenizer.config.image_size
        larger = scale or max(1, round(256 / side))
        with open_writer(out, played, side * larger, side * larger) as writer:
            first = np.empty((0, side, side, 3), dtype=np.uint8)  # or, going on, the last frames so far
            count = 0
            for part in _frames_of(videos, reader, rate, stride or 1):
                count += len(part)
                first = np.concatenate([first, part])
                first = first[-seen:] if going_on else first[: max(frames, seen)]
                if going_on:
                    write_enlarged(writer, part, larger)
                elif len(first) >= frames:
                    break
            shown = first if going_on else first[:seen]
            result = pipe.predict(
                shown,
                frames,
                seen,
                class_name,
                known="decoded" if decoded else "input",
                hold=None if decoded else HOLD if hold is None else hold,
                generator=torch.Generator().manual_seed(seed),
                **options,
            )
            predicted = to_uint8(result.frames[0])
            write_enlarged(writer, predicted[len(shown) :] if going_on else predicted, larger)
            truth = None if going_on or len(first) <= len(shown) else first
            report = {
                "video": video,
                "frames": count + frames - len(shown) if going_on else frames,
                "known": len(shown),
                "predicted": frames - len(shown),
                "fps": played,
                "class": result.labels[0],
                "seed": seed,
                "tokens": result.tokens.ids.numel(),
                "clips": [{"lengths": row, "tokens": sum(row)} for row in result.tokens.lengths.tolist()],
                **_compare(predicted, truth, len(shown)),
                **made_by(pipe),
                "output": out and str(out),
                "picture": picture and str(picture),
            }
            if picture is not None:
                _write_prediction(picture, pipe, predicted, truth, report)
    report["seconds"] = seconds_since(started)
    show(report if as_json else _prediction_for_people(report), as_json, quiet, aside=is_stdout(out))


# --- inside -----------------------------------------------------------------------------------------------------------


def _frames_of(videos: VideoTokenizer, reader: VideoReader, fps: float | None, stride: int) -> Iterator[np.ndarray]:
    """The video at the tokenizer's size, uint8 (f, H, W, 3), a few frames at a time."""
    for clip in videos.clips(reader, fps, stride):
        yield videos.processor.postprocess(clip.pixel_values_videos[:, : clip.num_frames])[0].numpy()


def _compare(predicted: np.ndarray, truth: np.ndarray | None, known: int) -> dict[str, Any]:
    """PSNR so many frames after the last known one, of the prediction and of that frame repeated."""
    if truth is None:
        return {"psnr_after": None, "psnr_after_copying": None}
    places = {after: known - 1 + after for after in _MEASURED}
    places = {after: place for after, place in places.items() if place < min(len(truth), len(predicted))}
    return {
        "psnr_after": {str(after): _psnr(truth[place], predicted[place]) for after, place in places.items()},
        "psnr_after_copying": {str(after): _psnr(truth[place], truth[known - 1]) for after, place in places.items()},
    }


def _psnr(truth: np.ndarray, frame: np.ndarray) -> float:
    import torch

    from ..metrics.pixels import psnr

    return float(psnr(torch.from_numpy(truth)[None], torch.from_numpy(frame)[None]))


def _write_prediction(
    path: Path, pipe: EvatokPipeline, predicted: np.ndarray, truth: np.ndarray | None, report: dict[str, Any]
) -> None:
    from ..pictures.clips import save_picture
    from ..pictures.samples import prediction_picture

    known, captions = report["known"], None
    if truth is not None:
        pairs = zip(truth, predicted, strict=False)
        captions = [decibels(_psnr(a, b)) if i >= known else "" for i, (a, b) in enumerate(pairs)]
        captions += [""] * (len(predicted) - len(captions))
    title = f"{report['predicted']} frames predicted from {known}"
    subtitle = f"{Path(report['video']).name}, seed {report['seed']}; checkpoint {pipe.name}"
    if report["class"] is not None:
        subtitle = f"class {report['class']}; {subtitle}"
    lengths, most = report["clips"][0]["lengths"], max(pipe.tokenizer.config.block_lengths)
    image = prediction_picture(predicted, truth, known, lengths, most, title, subtitle, captions)
    save_picture(image, path)


def _prediction_for_people(report: dict[str, Any]) -> dict[str, Any]:
    told = {
        f"PSNR after {after} frames": f"{decibels(value)}, copying {decibels(report['psnr_after_copying'][after])}"
        for after, value in (report["psnr_after"] or {}).items()
    }
    kept = {key: value for key, value in report.items() if "psnr" not in key and "fingerprint" not in key}
    return told | kept
