"""Whole videos of any length to tokens and back, clip by clip in constant memory.

How many tokens each block gets is an allocation (`allocation.py`); a budget over a whole video takes two passes, of
which the first keeps a few numbers of each clip.

A video is cut into clips of `config.num_frames` frames. The last one is filled up by repeating its last frame; the true
number of frames travels in `VideoTokens.num_frames` and is restored on decoding. Clips are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .allocation import Allocation, VideoBudget, allocate, check_same_space
from .assignment import LengthsLike
from .bundled import default_checkpoint
from .loading import find_dtype, load_checkpoint, resolve_device, save_checkpoint
from .memory_video import PreparedVideo
from .metrics import psnr
from .modeling_evatok import EvatokModel
from .modeling_evatok_router import EvatokRouter
from .tokens_evatok import VideoTokens
from .video_io import VideoReader, open_video
from .video_processing_evatok import EvatokVideoProcessor
from .video_source import Source

# Pixels read and preprocessed at once; the preprocessing is in float32, so this is about 100 MB for any size of video.
_PIXELS_AT_ONCE = 2**23

# One assignment for all clips, or a rule that sees the clip (1, F, 3, H, W).
Lengths = LengthsLike | Callable[[torch.Tensor], LengthsLike] | None


@dataclass
class VideoClip:
    """A preprocessed clip.

    Attributes:
        pixel_values_videos: (1, F, 3, H, W) in [-1, 1], on the CPU.
        index: number of the clip in its video.
        num_frames: true frames, from 1 to F; the rest repeat the last one.
    """

    pixel_values_videos: torch.Tensor
    index: int
    num_frames: int


@dataclass
class RoutedClip:
    """What a clip gets, f true frames.

    Attributes:
        original: uint8 (f, H, W, 3), after resizing and cropping.
        lengths: tokens of each block, T numbers.
        index: number of the clip in its video.
        start, end: seconds from the first frame of the video.
    """

    original: np.ndarray
    lengths: list[int]
    index: int
    start: float
    end: float

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass
class ReconstructedClip:
    """A clip before and after its tokens, f true frames.

    Attributes:
        original: uint8 (f, H, W, 3), after resizing and cropping.
        reconstruction: uint8 (f, H, W, 3), decoded from `tokens` alone.
        tokens: tokens of this clip, with `fps` and `num_frames` (f).
        psnr: dB between the two, over these frames; infinite if they are equal.
        index: number of the clip in its video.
    """

    original: np.ndarray
    reconstruction: np.ndarray
    tokens: VideoTokens
    psnr: float
    index: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each block, T numbers."""
        return self.tokens.lengths[0].tolist()


class VideoTokenizer:
    """A model, its video processor, perhaps a router, and the way of a video file through them.

    A video may be a path, bytes, a binary file object, or an open `VideoReader` (which stays open). Wherever `fps` is
    asked for, None takes the processor's rate, or the video's own where the processor has none; then every `stride`-th
    frame is kept. A video is never held as a whole.

    `encode`, `reconstruct` and `route` take at most one of these; without any, the router chooses at its own quality or
    1.2, or every block gets the middle candidate where there is no router:

    - `lengths`: tokens of each block, T numbers for every clip or one for all blocks; or an allocation, a function from
      the clip (1, F, 3, H, W) to them, such as `allocation` makes of any strategy.
    - `quality`: w_q in 0..2, what the router weighs quality with, against 2 - w_q for tokens.
    - `budget`: tokens for the whole video, of which the router makes the best. The video is read twice.
    - `budget_per_clip`: tokens for each clip at most.

    Args:
        model: the tokenizer, on its device.
        processor: brings frames to the model's size.
        router: of the same clips and assignments, or None.

    Raises:
        ValueError: a router of other clips or assignments.
    """

    def __init__(self, model: EvatokModel, processor: EvatokVideoProcessor, router: EvatokRouter | None = None) -> None:
        if router is not None:
            check_same_space(model, router)
            router.eval()
        self.model = model.eval()
        self.processor = processor
        self.router = router

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> VideoTokenizer:
        """Loads model, processor, and the router where there is one.

        Args:
            path_or_hub_id: a folder or a Hub id that holds the tokenizer itself or in `tokenizer/`, and may hold a
                router in `router/`; None takes the bundled checkpoint.
            device: "cpu", "cuda", "cuda:1", "mps", or "auto" (a GPU with CUDA if there is one, else the CPU).
            dtype: "float32" or "bfloat16", or the torch dtype. Ids may differ between dtypes.
            revision: branch, tag or commit on the Hub.
            token: for private repositories; by default the one of `hf auth login`.

        Raises:
            ValueError: an unknown or unavailable device, an unknown dtype, a folder or repository that is missing, not
                reachable, or holds no complete tokenizer; a router that is incomplete or of another tokenizer.
        """
        where, kind = resolve_device(device), find_dtype(dtype)
        name = default_checkpoint() if path_or_hub_id is None else str(path_or_hub_id)
        return cls(*load_checkpoint(name, where, kind, revision, token))

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
        self, source: Source | VideoReader, fps: float | None = None, stride: int = 1, max_clips: int | None = None
    ) -> Iterator[VideoClip]:
        """Preprocessed clips of a video in order, read as they are asked for; at most `max_clips`.

        Every frame is preprocessed on its own, so that a clip does not depend on how the file is read.

        Raises:
            ValueError: at once, for a rate, stride or number of clips that is not positive.
            VideoReadError: on the way, where the video cannot be opened or read on.
        """
        _check_sampling(fps, stride, max_clips)
        return self._clips(source, fps, stride, max_clips)

    def prepare(
        self, source: Source | VideoReader, fps: float | None = None, stride: int = 1, max_clips: int | None = None
    ) -> PreparedVideo:
        """Reads and preprocesses a short video whole; `encode`, `route` and `reconstruct` take the result as a video.

        For passing over a video several times, or where it must not be read. Memory: 12 bytes a pixel of the model's
        size and frame. Arguments and errors as `clips`.
        """
        _check_sampling(fps, stride, max_clips)
        with _opened(source) as video:
            clips = list(self._clips(video, fps, stride, max_clips))
            return PreparedVideo(clips, self.output_fps(video, fps, stride), video.height, video.width)

    def output_fps(self, video: VideoReader, fps: float | None = None, stride: int = 1) -> float:
        """Frames a second of the clips that `clips` makes of this video."""
        own = None if isinstance(video, PreparedVideo) else self.processor.fps
        return (fps or own or video.fps) / stride

    def count_clips(
        self, video: VideoReader, fps: float | None = None, stride: int = 1, max_clips: int | None = None
    ) -> int:
        """How many clips `clips` will make, from the frames that the file announces."""
        ratio = video.fps / self.output_fps(video, fps)
        frames = math.ceil((video.num_frames - 0.5) / ratio)  # see `nearest_frame_indices`
        clips = max(1, math.ceil(math.ceil(frames / stride) / self.model.config.num_frames))
        return clips if max_clips is None else min(clips, max_clips)

    def allocation(self, strategy: str | None = None, **options) -> Allocation:
        """A strategy by name with its options, ready for `lengths`; see `allocation.allocate` for both and for errors.

        With a metric it can search, too: `encode(video, tokenizer.allocation("max-proxy-reward", quality=1.4))`.
        """
        return allocate(strategy, self.model, self.router, **options)

    def encode(
        self,
        source: Source | VideoReader,
        lengths: Lengths = None,
        fps: float | None = None,
        stride: int = 1,
        max_clips: int | None = None,
        progress: bool = False,
        *,
        quality: float | None = None,
        budget: int | None = None,
        budget_per_clip: int | None = None,
    ) -> VideoTokens:
        """A video to tokens. The decoder does not run.

        Args:
            source: the video.
            lengths, quality, budget, budget_per_clip: see the class; at most one.
            fps, stride, max_clips: see `clips`.
            progress: show a progress bar on stderr, if that is a terminal.

        Returns:
            `VideoTokens` on the CPU with `fps` of the encoded frames and their true number `num_frames`.

        Raises:
            ValueError: lengths outside the assignment space, a quality outside 0..2, a budget that is too small, more
                than one of them, or one that needs a router where there is none; and as `clips`.
        """
        rule = self._rule(lengths, quality, budget, budget_per_clip)
        _check_sampling(fps, stride, max_clips)
        parts, frames = [], 0
        with _opened(source) as video:
            for clip, row in self._allocated(video, rule, fps, stride, max_clips, progress):
                parts.append(self._encode(clip, row))
                frames += clip.num_frames
            rate = self.output_fps(video, fps, stride)
        return replace(VideoTokens.concatenate(parts, num_frames=frames), fps=rate)

    def route(
        self,
        source: Source | VideoReader,
        lengths: Lengths = None,
        fps: float | None = None,
        stride: int = 1,
        max_clips: int | None = None,
        progress: bool = False,
        *,
        quality: float | None = None,
        budget: int | None = None,
        budget_per_clip: int | None = None,
    ) -> Iterator[RoutedClip]:
        """What each clip of a video gets, without making tokens. Arguments and errors as `encode`."""
        rule = self._rule(lengths, quality, budget, budget_per_clip)
        _check_sampling(fps, stride, max_clips)
        return self._route(source, rule, fps, stride, max_clips, progress)

    def decode(self, tokens: VideoTokens) -> Iterator[np.ndarray]:
        """Tokens to frames, clip by clip, exactly as many as were encoded.

        Returns:
            Iterator of uint8 (f, H, W, 3); f is the model's `num_frames` but for the last clip.

        Raises:
            ValueError: at once, for tokens of another checkpoint, ids or lengths outside the model's sets, no clips, or
                a number of frames that does not fit the number of clips.
        """
        self.check_tokens(tokens)
        return self._decode(tokens)

    def reconstruct(
        self,
        source: Source | VideoReader,
        lengths: Lengths = None,
        fps: float | None = None,
        stride: int = 1,
        max_clips: int | None = None,
        progress: bool = False,
        *,
        quality: float | None = None,
        budget: int | None = None,
        budget_per_clip: int | None = None,
    ) -> Iterator[ReconstructedClip]:
        """Every clip of a video beside what its tokens decode to. Arguments and errors as `encode`."""
        rule = self._rule(lengths, quality, budget, budget_per_clip)
        _check_sampling(fps, stride, max_clips)
        return self._reconstruct(source, rule, fps, stride, max_clips, progress)

    def check_tokens(self, tokens: VideoTokens) -> None:
        """Raises the errors of `decode` without decoding anything."""
        self.model.check_tokens(tokens)
        if len(tokens) == 0:
            raise ValueError("these tokens hold no clip; encode a video with at least one frame.")
        config = self.model.config
        most = len(tokens) * config.num_frames
        count = tokens.num_frames
        if count is not None and not (isinstance(count, int) and most - config.num_frames < count <= most):
            raise ValueError(
                f"these tokens claim {count!r} frames, but {len(tokens)} clips hold {most - config.num_frames + 1} to "
                f"{most}; the tokens are damaged, encode the video again."
            )
        fps = tokens.fps
        if fps is not None and not (isinstance(fps, int | float) and 0 < fps < math.inf):
            raise ValueError(f"these tokens claim {fps!r} fps, which is no rate; the tokens are damaged.")

    def _clips(
        self, source: Source | VideoReader, fps: float | None, stride: int, max_clips: int | None
    ) -> Iterator[VideoClip]:
        with _opened(source) as video:
            if isinstance(video, PreparedVideo):
                if stride != 1 or fps not in (None, video.fps):
                    raise ValueError(f"the clips are prepared at {video.fps:g} fps; give fps and stride to prepare.")
                yield from video.clips[:max_clips]
                return
            size = self.model.config.num_frames
            step = _frames_at_once(size, video.height * video.width)
            parts: list[torch.Tensor] = []
            index = frames = 0
            for chunk in video.iter_chunks(step, self.processor.fps if fps is None else fps, stride):
                batch = self.processor(chunk, input_data_format="channels_last", do_sample_frames=False)
                parts.append(batch["pixel_values_videos"][0])  # (n, 3, H, W)
                frames += len(chunk)
                if frames == size:
                    yield VideoClip(torch.cat(parts)[None], index, size)
                    parts, index, frames = [], index + 1, 0
                    if index == max_clips:
                        return
            if frames:
                fill = parts[-1][-1:].expand(size - frames, -1, -1, -1)
                yield VideoClip(torch.cat([*parts, fill])[None], index, frames)

    def _decode(self, tokens: VideoTokens) -> Iterator[np.ndarray]:
        size = self.model.config.num_frames
        left = len(tokens) * size if tokens.num_frames is None else tokens.num_frames
        start = 0
        for lengths in tokens.lengths.split(1):  # not tokens.clip(i), whose cost grows with i
            count = int(lengths.sum())
            clip = replace(tokens, ids=tokens.ids[start : start + count], lengths=lengths, num_frames=None)
            yield self._frames(self.model.decode(clip), min(size, left))
            start, left = start + count, left - size

    def _rule(
        self, lengths: Lengths, quality: float | None, budget: int | None, budget_per_clip: int | None
    ) -> Callable[[torch.Tensor], LengthsLike]:
        given = {"lengths": lengths, "quality": quality, "budget": budget, "budget_per_clip": budget_per_clip}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} contradict each other; give only one.")
        return lengths if callable(lengths) else self.allocation(**given)

    def _allocated(
        self,
        video: VideoReader,
        rule: Callable[[torch.Tensor], LengthsLike],
        fps: float | None,
        stride: int,
        max_clips: int | None,
        progress: bool,
    ) -> Iterator[tuple[VideoClip, torch.Tensor]]:
        """Clips and their lengths (1, T). A budget over the whole video reads it once more before the first clip."""

        def clips(what: str) -> Iterator[VideoClip]:
            total = self.count_clips(video, fps, stride, max_clips) if progress else None
            found = self.clips(video, fps, stride, max_clips)
            yield from tqdm(found, what, total, unit="clip", leave=False, disable=None if progress else True)

        space = self.model.assignment_space
        if isinstance(rule, VideoBudget):
            rule.check(self.count_clips(video, fps, stride, max_clips))  # before the work
            rows = rule.split(torch.cat([rule.look(clip.pixel_values_videos) for clip in clips("look")]))
            # Not strict: in a file that is still being written, the second pass may find a clip more.
            yield from ((clip, row) for row, clip in zip(rows.split(1), clips("clips"), strict=False))
        else:
            for clip in clips("clips"):
                yield clip, space.validate(rule(clip.pixel_values_videos), batch_size=1)

    def _route(self, source, rule, fps, stride, max_clips, progress) -> Iterator[RoutedClip]:
        with _opened(source) as video:
            rate = self.output_fps(video, fps, stride)
            for clip, row in self._allocated(video, rule, fps, stride, max_clips, progress):
                first = clip.index * self.model.config.num_frames
                original = self._frames(clip.pixel_values_videos, clip.num_frames)
                times = first / rate, (first + clip.num_frames) / rate
                yield RoutedClip(original, row[0].tolist(), clip.index, *times)

    def _reconstruct(self, source, rule, fps, stride, max_clips, progress) -> Iterator[ReconstructedClip]:
        with _opened(source) as video:
            rate = self.output_fps(video, fps, stride)
            for clip, row in self._allocated(video, rule, fps, stride, max_clips, progress):
                tokens = replace(self._encode(clip, row), fps=rate, num_frames=clip.num_frames)
                original = self._frames(clip.pixel_values_videos, clip.num_frames)
                reconstruction = next(self._decode(tokens))
                pair = torch.from_numpy(original)[None], torch.from_numpy(reconstruction)[None]
                yield ReconstructedClip(original, reconstruction, tokens, float(psnr(*pair)), clip.index)

    def _encode(self, clip: VideoClip, lengths: torch.Tensor) -> VideoTokens:
        tokens = self.model.encode(clip.pixel_values_videos, lengths)
        return replace(tokens, ids=tokens.ids.cpu(), lengths=tokens.lengths.cpu())

    def _frames(self, video: torch.Tensor, count: int) -> np.ndarray:
        """(1, F, 3, H, W) -> uint8 (count, H, W, 3)."""
        return self.processor.postprocess(video[:, :count])[0].cpu().numpy()


def _check_sampling(fps: float | None, stride: int, max_clips: int | None) -> None:
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}; give a positive number of frames a second, or None for the video's own.")
    for name, value in (("stride", stride), ("max_clips", max_clips)):
        if value is not None and (int(value) != value or value < 1):
            raise ValueError(f"{name} is {value}; give a whole number of 1 or more.")


@contextmanager
def _opened(source: Source | VideoReader) -> Iterator[VideoReader]:
    if isinstance(source, VideoReader):
        yield source
    else:
        with open_video(source) as video:
            yield video


def _frames_at_once(size: int, pixels: int) -> int:
    """The largest part of a clip, in frames, that stays within `_PIXELS_AT_ONCE`; it divides the clip."""
    return max(n for n in range(1, size + 1) if size % n == 0 and (n == 1 or n * pixels <= _PIXELS_AT_ONCE))
