"""A video through the tokenizer as it comes: frames in and tokens out, tokens in and frames out, in constant memory.

What is kept between two calls is one object with an end: an `EncodeStream` holds at most the frames of a clip and a
chunk, a `DecodeStream` the frames around a seam, both the keys and values of one clip. `VideoTokenizer.encode`,
`reconstruct` and `decode` cut clips by the same `ClipFeed` and run these streams over a whole video, so that any way to
cut a video into chunks gives the same ids and frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..allocation.strategies import Allocation
from ..models.configuration_evatok import LengthsLike
from ..models.tokens_evatok import VideoTokens
from .seams import Seam, check_blend, check_overlap

if TYPE_CHECKING:
    from ..models.modeling_evatok import ClipState, EvatokModel
    from ..models.video_processing_evatok import EvatokVideoProcessor
    from ..video.read import VideoReader

# Pixels preprocessed at once; the preprocessing is in float32, so this is about 100 MB for any size of video.
PIXELS_AT_ONCE = 2**23
PARTS = ("clip", "block")
# The lengths of a clip (1, F, 3, H, W); a bound `Allocation` takes several clips together.
Choice = Callable[[torch.Tensor], LengthsLike]


@dataclass
class VideoClip:
    """A preprocessed clip, or one of its blocks.

    Attributes:
        pixel_values_videos: (1, F, 3, H, W) in [-1, 1], on the CPU; F is the frames of the clip or of the block.
        index: number of the clip in its video.
        num_frames: true frames, up to F; the rest repeat the last one.
        start: number of its first frame in the video.
    """

    pixel_values_videos: torch.Tensor
    index: int
    num_frames: int
    start: int


class ClipFeed:
    """Frames in, preprocessed clips out, or their blocks.

    Every frame is preprocessed on its own, so that a clip does not depend on how its frames come.

    Args:
        processor: brings frames to the model's size.
        num_frames: frames F of a clip.
        overlap: frames that a clip has in common with the one before, from 0 to F / 2.
        unit: frames that are given out at once; F, or those of a block.
    """

    def __init__(self, processor: EvatokVideoProcessor, num_frames: int, overlap: int = 0, unit: int | None = None):
        self._processor = processor
        self._size, self._overlap, self._unit = num_frames, check_overlap(overlap, num_frames), unit or num_frames
        self._frames: torch.Tensor | None = None  # (n, 3, H, W), of the clip from its first frame on
        self._index = self._given = 0  # the clip, and how many of its frames are given out

    def read(self, video: VideoReader, fps: float | None = None, stride: int = 1) -> Iterator[VideoClip]:
        """All clips of a video, by default at the processor's rate. Raises as `VideoReader.iter_chunks`."""
        step = frames_at_once(self._size, video.height * video.width)
        for chunk in video.iter_chunks(step, self._processor.fps if fps is None else fps, stride):
            yield from self.push(chunk)
        yield from self.finish()

    def push(self, frames: np.ndarray | torch.Tensor) -> Iterator[VideoClip]:
        """uint8 (n, H, W, 3) or floats in [0, 1], any n -> what is complete with them. Raises as the processor."""
        if len(frames) == 0:
            return
        pixels = int(np.prod(frames.shape[1:3])) if frames.ndim == 4 else 1
        step = frames_at_once(self._size, pixels)
        for start in range(0, len(frames), step):
            batch = self._processor(
                frames[start : start + step], input_data_format="channels_last", do_sample_frames=False
            )
            pixel_values = batch["pixel_values_videos"][0]  # (n, 3, H, W)
            self._frames = pixel_values if self._frames is None else torch.cat([self._frames, pixel_values])
            yield from self._take(len(self._frames))

    def finish(self) -> Iterator[VideoClip]:
        """Gives the clip that is left, filled up by repeating its last frame."""
        if self._new_frames() > 0:
            true = len(self._frames)
            fill = self._frames[-1:].expand(self._size - true, -1, -1, -1)
            self._frames = torch.cat([self._frames, fill])
            yield from self._take(true)
        self._frames = None

    def _new_frames(self) -> int:
        """Frames of this clip that the one before does not have."""
        held = 0 if self._frames is None else len(self._frames)
        return held - (self._overlap if self._index else 0)

    def _take(self, true: int) -> Iterator[VideoClip]:
        """The units that are complete, of which `true` frames of the clip are true ones."""
        while self._new_frames() > 0 and len(self._frames) >= self._given + self._unit:
            index, given, step = self._index, self._given, self._size - self._overlap
            part = self._frames[given : given + self._unit]
            count = min(max(true - given, 0), self._unit)
            self._given += self._unit
            if self._given == self._size:
                self._frames, self._index, self._given = self._frames[step:], index + 1, 0
                true -= step
            yield VideoClip(part[None], index, count, index * step + given)


class _Stream(AbstractContextManager):
    """Something with an end, after which it holds nothing and takes nothing."""

    _closed = False

    def close(self) -> None:
        """Lets go of everything; closing twice is fine."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this stream has ended; open another one for the next video.")

    def __exit__(self, *exc: object) -> None:
        self.close()


class EncodeStream(_Stream):
    """Frames in, tokens out, made by `VideoTokenizer.streaming`; a context manager.

    Args:
        model, processor: of the tokenizer.
        choose: the lengths of each clip, such as a bound `Allocation`.
        overlap: frames that a clip has in common with the one before.
        part: "clip": tokens of whole clips; "block": tokens of each block, as soon as its frames are there.
        lengths: with "block", the lengths of every clip (T,); a choice would have to wait for the whole clip.
        fps: what the tokens say of the rate of the frames.
        refinement_steps, exact: see `EvatokModel.encode`.

    Attributes:
        num_frames: frames pushed so far.

    Raises:
        ValueError: an overlap, part or number of steps that there is not, or steps without a decoder.
    """

    def __init__(
        self,
        model: EvatokModel,
        processor: EvatokVideoProcessor,
        choose: Choice | None,
        overlap: int = 0,
        part: str = "clip",
        lengths: LengthsLike | None = None,
        fps: float | None = None,
        refinement_steps: int = 0,
        exact: bool | None = None,
    ) -> None:
        config = model.config
        model.check_refinement(refinement_steps)
        if part not in PARTS:
            raise ValueError(f"part is {part!r}; choose one of {', '.join(PARTS)}.")
        self._model, self._choose, self._fps, self._overlap = model, choose, fps, overlap
        self._steps, self._exact = refinement_steps, exact
        self._lengths: list[int] | None = None
        if part == "block":
            self._lengths = model.assignment_space.validate(lengths, batch_size=1)[0].tolist()
        unit = config.num_frames if self._lengths is None else config.frames_per_block
        self._feed = ClipFeed(processor, config.num_frames, overlap, unit)
        self._state: ClipState | None = None
        self.num_frames = 0

    def push(self, frames: np.ndarray | torch.Tensor) -> list[VideoTokens]:
        """Takes the next frames of the video, any number of them, at the rate that is to be encoded.

        Args:
            frames: uint8 (n, H, W, 3), or floats in [0, 1].

        Returns:
            What is complete with them, in order: `VideoTokens` of one clip each, lengths (1, T), or of one block each,
            lengths (1, 1); `num_frames` are the true frames of that clip or block. Often nothing.

        Raises:
            ValueError: frames of another shape or type, or a stream that has ended.
        """
        self._check_open()
        self.num_frames += len(frames)
        return [tokens for clip in self._feed.push(frames) for tokens in self.encode([clip], clip.pixel_values_videos)]

    def finish(self) -> list[VideoTokens]:
        """Ends the video and the stream: the last clip is filled up by repeating its last frame."""
        self._check_open()
        parts = [part for clip in self._feed.finish() for part in self.encode([clip], clip.pixel_values_videos)]
        self.close()
        return parts

    def join(self, parts: list[VideoTokens]) -> VideoTokens:
        """Joins all parts that `push` and `finish` gave of a video to the tokens of `VideoTokenizer.encode`.

        Raises:
            ValueError: no parts, or not all blocks of a clip.
        """
        whole, blocks = VideoTokens.concatenate(parts), self._model.config.num_blocks
        if whole.lengths.numel() % blocks:
            raise ValueError(f"{whole.lengths.numel()} blocks are not whole clips of {blocks}; join all parts.")
        lengths = whole.lengths.reshape(-1, blocks)  # (B, T)
        frames = sum(part.num_frames for part in parts) - self._overlap * (len(lengths) - 1)
        return replace(whole, lengths=lengths, num_frames=frames)

    def close(self) -> None:
        super().close()
        self._feed = self._state = self._choose = None

    def encode(self, clips: Sequence[VideoClip], video: torch.Tensor) -> list[VideoTokens]:
        """Encodes the next clips, or block of one, that are preprocessed already, in place of `push`.

        Args:
            clips: one or more; of blocks one.
            video: all their frames (B, F, 3, H, W), where they are to be worked on.

        Returns:
            The tokens of each, on the CPU, for which an accelerator is waited for once.
        """
        if self._lengths is None:
            lengths = choose_lengths(self._choose, clips, video, self._model, self._exact)
            tokens = self._model.encode(video, lengths, self._steps, self._exact, return_dict=True)
        else:
            state = self._state or self._model.start_encoding()
            length = self._lengths[state.block]
            lengths = torch.tensor([[length]])
            ids = self._model.encode_block(video, length, state, self._steps)
            tokens = VideoTokens(ids, lengths, **self._model.origin())
            state = self._state = state if state.block < len(self._lengths) else None
        # What is kept is copied now that the large tensors are gone. Among these, where it was made, it would keep
        # their memory from being used again: hundreds of MiB over a long video.
        parts = tokens.ids.cpu().split(lengths.sum(-1).tolist())
        return [
            replace(
                tokens,
                ids=ids.clone(),
                lengths=row.clone(),
                fps=self._fps,
                num_frames=clip.num_frames,
                overlap=self._overlap,
            )
            for clip, ids, row in zip(clips, parts, lengths.split(1), strict=True)
        ]


def choose_lengths(
    choose: Choice, clips: Sequence[VideoClip], video: torch.Tensor, model: EvatokModel, exact: bool | None
) -> torch.Tensor:
    """The lengths (B, T) of clips: of all together by an allocation, one after another by a function of the user's."""
    if isinstance(choose, Allocation):
        return choose(video, exact)
    space = model.assignment_space
    return torch.cat([space.validate(choose(clip.pixel_values_videos), batch_size=1) for clip in clips])


class DecodeStream(_Stream):
    """Tokens in, frames out, made by `VideoTokenizer.streaming_decode`; a context manager.

    Args:
        model, processor: of the tokenizer.
        blend: how clips are put together; see `seams.Seam`.
        exact: False decodes the whole clips of a push together; see `EvatokModel.decode`.
    """

    def __init__(
        self, model: EvatokModel, processor: EvatokVideoProcessor, blend: str = "fade", exact: bool = True
    ) -> None:
        check_blend(blend)
        model.check_decoder()
        self._model, self._processor, self._blend, self._exact = model, processor, blend, exact
        self._seam: Seam | None = None  # known with the first tokens, which say their overlap
        self._state: ClipState | None = None
        self._padded = False

    def push(self, tokens: VideoTokens) -> np.ndarray:
        """Takes the next tokens of the video.

        Args:
            tokens: whole clips, lengths (B, T), or a block, lengths (1, 1), as an `EncodeStream` gives them.

        Returns:
            uint8 (n, H, W, 3), the frames that nothing to come can change; n may be 0.

        Raises:
            ValueError: tokens of another checkpoint, another overlap than those before, tokens after a clip that was
                filled up, ids or lengths outside the model's sets, or a stream that has ended.
        """
        self._check_open()
        config, model, decoded = self._model.config, self._model, None
        model.check_origin(tokens)
        blocks, size, span = tokens.lengths.shape[1], config.num_frames, config.frames_per_block
        if blocks != 1 or config.num_blocks == 1:
            model.assignment_space.validate(tokens.lengths, len(tokens))
            if self._state is not None:
                raise ValueError("the clip before is not complete; push its other blocks first.")
            if not self._exact:
                decoded = model.decode(tokens, exact=False).unflatten(1, (blocks, span)).flatten(0, 1)  # (B * T, ..)
        if self._seam is None:
            self._seam = Seam(size, tokens.overlap, self._blend)
        elif tokens.overlap != self._seam.overlap:
            raise ValueError(f"these tokens overlap by {tokens.overlap} frames, those before by {self._seam.overlap}.")
        step, ready = size - tokens.overlap, []
        whole = len(tokens) * span if blocks == 1 else size + step * (len(tokens) - 1)
        missing = 0 if tokens.num_frames is None else whole - tokens.num_frames  # all at the end
        lengths = tokens.lengths.flatten().tolist()
        for number, ids in enumerate(tokens.ids.split(lengths)):
            after = (len(lengths) - 1 - number) * span  # frames of later blocks
            self._state = self._state or model.start_decoding()
            first = self._state.block * span
            if self._padded and first == 0:
                raise ValueError("the clip before was filled up, so that it was the last one; open another stream.")
            if decoded is None:
                frames = model.decode_block(ids, self._state)[0]  # (F / T, 3, H, W)
            else:
                frames, self._state.block = decoded[number], self._state.block + 1
            true = min(max(span - max(missing - after, 0), 0), span)
            self._padded |= true < span
            ready += self._seam.push(frames[:true], first)
            if self._state.block == config.num_blocks:
                self._seam.end_clip()
                self._state = None
        return self._frames(ready)

    def finish(self) -> np.ndarray:
        """Ends the tokens and the stream, and gives the frames held back, uint8 (n, H, W, 3)."""
        self._check_open()
        frames = self._frames([] if self._seam is None else self._seam.finish())
        self.close()
        return frames

    def close(self) -> None:
        super().close()
        self._seam = self._state = None

    def _frames(self, parts: list[torch.Tensor]) -> np.ndarray:
        """Parts (n, 3, H, W) -> uint8 (n, H, W, 3)."""
        side = self._model.config.image_size
        parts = [part for part in parts if len(part)]
        if not parts:
            return np.empty((0, side, side, 3), dtype=np.uint8)
        return self._processor.postprocess(torch.cat(parts)[None])[0].cpu().numpy()


def frames_at_once(size: int, pixels: int) -> int:
    """The largest part of a clip, in frames, that stays within `PIXELS_AT_ONCE`; it divides the clip."""
    return max(n for n in range(1, size + 1) if size % n == 0 and (n == 1 or n * pixels <= PIXELS_AT_ONCE))
