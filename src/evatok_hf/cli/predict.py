"""`evatok predict`: how a video goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..models.files_evatok import is_stdout
from .options import VIDEO, Place, Report, option, output
from .sampling import CLASS, PICTURE, SHOWN_SCALE, Drawing, load_pipeline, made_by, sampling, write_enlarged
from .support import by_clip, check_distinct, decibels, open_writer, prepare_outputs, seconds_since

if TYPE_CHECKING:
    import numpy as np

    from ..models.pipeline_evatok import EvatokPipeline

# How many frames after the last known one a prediction is measured: frames 9, 13 and 16 after 5 known ones.
_MEASURED = (4, 8, 11)


@dataclass
class Continuing(Drawing):
    """Options of drawing for a prediction, which is not guided by default."""

    guidance: float = sampling(1.0, "Classifier-free guidance.", min=0, max=100)


def predict(
    *,
    frames: int = option(16, "Frames of the predicted video, the known ones included.", min=2),
    known: int | None = option(None, "How many frames are known.", shown="the generator's, 5", min=1),
    going_on: bool = option(
        False, "Know the last frames rather than the first; OUT begins with the video.", "--continue"
    ),
    fps: float | None = option(None, "Resample to this rate first.", shown="the generator's", min=0.01, max=1000),
    stride: int | None = option(None, "Take every n-th frame of the video instead.", shown=False, min=1),
    hold: float | None = option(
        None,
        "Share of the last known frame in those after it, halving every 16 frames; 0 moves more, and is further from "
        "the truth.",
        shown="0.8",
        min=0,
        max=1,
    ),
    decoded: bool = option(
        False, "Show frames as they are decoded: known ones, too, and nothing of them held.", "--decoded"
    ),
    drawing: Continuing,
    class_name: str | None = CLASS("Its class.", "--class", "-c"),
    place: Place,
    scale: int | None = SHOWN_SCALE,
    picture: Path | None = PICTURE,
    out: Path | None = output(None, "The video to write.", "--out", "-o", shown=False),
    told: Report,
    video: str = VIDEO,
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
    from ..video.read import open_video

    check_distinct({"--out": out, "--picture": picture}, told.as_json)
    if decoded and hold is not None:
        raise typer.BadParameter("give one of the two, not both", param_hint="--decoded and --hold")
    if fps is not None and stride is not None:
        raise typer.BadParameter("give one of the two, not both", param_hint="--fps and --stride")
    with open_video(video) as reader:
        pipe = load_pipeline(place, told.quiet)
        options = drawing.options(pipe)
        prepare_outputs(video, out, picture=picture)
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
            for clip in videos.clips(reader, rate, stride or 1):  # a few frames at a time, at the tokenizer's size
                part = pipe.processor.postprocess(clip.pixel_values_videos[:, : clip.num_frames])[0].numpy()
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
                generator=torch.Generator().manual_seed(drawing.seed),
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
                "seed": drawing.seed,
                "tokens": result.tokens.ids.numel(),
                "clips": by_clip(result.tokens),
                **_compare(predicted, truth, len(shown)),
                **made_by(pipe),
                "output": out and str(out),
                "picture": picture and str(picture),
            }
            if picture is not None:
                _write_prediction(picture, pipe, predicted, truth, report)
    report["seconds"] = seconds_since(started)
    told.show(report if told.as_json else _prediction_for_people(report), is_stdout(out))


def _compare(predicted: np.ndarray, truth: np.ndarray | None, known: int) -> dict[str, Any]:
    """PSNR so many frames after the last known one, of the prediction and of that frame repeated."""
    if truth is None:
        return {"psnr_after": None, "psnr_after_copying": None}
    from ..metrics.pixels import frame_psnr

    last, shared = known - 1, min(len(truth), len(predicted))
    places = {str(after): last + after for after in _MEASURED if last + after < shared}
    return {
        "psnr_after": {after: frame_psnr(truth[place], predicted[place]) for after, place in places.items()},
        "psnr_after_copying": {after: frame_psnr(truth[place], truth[last]) for after, place in places.items()},
    }


def _write_prediction(
    path: Path, pipe: EvatokPipeline, predicted: np.ndarray, truth: np.ndarray | None, report: dict[str, Any]
) -> None:
    from ..pictures.clips import save_picture
    from ..pictures.samples import prediction_picture

    known = report["known"]
    title = f"{report['predicted']} frames predicted from {known}"
    subtitle = f"{Path(report['video']).name}, seed {report['seed']}; checkpoint {pipe.name}"
    if report["class"] is not None:
        subtitle = f"class {report['class']}; {subtitle}"
    lengths, most = report["clips"][0]["lengths"], max(pipe.tokenizer.config.block_lengths)
    image = prediction_picture(predicted, truth, known, lengths, most, title, subtitle)
    save_picture(image, path)


def _prediction_for_people(report: dict[str, Any]) -> dict[str, Any]:
    told = {
        f"PSNR after {after} frames": f"{decibels(value)}, copying {decibels(report['psnr_after_copying'][after])}"
        for after, value in (report["psnr_after"] or {}).items()
    }
    kept = {key: value for key, value in report.items() if "psnr" not in key and "fingerprint" not in key}
    return told | kept
