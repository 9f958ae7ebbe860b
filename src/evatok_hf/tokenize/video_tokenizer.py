"""Whole videos of any length to tokens and back, clip by clip in constant memory.

How many tokens each block gets is an allocation (`allocation/strategies.py`); a budget over a whole video takes two
passes, of which the first keeps a few numbers of each clip.

A video is cut into clips of `config.num_frames` frames, which may overlap. The last one is filled up by repeating its
last frame; the true number of frames travels in `VideoTokens.num_frames` and is restored on decoding. Clips are
independent of each other; what is kept from one to the next is in `tokenize/streams.py`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from ..allocation.strategies import Allocation
from ..bundled import find_checkpoint
from ..metrics.pixels import frame_psnr
from ..models.checkpoint_evatok import find_dtype, load_checkpoint, resolve_device, save_checkpoint
from ..models.configuration_evatok import LengthsLike
from ..models.modeling_evatok import EvatokModel
from ..models.modeling_evatok_router import EvatokRouter, check_same_space
from ..models.tokens_evatok import VideoTokens
from ..models.video_processing_evatok import EvatokVideoProcessor
from ..video.read import VideoReader
from .ahead import ahead, to_device
from .clips import ReconstructedClip, RoutedClip
from .memory import MemoryVideo, PreparedVideo, Video, open_any
from .seams import check_overlap, count_clips
from .streams import Choice, ClipFeed, DecodeStream, EncodeStream, VideoClip, choose_lengths

if TYPE_CHECKING:
    from ..models.pipeline_evatok import EvatokPipeline

# Clips that an accelerator encodes or decodes together.
BATCH_CLIPS = 16
# What says how many tokens blocks get: the numbers themselves, a rule, or one's own function of a clip (1, F, 3, H, W).
Given = LengthsLike | Allocation | Choice | None
Batches = Generator[tuple[list[VideoClip], torch.Tensor]]  # clips, and all their frames (B, F, 3, H, W)


class VideoTokenizer:
    """A tokenizer of whole videos: a model, its video processor, perhaps a router, and the way of a file through them.

    A video may be a path, "-" for standard input, a URL (read through fsspec), bytes, a binary file object, a row
    `{"path": .., "bytes": ..}` of `datasets`, an open `VideoReader` (which stays open), a reader of torchcodec or
    decord, or frames: an array or tensor (F, H, W, 3) or (F, 3, H, W), uint8 or floats in [0, 1], or a list of images.
    A file is never held as a whole.

    Wherever `fps` is asked for, None takes the processor's rate, or the video's own where the processor has none; then
    every `stride`-th frame is kept. Frames in memory have no rate of their own: `fps` says it, and they are sampled to
    the processor's, or taken as they come where it has none.

    `encode`, `reconstruct` and `route` take at most one of these; without any, the router chooses at its own quality or
    1.2, or every block gets the middle candidate where there is no router:

    - `lengths`: tokens of each block, T numbers for every clip or one for all blocks; or an `Allocation`, of any
      strategy; or a function from the clip (1, F, 3, H, W) to them.
    - `quality`: w_q in 0..2, what the router weighs quality with, against 2 - w_q for tokens.
    - `budget`: tokens for the whole video, of which the router makes the best. The video is read twice.
    - `budget_per_clip`: tokens for each clip at most.

    Args:
        model: the tokenizer, on its device.
        processor: brings frames to the model's size.
        router: of the same clips and assignments, or None.
        batch_clips: clips that are encoded or decoded together, while another thread reads the video; by default one on
            a CPU, exactly, and `BATCH_CLIPS` on an accelerator (see `EvatokModel.encode`, `exact`).

    Raises:
        ValueError: a router of other clips or assignments; no clips in a batch.
    """

    def __init__(
        self,
        model: EvatokModel,
        processor: EvatokVideoProcessor,
        router: EvatokRouter | None = None,
        batch_clips: int | None = None,
    ) -> None:
        if batch_clips is not None and batch_clips < 1:
            raise ValueError(f"batch_clips is {batch_clips}; give a whole number of 1 or more.")
        if router is not None:
            check_same_space(model, router)
            router.eval()
        self.model = model.eval()
        self.processor = processor
        self.router = router
        self._given_batch = batch_clips

    @property
    def batch_clips(self) -> int:
        """Clips that are encoded or decoded together."""
        return self._given_batch or (1 if self.model.device.type == "cpu" else BATCH_CLIPS)

    @property
    def _exact(self) -> bool:
        return self.batch_clips == 1 and self.model.device.type == "cpu"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        token: str | bool | None = None,
        decoder: bool = True,
        batch_clips: int | None = None,
        path_or_hub_id: str | Path | None = None,
    ) -> VideoTokenizer:
        """Loads model, processor, and the router where there is one.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id that holds the tokenizer itself or in `tokenizer/`, and
                may hold a router in `router/`, or the name of a bundled checkpoint; None takes the default one.
            device: "cpu", "cuda", "cuda:1", "mps", or "auto" (a GPU with CUDA if there is one, else the CPU).
            dtype: "float32" or "bfloat16", or the torch dtype. Ids may differ between dtypes.
            revision: branch, tag or commit on the Hub.
            token: for private repositories; by default the one of `hf auth login`.
            decoder: False loads what encoding and routing need; the tokens are the same, under the same fingerprint.
            batch_clips: see the class.
            path_or_hub_id: the name that the first argument had.

        Raises:
            ValueError: an unknown or unavailable device, an unknown dtype, a folder or repository that is missing, not
                reachable, or holds no complete tokenizer; a router that is incomplete or of another tokenizer.
        """
        if path_or_hub_id is not None:
            message = "path_or_hub_id is pretrained_model_name_or_path now; call it that."
            warnings.warn(message, FutureWarning, stacklevel=2)
            pretrained_model_name_or_path = path_or_hub_id
        where, kind = resolve_device(device), find_dtype(dtype)
        name = find_checkpoint(pretrained_model_name_or_path)
        models = load_checkpoint(name, where, kind, decoder, revision=revision, token=token)
        return cls(*models, batch_clips=batch_clips)

    @classmethod
    def from_pipe(cls, pipe: EvatokPipeline) -> VideoTokenizer:
        """A tokenizer of videos that shares tokenizer, processor and router with an `EvatokPipeline`."""
        return cls(pipe.tokenizer, pipe.processor, pipe.router)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `tokenizer/` and, where there is one, `router/`, which `from_pretrained` reads.

        Raises:
            ValueError: a folder that cannot be written to, or that has a router already and would keep it beside a
                tokenizer that has none.
        """
        save_checkpoint(folder, self.model, self.processor, self.router)

    @property
    def name(self) -> str:
        """Name of the checkpoint."""
        return Path(self.model.config._name_or_path).name or "unnamed"

    def clips(
        self,
        source: Video,
        fps: float | None = None,
        stride: int = 1,
        max_clips: int | None = None,
        overlap: int = 0,
    ) -> Iterator[VideoClip]:
        """Preprocessed clips of a video in order, read as they are asked for; at most `max_clips`.

        Every frame is preprocessed on its own, so that a clip does not depend on how the file is read.

        Raises:
            ValueError: at once, for a rate, stride or number of clips that is not positive, or an overlap outside
                0 .. F / 2.
            VideoReadError: on the way, where the video cannot be opened or read on.
        """
        return self._clips(source, self._sampling(fps, stride, max_clips, overlap))

    def prepare(
        self, source: Video, fps: float | None = None, stride: int = 1, max_clips: int | None = None
    ) -> PreparedVideo:
        """Reads and preprocesses a short video whole; `encode`, `route` and `reconstruct` take the result as a video.

        For passing over a video several times, or where it must not be read. Memory: 12 bytes a pixel of the model's
        size and frame. Arguments and errors as `clips`.
        """
        sampling = self._sampling(fps, stride, max_clips)
        with _opened(source, sampling) as (video, sampling):
            clips = list(self._clips(video, sampling))
            return PreparedVideo(clips, self.output_fps(video, sampling.fps, stride), video.height, video.width)

    def output_fps(self, video: VideoReader, fps: float | None = None, stride: int = 1) -> float | None:
        """Frames a second of the clips that `clips` makes of this video, None where its own rate is not known."""
        own = None if isinstance(video, PreparedVideo) else self.processor.fps
        rate = fps or own or video.fps
        return None if rate is None else rate / stride

    def count_clips(
        self,
        video: VideoReader,
        fps: float | None = None,
        stride: int = 1,
        max_clips: int | None = None,
        overlap: int = 0,
    ) -> int:
        """Counts the clips that `clips` will make, from the frames that the file announces."""
        rate = None if isinstance(video, PreparedVideo) else self.processor.fps if fps is None else fps
        clips = count_clips(video.count_sampled(rate, stride), self.model.config.num_frames, overlap)
        return clips if max_clips is None else min(clips, max_clips)

    def allocation(self, strategy: str | None = None, **options) -> Allocation:
        """`Allocation(strategy, **options)`, bound; its name in the release before."""
        message = "tokenizer.allocation(..) is Allocation(..) now, which encode takes; bind it to call it."
        warnings.warn(message, FutureWarning, stacklevel=2)
        return Allocation(strategy, **options).bind(self.model, self.router)

    def encode(
        self,
        source: Video,
        lengths: Given = None,
        fps: float | None = None,
        stride: int = 1,
        max_clips: int | None = None,
        progress: bool = False,
        *,
        quality: float | None = None,
        budget: int | None = None,
        budget_per_clip: int | None = None,
        overlap: int = 0,
        refinement_steps: int = 0,
    ) -> VideoTokens:
        """Encodes a video to tokens. Without refinement the decoder does not run.

        Args:
            source: the video.
            lengths, quality, budget, budget_per_clip: see the class; at most one.
            fps, stride, max_clips: see `clips`.
            progress: show a progress bar on stderr, if that is a terminal.
            overlap: frames that each clip has in common with the one before, which `decode` fades into each other; it
                takes F / (F - overlap) times as many clips, and at F frames a clip up to F / 2.
            refinement_steps: of searching for better ids for the same numbers of tokens, see `EvatokModel.encode`; 10
                gain most of what there is and take some fifty times as long as the encoder alone.

        Returns:
            `VideoTokens` on the CPU with `fps` of the encoded frames, their true number `num_frames`, and `overlap`.

        Raises:
            ValueError: lengths outside the assignment space, a quality outside 0..2, a budget that is too small, more
                than one of them, or one that needs a router where there is none; a negative number of steps, or steps
                without a decoder; and as `clips`.
        """
        choose = self._chosen(lengths, quality, budget, budget_per_clip)
        sampling = self._sampling(fps, stride, max_clips, overlap)
        with self._encoded(source, choose, sampling, progress, refinement_steps) as (stream, batches):
            return stream.join([tokens for _, parts in batches for tokens in parts])

    def route(
        self,
        source: Video,
        lengths: Given = None,
        fps: float | None = None,
        stride: int = 1,
        max_clips: int | None = None,
        progress: bool = False,
        *,
        quality: float | None = None,
        budget: int | None = None,
        budget_per_clip: int | None = None,
        overlap: int = 0,
    ) -> Iterator[RoutedClip]:
        """Chooses the lengths of each clip of a video without making tokens. Arguments and errors as `encode`."""
        choose = self._chosen(lengths, quality, budget, budget_per_clip)
        return self._route(source, choose, self._sampling(fps, stride, max_clips, overlap), progress)

    def streaming(
        self,
        lengths: Given = None,
        fps: float | None = None,
        *,
        quality: float | None = None,
        budget_per_clip: int | None = None,
        overlap: int = 0,
        part: str = "clip",
        refinement_steps: int = 0,
    ) -> EncodeStream:
        """Encodes a video whose frames come bit by bit, in constant memory.

            with tokenizer.streaming(quality=1.2, fps=25) as stream:
                for frames in camera:  # uint8 (n, H, W, 3), any n
                    send(stream.push(frames))  # a list of VideoTokens, often empty
                send(stream.finish())

        The ids are those of `encode`, however the frames are cut into pushes. A router must see the whole clip, so that
        tokens come a clip at a time; with `part="block"` and given lengths, those of each block come with its last
        frame. A `budget` for the whole video cannot be split before its end is known.

        Args:
            lengths, quality, budget_per_clip: see the class; at most one.
            fps: the rate of the frames, for the tokens to say. Frames are taken as they come, no rate is changed.
            overlap, refinement_steps: see `encode`.
            part: "clip" or "block".

        Raises:
            ValueError: as `encode`; "block" without lengths.
        """
        self._sampling(fps, overlap=overlap)
        choose = self._chosen(lengths, quality, None, budget_per_clip)
        if _looks_twice(choose):
            raise ValueError("a budget for the whole video cannot be split before its end; give budget_per_clip.")
        if part == "block" and (lengths is None or callable(lengths)):
            raise ValueError("blocks come out before the clip is whole, so that nothing can choose; give lengths.")
        return EncodeStream(
            self.model, self.processor, choose, overlap, part, lengths, fps, refinement_steps, self._exact
        )

    def streaming_decode(self, blend: str = "fade") -> DecodeStream:
        """Decodes tokens that come bit by bit, in constant memory.

            with tokenizer.streaming_decode() as stream:
                for tokens in arriving:  # VideoTokens of clips or of blocks, as `streaming` gives them
                    show(stream.push(tokens))  # uint8 (n, H, W, 3), n may be 0
                show(stream.finish())

        Where clips overlap, the frames that the next clip can still change are held back; else nothing is.

        Raises:
            ValueError: an unknown blend, see `decode`; a tokenizer without its decoder.
        """
        return DecodeStream(self.model, self.processor, blend, self._exact)

    def decode(self, tokens: VideoTokens, blend: str = "fade") -> Iterator[np.ndarray]:
        """Decodes tokens to frames, clip by clip, exactly as many as were encoded.

        Args:
            tokens: of a video.
            blend: how clips meet. Frames that they have in common "fade" from the earlier to the later, or "cut" shows
                the earlier alone; "carry" also lets what stands still pass over into the next clip, whether they
                overlap or not (see `seams.Seam`). It is for clips that follow each other, as those of a video do.

        Returns:
            Iterator of uint8 (f, H, W, 3); f is the model's `num_frames` less the overlap, but for the end.

        Raises:
            ValueError: at once, for tokens of another checkpoint, ids or lengths outside the model's sets, no clips, a
                number of frames that does not fit the number of clips, an unknown blend, or a tokenizer without its
                decoder.
        """
        self.check_tokens(tokens)
        return self._decode(tokens, self.streaming_decode(blend))

    def reconstruct(
        self,
        source: Video,
        lengths: Given = None,
        fps: float | None = None,
        stride: int = 1,
        max_clips: int | None = None,
        progress: bool = False,
        *,
        quality: float | None = None,
        budget: int | None = None,
        budget_per_clip: int | None = None,
        overlap: int = 0,
        blend: str = "fade",
        refinement_steps: int = 0,
    ) -> Iterator[ReconstructedClip]:
        """The clips of a video, each beside the frames of its tokens. Arguments and errors as `encode`."""
        choose = self._chosen(lengths, quality, budget, budget_per_clip)
        sampling = self._sampling(fps, stride, max_clips, overlap)
        self.model.check_refinement(refinement_steps)
        return self._reconstruct(source, choose, sampling, progress, self.streaming_decode(blend), refinement_steps)

    def check_tokens(self, tokens: VideoTokens) -> None:
        """Raises the errors of `decode` without decoding anything."""
        self.model.check_decoder()
        self.model.check_tokens(tokens)
        if len(tokens) == 0:
            raise ValueError("these tokens hold no clip; encode a video with at least one frame.")
        size, count = self.model.config.num_frames, tokens.num_frames
        step = size - check_overlap(tokens.overlap, size)
        most = size + step * (len(tokens) - 1)
        least = most - step + 1 if len(tokens) > 1 else 1
        if count is not None and not (isinstance(count, int) and least <= count <= most):
            raise ValueError(
                f"these tokens claim {count!r} frames, but {len(tokens)} clips hold {least} to {most}; the tokens are "
                "damaged, encode the video again."
            )
        fps = tokens.fps
        if fps is not None and not (isinstance(fps, int | float) and 0 < fps < math.inf):
            raise ValueError(f"these tokens claim {fps!r} fps, which is no rate; the tokens are damaged.")

    def _clips(self, source: Video, sampling: _Sampling) -> Iterator[VideoClip]:
        feed = ClipFeed(self.processor, self.model.config.num_frames, sampling.overlap)
        with _opened(source, sampling) as (video, sampling):
            fps, stride = sampling.fps, sampling.stride
            if isinstance(video, PreparedVideo):
                if stride != 1 or fps not in (None, video.fps):
                    rate = "without a rate" if video.fps is None else f"at {video.fps:g} fps"
                    raise ValueError(f"the clips are prepared {rate}; give fps and stride to prepare.")
                if sampling.overlap:
                    raise ValueError("the clips are prepared without overlap; give the video itself.")
                yield from video.clips[: sampling.max_clips]
                return
            yield from itertools.islice(feed.read(video, fps, stride), sampling.max_clips)

    def _decode(self, tokens: VideoTokens, stream: DecodeStream) -> Iterator[np.ndarray]:
        step = self.model.config.num_frames - tokens.overlap
        with stream:
            for part in self._by_batch(tokens):
                frames = stream.push(part)
                for first in range(0, len(frames), step):
                    yield frames[first : first + step]
            rest = stream.finish()
            if len(rest):
                yield rest

    def _by_batch(self, tokens: VideoTokens) -> Iterator[VideoTokens]:
        """So many clips as are decoded together, each time with their true number of frames."""
        size = self.model.config.num_frames
        step, start, first = size - tokens.overlap, 0, 0
        for lengths in tokens.lengths.split(self.batch_clips):  # not tokens.clip(i), whose cost grows with i
            end, true = start + int(lengths.sum()), None
            if tokens.num_frames is not None:
                true = min(size + step * (len(lengths) - 1), tokens.num_frames - first * step)
            yield replace(tokens, ids=tokens.ids[start:end], lengths=lengths, num_frames=true)
            start, first = end, first + len(lengths)

    def _chosen(self, lengths: Given, quality: float | None, budget: int | None, budget_per_clip: int | None) -> Choice:
        """The rule that chooses lengths: an allocation, bound, or the caller's own function."""
        given = {"lengths": lengths, "quality": quality, "budget": budget, "budget_per_clip": budget_per_clip}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} contradict each other; give only one.")
        if callable(lengths) and not isinstance(lengths, Allocation):
            return lengths
        allocation = lengths if isinstance(lengths, Allocation) else Allocation(**given)
        return allocation.bind(self.model, self.router)

    @contextmanager
    def _looked(
        self, source: Video, choose: Choice, sampling: _Sampling, progress: bool
    ) -> Iterator[tuple[Choice, float | None, Batches]]:
        """The rule that chooses lengths, the rate, and all clips. A budget for the whole video, which is read once for
        it, becomes rows for so many clips."""
        with _opened(source, sampling) as (video, sampling):
            if _looks_twice(choose):
                choose.check_clips(self.count_clips(video, **vars(sampling)))  # before the work
                with closing(self._batches(video, "look", sampling, progress)) as batches:
                    rows = choose.split(torch.cat([choose.look(pixels, self._exact) for _, pixels in batches]))
                waiting = iter(rows.split(1))
                # In a file that is still being written, the second pass may find a clip more.
                choose, sampling = lambda clip: next(waiting), replace(sampling, max_clips=len(rows))
            with closing(self._batches(video, "clips", sampling, progress)) as batches:
                yield choose, self.output_fps(video, sampling.fps, sampling.stride), batches

    @contextmanager
    def _encoded(
        self, source: Video, choose: Choice, sampling: _Sampling, progress: bool, refinement_steps: int
    ) -> Iterator[tuple[EncodeStream, Iterator[tuple[list[VideoClip], list[VideoTokens]]]]]:
        """A stream, and clips of the video with their tokens, batch by batch, read as they are asked for."""
        options = {"refinement_steps": refinement_steps, "exact": self._exact}
        with (
            self._looked(source, choose, sampling, progress) as (choose, rate, batches),
            EncodeStream(self.model, self.processor, choose, sampling.overlap, fps=rate, **options) as stream,
        ):
            yield stream, ((clips, stream.encode(clips, pixels)) for clips, pixels in batches)

    def _batches(self, video: VideoReader, what: str, sampling: _Sampling, progress: bool) -> Batches:
        """The clips of a video, so many at once as are encoded together, and all of these on the model's device."""
        size, device = self.batch_clips, self.model.device

        def read() -> Batches:
            clips = self.clips(video, **vars(sampling))
            while batch := list(itertools.islice(clips, size)):
                pixels = batch[0].pixel_values_videos
                if size > 1:
                    pixels = torch.cat([clip.pixel_values_videos for clip in batch])
                yield batch, to_device(pixels, device)
                del batch, pixels

        total = self.count_clips(video, **vars(sampling)) if progress else None
        bar = tqdm(desc=what, total=total, unit="clip", leave=False, disable=None if progress else True)
        with bar, closing(read() if size == 1 else ahead(read())) as batches:
            for batch, pixels in batches:
                yield batch, pixels
                bar.update(len(batch))

    def _route(self, source, choose, sampling, progress) -> Iterator[RoutedClip]:
        with self._looked(source, choose, sampling, progress) as (choose, rate, batches):
            for clips, pixels in batches:
                rows = choose_lengths(choose, clips, pixels, self.model, self._exact)
                for clip, row in zip(clips, rows.tolist(), strict=True):
                    original = self._frames(clip.pixel_values_videos, clip.num_frames)
                    frames = clip.start, clip.start + clip.num_frames
                    times = [None if rate is None else frame / rate for frame in frames]
                    yield RoutedClip(original, row, clip.index, *times)

    def _reconstruct(
        self, source, choose, sampling, progress, decoded, refinement_steps
    ) -> Iterator[ReconstructedClip]:
        step = self.model.config.num_frames - sampling.overlap
        waiting: deque[tuple[np.ndarray, VideoTokens, VideoClip]] = deque()
        frames = None  # (n, H, W, 3), decoded, of the first of them on

        def settled(held: int) -> Iterator[ReconstructedClip]:
            """The clips that wait, but for so many; only the last of the video has the frames that it shares."""
            nonlocal frames
            while len(waiting) > held:
                original, tokens, clip = waiting.popleft()
                count = step if waiting else len(original)
                original, shown, frames = original[:count], frames[:count], frames[count:]
                quality = frame_psnr(original, shown)
                yield ReconstructedClip(original, shown, tokens, quality, clip.index, clip.start)

        with self._encoded(source, choose, sampling, progress, refinement_steps) as (stream, batches), decoded:
            for clips, parts in batches:
                new = decoded.push(stream.join(parts))
                frames = new if frames is None else np.concatenate([frames, new])
                for clip, tokens in zip(clips, parts, strict=True):
                    waiting.append((self._frames(clip.pixel_values_videos, clip.num_frames), tokens, clip))
                yield from settled(held=1 if sampling.overlap else 0)
            if waiting:
                frames = np.concatenate([frames, decoded.finish()])
                yield from settled(held=0)

    def _sampling(
        self, fps: float | None = None, stride: int = 1, max_clips: int | None = None, overlap: int = 0
    ) -> _Sampling:
        if fps is not None and not 0 < fps < math.inf:
            raise ValueError(f"fps is {fps}; give a positive number of frames a second, or None for the video's own.")
        for name, value in (("stride", stride), ("max_clips", max_clips)):
            if value is not None and (int(value) != value or value < 1):
                raise ValueError(f"{name} is {value}; give a whole number of 1 or more.")
        return _Sampling(fps, stride, max_clips, check_overlap(overlap, self.model.config.num_frames))

    def _frames(self, video: torch.Tensor, count: int) -> np.ndarray:
        """(1, F, 3, H, W) -> uint8 (count, H, W, 3)."""
        return self.processor.postprocess(video[:, :count])[0].cpu().numpy()


@dataclass
class _Sampling:
    """The clips of a video that are asked for."""

    fps: float | None
    stride: int
    max_clips: int | None
    overlap: int


def _looks_twice(choose: Choice) -> bool:
    """Tells whether it splits a budget over the whole video, so that it sees all clips before the first is encoded."""
    return isinstance(choose, Allocation) and choose.budget is not None


@contextmanager
def _opened(source: Video, sampling: _Sampling) -> Iterator[tuple[VideoReader, _Sampling]]:
    """The video, and the clips of it; where `fps` says the rate of frames in memory, it asks for no other."""
    if isinstance(source, VideoReader):
        yield source, sampling
        return
    with open_any(source, sampling.fps) as video:
        yield video, replace(sampling, fps=None) if type(video) is MemoryVideo else sampling
