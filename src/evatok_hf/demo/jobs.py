"""Jobs of the app. The models live in this module, loaded once; every job is a function of its arguments alone.

On ZeroGPU (where the package `spaces` is) the jobs run on a GPU that is lent for each call; uploads are read and
checked before. Elsewhere one job runs at a time, so that two visitors do not slow each other down.
"""

from __future__ import annotations

import contextvars
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

try:
    from spaces import GPU  # before torch, which it patches; a folder named spaces has none
except ImportError:
    GPU = None

import numpy as np
import torch

from ..bundled import find_checkpoint
from ..metrics.perceptual import load_perceptual
from ..metrics.pixels import frame_psnr
from ..models.checkpoint_evatok import resolve_device
from ..models.configuration_evatok import EvatokConfig
from ..models.pipeline_evatok import EvatokPipeline, to_uint8
from ..models.tokens_evatok import VideoTokens
from ..models.video_processing_evatok import HOLD
from ..pictures.samples import Sample, samples_of
from ..tokenize.clips import ReconstructedClip
from ..tokenize.memory import PreparedVideo
from ..tokenize.video_tokenizer import VideoTokenizer

METRIC = "perceptual-effnet-lite0"  # its weights come with a package
Progress = Callable[[float, str], Any]

_loaded: dict[str, Any] = {}
# Always the same thread: what the C library and torch hold for each thread that ran a model would otherwise add up.
_one_at_a_time = ThreadPoolExecutor(1, thread_name_prefix="evatok_models")


def load(model: str | None = None, device: str = "auto") -> EvatokPipeline:
    """Loads the models that all jobs use, and gives the pipeline.

    Where no model is named, the default checkpoint reconstructs, and the default one of those with a generator
    generates and continues. Raises ValueError as `EvatokPipeline.from_pretrained`.
    """
    where = resolve_device(device)
    pipe = EvatokPipeline.from_pretrained(model).to(where)
    pipe.set_progress_bar_config(disable=True)
    alone = find_checkpoint(model) == find_checkpoint(model, "generator")
    tokenizer = VideoTokenizer.from_pipe(pipe) if alone else VideoTokenizer.from_pretrained(model, device)
    _loaded.update(pipe=pipe, tokenizer=tokenizer, metric=load_perceptual(METRIC).to(where))
    return pipe


def pipeline() -> EvatokPipeline:
    """The models that generate and continue."""
    return _loaded["pipe"]


def tokenizer() -> VideoTokenizer:
    """The tokenizer of whole videos."""
    return _loaded["tokenizer"]


def fixed_length(config: EvatokConfig) -> int:
    """Tokens of a block of the fixed-length baseline: the second-largest candidate, as the paper's 256 of 32 .. 512."""
    return config.block_lengths[-2:][0]


def frames_of(video: PreparedVideo) -> np.ndarray:
    """uint8 (F, H, W, 3) at the size of what continues videos, which prepared them."""
    processor = pipeline().processor
    clips = [processor.postprocess(clip.pixel_values_videos[:, : clip.num_frames])[0] for clip in video.clips]
    return torch.cat(clips).numpy()


def _job(function: Callable[..., Any]) -> Callable[..., Any]:
    """One at a time here; on ZeroGPU as its queue has it."""
    if GPU is not None:
        return GPU(duration=60)(function)

    @functools.wraps(function)
    def alone(*args: Any, progress: Progress, **kwargs: Any) -> Any:
        run = contextvars.copy_context().run
        job = _one_at_a_time.submit(run, function, *args, progress=progress, **kwargs)
        try:
            while not wait([job], timeout=0.5).done:
                if not job.running():
                    progress(0, "Another visitor's video comes first")  # which may also end the wait
            return job.result()
        finally:
            job.cancel()

    return alone


# --- reconstruction ---------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Tokens of a whole video and what they keep: means over its clips."""

    tokens: int
    psnr: float
    perceptual: float


@dataclass
class Reconstruction:
    """A video and what its tokens decode to.

    Attributes:
        clips: of the video, in order.
        tokens: of the whole video, as `VideoTokenizer.encode` gives them.
        adaptive: of these tokens.
        fixed_tokens: what the fixed length would take.
        fixed: of the fixed length, None where it was not asked for.
        seconds: for encoding and decoding, without reading and measuring.
    """

    clips: list[ReconstructedClip]
    tokens: VideoTokens
    adaptive: Measured
    fixed_tokens: int
    fixed: Measured | None
    seconds: float

    @property
    def saved(self) -> float:
        """Share of the fixed length's tokens that were not needed; negative where more were."""
        return 1 - self.adaptive.tokens / self.fixed_tokens


@_job
def reconstruct(
    video: PreparedVideo, quality: float | None, budget: int | None, measure_fixed: bool, progress: Progress
) -> Reconstruction:
    """A video through its tokens, by quality or by a budget for all of it; without either, by the default.

    Raises:
        ValueError: as `VideoTokenizer.reconstruct`.
    """
    rounds, length = 1 + measure_fixed, fixed_length(tokenizer().model.config)

    def run(turn: int, what: str, **options: Any) -> tuple[list[ReconstructedClip], Measured, float]:
        clips, distance, seconds, started = [], 0.0, 0.0, time.perf_counter()
        for clip in tokenizer().reconstruct(video, **options):
            seconds += time.perf_counter() - started
            clips.append(clip)
            distance += _loaded["metric"].between(clip.original, clip.reconstruction)
            progress((turn + len(clips) / len(video.clips)) / rounds, f"{what}: clip {len(clips)}")
            started = time.perf_counter()
        count = len(clips)
        tokens, psnr = sum(clip.tokens.ids.numel() for clip in clips), sum(clip.psnr for clip in clips)
        return clips, Measured(tokens, psnr / count, distance / count), seconds

    clips, adaptive, seconds = run(0, "Adaptive", quality=quality, budget=budget)
    fixed = run(1, "Fixed length", lengths=length)[1] if measure_fixed else None
    return Reconstruction(
        clips,
        VideoTokens.concatenate([clip.tokens for clip in clips], num_frames=video.num_frames),
        adaptive,
        length * len(clips[0].lengths) * len(clips),
        fixed,
        seconds,
    )


# --- generation -------------------------------------------------------------------------------------------------------


@_job
def generate(
    name: str | None, count: int, seed: int, guidance: float, temperature: float, progress: Progress
) -> list[Sample]:
    """Clips of a class (None: of no class, where guidance does nothing). Raises ValueError as the pipeline."""
    result = pipeline()(
        name,
        count,
        guidance_scale=None if name is None else guidance,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=lambda pipe, step, done, tensors: progress(done, "Drawing tokens"),
    )
    return samples_of(result)


# --- prediction -------------------------------------------------------------------------------------------------------


@dataclass
class Continuation:
    """A video that was continued, frames as uint8 (f, H, W, 3) at the model's size.

    Attributes:
        frames: the known ones, then the predicted ones.
        known: how many are known.
        truth: the same frames in truth, as far as they are there; None where the video ends with the known ones.
        tokens: of each clip that was drawn.
        psnr: dB of each predicted frame for which there is a true one, and `copied` of the last known frame repeated.
    """

    frames: np.ndarray
    known: int
    truth: np.ndarray | None
    tokens: VideoTokens
    psnr: list[float]
    copied: list[float]


@_job
def predict(
    frames: np.ndarray,
    from_end: bool,
    count: int,
    name: str | None,
    seed: int,
    guidance: float,
    temperature: float,
    hold: float = HOLD,
    *,
    progress: Progress,
) -> Continuation:
    """`count` frames after the first ones of a video, or after its end. Raises ValueError as `EvatokPipeline.predict`.

    Args:
        frames: uint8 (F, H, W, 3) at the generator's rate.
        hold: share of the last known frame in those after it.
    """
    pipe = pipeline()
    seen = pipe.require_generator().config.known_frames
    shown = frames[-seen:] if from_end else frames[:seen]
    result = pipe.predict(
        shown,
        len(shown) + count,
        seen,
        name,
        hold=hold,
        guidance_scale=1.0 if name is None else guidance,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=lambda pipe, step, done, tensors: progress(done, "Predicting"),
    )
    predicted = to_uint8(result.frames[0])
    truth = None if from_end or len(frames) <= len(shown) else frames[: len(predicted)]
    places = () if truth is None else range(len(shown), len(truth))
    psnr = [frame_psnr(truth[place], predicted[place]) for place in places]
    copied = [frame_psnr(truth[place], shown[-1]) for place in places]
    return Continuation(predicted, len(shown), truth, result.tokens, psnr, copied)
