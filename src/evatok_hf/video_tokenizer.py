"""Whole videos of any length to tokens and back, clip by clip in constant memory.

A video is cut into clips of `config.num_frames` frames. The last one is filled up by repeating its last frame; the true
number of frames travels in `VideoTokens.num_frames` and is restored on decoding. Clips are independent of each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from tqdm import tqdm

from . import default_checkpoint
from .assignment import LengthsLike
from .configuration_evatok import EvatokConfig
from .metrics import psnr
from .modeling_evatok import EvatokModel
from .tokens_evatok import VideoTokens
from .video_io import VideoReader, open_video
from .video_processing_evatok import EvatokVideoProcessor
from .video_source import Source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Pixels read and preprocessed at once; the preprocessing is in float32, so this is about 100 MB for any size of video.
_PIXELS_AT_ONCE = 2**23

# How the lengths of a clip are chosen: one assignment for all clips, or a rule that sees the clip (1, F, 3, H, W).
Allocation = LengthsLike | Callable[[torch.Tensor], LengthsLike] | None


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
    """A model, its video processor, and the way of a video file through both.

    A video may be a path, bytes, a binary file object, or an open `VideoReader` (which stays open). Wherever `fps` is
    asked for, None takes the processor's rate, or the video's own where the processor has none; then every `stride`-th
    frame is kept. A video is never held as a whole.

    Args:
        model: the tokenizer, on its device.
        processor: brings frames to the model's size.
    """

    def __init__(self, model: EvatokModel, processor: EvatokVideoProcessor) -> None:
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> VideoTokenizer:
        """Loads model and processor.

        Args:
            path_or_hub_id: a folder or a Hub id that holds the tokenizer itself or in `tokenizer/`; None takes the
                bundled checkpoint.
            device: "cpu", "cuda", "cuda:1", "mps", or "auto" (a GPU with CUDA if there is one, else the CPU).
            dtype: "float32" or "bfloat16", or the torch dtype. Ids may differ between dtypes.
            revision: branch, tag or commit on the Hub.
            token: for private repositories; by default the one of `hf auth login`.

        Raises:
            ValueError: an unknown or unavailable device, an unknown dtype, a folder or repository that is missing, not
                reachable, or holds no complete tokenizer.
        """
        where = resolve_device(device)
        kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if kind not in DTYPES.values():
            raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
        name = default_checkpoint() if path_or_hub_id is None else str(path_or_hub_id)
        folder = Path(name).expanduser().absolute()
        if folder.is_dir():
            name = str(folder)
        hub = {"revision": revision, "token": token}
        subfolder = _find_tokenizer(name, **hub)
        try:
            model = EvatokModel.from_pretrained(name, subfolder=subfolder, dtype=kind, **hub)
            processor = EvatokVideoProcessor.from_pretrained(name, subfolder=subfolder, **hub)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the tokenizer in {name} does not load ({_one_line(error)}); get a complete copy."
            ) from error
        # what messages and token files call it: the checkpoint, not the folder "tokenizer" in it
        model.config._name_or_path = str(folder.parent) if folder.is_dir() and folder.name == "tokenizer" else name
        return cls(model.to(where), processor)

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

    def output_fps(self, video: VideoReader, fps: float | None = None, stride: int = 1) -> float:
        """Frames a second of the clips that `clips` makes of this video."""
        return (fps or self.processor.fps or video.fps) / stride

    def count_clips(
        self, video: VideoReader, fps: float | None = None, stride: int = 1, max_clips: int | None = None
    ) -> int:
        """How many clips `clips` will make, from the frames that the file announces."""
        ratio = video.fps / (fps or self.processor.fps or video.fps)
        frames = math.ceil((video.num_frames - 0.5) / ratio)  # see `nearest_frame_indices`
        clips = max(1, math.ceil(math.ceil(frames / stride) / self.model.config.num_frames))
        return clips if max_clips is None else min(clips, max_clips)

    def encode(
        self,
        source: Source | VideoReader,
        lengths: Allocation = None,
        fps: float | None = None,
        stride: int = 1,
        max_clips: int | None = None,
        progress: bool = False,
    ) -> VideoTokens:
        """A video to tokens. The decoder does not run.

        Args:
            source: the video.
            lengths: tokens of each block, T numbers for every clip or one for all blocks; or a function that gets the
                clip (1, F, 3, H, W) and returns them; the middle candidate by default.
            fps, stride, max_clips: see `clips`.
            progress: show a progress bar on stderr, if that is a terminal.

        Returns:
            `VideoTokens` on the CPU with `fps` of the encoded frames and their true number `num_frames`.

        Raises:
            ValueError: lengths outside the assignment space, and as `clips`.
        """
        lengths = self.check_allocation(lengths)
        _check_sampling(fps, stride, max_clips)
        parts, frames = [], 0
        with _opened(source) as video:
            total = self.count_clips(video, fps, stride, max_clips) if progress else None
            clips = self.clips(video, fps, stride, max_clips)
            for clip in tqdm(clips, total=total, unit="clip", leave=False, disable=None if progress else True):
                parts.append(self._encode(clip, lengths))
                frames += clip.num_frames
            rate = self.output_fps(video, fps, stride)
        return replace(VideoTokens.concatenate(parts, num_frames=frames), fps=rate)

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
        lengths: Allocation = None,
        fps: float | None = None,
        stride: int = 1,
        max_clips: int | None = None,
    ) -> Iterator[ReconstructedClip]:
        """Every clip of a video beside what its tokens decode to. Arguments and errors as `encode`."""
        lengths = self.check_allocation(lengths)
        _check_sampling(fps, stride, max_clips)
        return self._reconstruct(source, lengths, fps, stride, max_clips)

    def check_allocation(self, lengths: Allocation) -> Allocation:
        """Lengths as T numbers, the middle candidate for None; a function is returned as it is.

        Raises:
            ValueError: lengths outside the assignment space.
        """
        if callable(lengths):
            return lengths
        if lengths is None:
            candidates = self.model.config.block_lengths
            lengths = candidates[len(candidates) // 2]
        return self.model.assignment_space.validate(lengths, batch_size=1)[0]

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

    def _reconstruct(
        self, source: Source | VideoReader, lengths: Allocation, fps: float | None, stride: int, max_clips: int | None
    ) -> Iterator[ReconstructedClip]:
        with _opened(source) as video:
            rate = self.output_fps(video, fps, stride)
            for clip in self.clips(video, fps, stride, max_clips):
                tokens = replace(self._encode(clip, lengths), fps=rate, num_frames=clip.num_frames)
                original = self._frames(clip.pixel_values_videos, clip.num_frames)
                reconstruction = next(self._decode(tokens))
                pair = torch.from_numpy(original)[None], torch.from_numpy(reconstruction)[None]
                yield ReconstructedClip(original, reconstruction, tokens, float(psnr(*pair)), clip.index)

    def _encode(self, clip: VideoClip, lengths: Allocation) -> VideoTokens:
        chosen = lengths(clip.pixel_values_videos) if callable(lengths) else lengths
        tokens = self.model.encode(clip.pixel_values_videos, chosen)
        return replace(tokens, ids=tokens.ids.cpu(), lengths=tokens.lengths.cpu())

    def _frames(self, video: torch.Tensor, count: int) -> np.ndarray:
        """(1, F, 3, H, W) -> uint8 (count, H, W, 3)."""
        return self.processor.postprocess(video[:, :count])[0].cpu().numpy()


def resolve_device(name: str) -> torch.device:
    """The device of that name, "auto" being a GPU with CUDA if there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:0 .., or mps.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device {name} is not available, PyTorch finds {count} CUDA GPUs; choose cpu or auto.")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device mps is not available on this machine; choose cpu or auto.")
    elif device.type != "cpu":
        raise ValueError(f"device {name!r} is not supported; choose auto, cpu, cuda, cuda:0 .., or mps.")
    return device


def _find_tokenizer(name: str, revision: str | None, token: str | bool | None) -> str:
    """The subfolder, "" or "tokenizer", of a folder or Hub repository in which the tokenizer is."""
    folder = Path(name).expanduser()
    local = folder.exists()
    if not local and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise ValueError(f"there is no folder {name}; give a folder, or a Hub id owner/name.")
    found = None
    for subfolder in ("", "tokenizer"):
        if local:
            path = folder / subfolder / "config.json"
        else:
            path = _from_hub(name, subfolder, revision, token)
        if path is None or not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is no readable configuration ({_one_line(error)}); get a complete copy."
            ) from error
        if found == EvatokConfig.model_type:
            return subfolder
    what = "no config.json" if found is None else f"a model of type {found!r}"
    raise ValueError(f"{name} holds {what}, not an EVATok tokenizer; name a checkpoint or its tokenizer/ folder.")


def _from_hub(name: str, subfolder: str, revision: str | None, token: str | bool | None) -> Path | None:
    """The configuration in that subfolder of a repository, None if it has none."""
    try:
        return Path(hf_hub_download(name, "config.json", subfolder=subfolder or None, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name}, and the Hub is not reachable to look for it there; check the name and the "
            "network."
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"there is no folder {name}, and no such repository could be read from the Hub ({_one_line(error)}); check "
            "the name, the revision and, for a private one, the token."
        ) from error


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


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
