"""The results of `VideoTokenizer.route` and `reconstruct`, one object for each clip of a video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models.tokens_evatok import VideoTokens


@dataclass
class RoutedClip:
    """The lengths that a clip of f true frames gets.

    Attributes:
        original: uint8 (f, H, W, 3), after resizing and cropping.
        lengths: tokens of each block, T numbers.
        index: number of the clip in its video.
        start, end: seconds from the first frame of the video, None where its rate is not known.
    """

    original: np.ndarray
    lengths: list[int]
    index: int
    start: float | None
    end: float | None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass
class ReconstructedClip:
    """A clip before and after its tokens, f true frames.

    Where clips overlap, the frames that it has in common with the next one are left to that.

    Attributes:
        original: uint8 (f, H, W, 3), after resizing and cropping.
        reconstruction: uint8 (f, H, W, 3), decoded from `tokens` and, where clips overlap, those of its neighbours.
        tokens: tokens of this clip, with `fps` and `num_frames` (f, or more where clips overlap).
        psnr: dB between the two, over these frames; infinite if they are equal.
        index: number of the clip in its video.
        first: number of its first frame in the video.
    """

    original: np.ndarray
    reconstruction: np.ndarray
    tokens: VideoTokens
    psnr: float
    index: int
    first: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each block, T numbers."""
        return self.tokens.lengths[0].tolist()
