"""Where clips meet: clips that overlap are faded into each other (our choice; the method treats clips on their own)."""

from __future__ import annotations

import torch

BLENDS = ("fade", "cut")


def check_overlap(overlap: int, num_frames: int) -> int:
    """The overlap. Raises ValueError unless it is from 0 to half the frames of a clip, so that no three clips meet."""
    if not isinstance(overlap, int) or not 0 <= overlap <= num_frames // 2:
        raise ValueError(f"overlap is {overlap!r}; give a whole number of frames from 0 to {num_frames // 2}.")
    return overlap


def check_blend(blend: str) -> None:
    """Raises ValueError for a blend that there is not."""
    if blend not in BLENDS:
        raise ValueError(f"blend is {blend!r}; choose one of {', '.join(BLENDS)}.")


def count_clips(frames: int, num_frames: int, overlap: int) -> int:
    """Clips of `num_frames` frames that cover a video of so many frames (at least 1)."""
    return 1 + max(0, -(-(frames - num_frames) // (num_frames - overlap)))


class Seam:
    """Puts the frames of clips that come one after another together, holding what the next clip can still change.

    Args:
        num_frames: frames F of a clip.
        overlap: frames k that it has in common with the one before.
        blend: what the common frames show: "fade", frame j of k with weight (j + 1) / (k + 1) of the later clip; or
            "cut", the earlier clip, which knows more of what came before.

    Raises:
        ValueError: an overlap or blend that there is not.
    """

    def __init__(self, num_frames: int, overlap: int = 0, blend: str = "fade") -> None:
        check_blend(blend)
        self.overlap = check_overlap(overlap, num_frames)
        self._size, self._fades = num_frames, blend == "fade"
        self._before: list[torch.Tensor] = []  # frames that the clip before has in common with this one, (3, H, W)
        self._held: list[torch.Tensor] = []  # frames that this clip has in common with the next one

    def push(self, frames: torch.Tensor, first: int) -> list[torch.Tensor]:
        """Frames (n, 3, H, W) of a clip from its frame `first` on -> those that are now settled, each (m, 3, H, W)."""
        ready = []
        for place, frame in enumerate(frames, first):
            if self._before and place < self.overlap:
                weight = (place + 1) / (self.overlap + 1) if self._fades else 0.0
                frame = torch.lerp(self._before[place].float(), frame.float(), weight)
            if place >= self._size - self.overlap:
                self._held.append(frame)
            else:
                ready.append(frame)
        return [torch.stack(ready)] if ready else []

    def end_clip(self) -> None:
        """The clip is complete; the next frames are of the next one."""
        self._before, self._held = self._held, []

    def finish(self) -> list[torch.Tensor]:
        """The frames that are still held, when no clip follows."""
        rest = self._held or self._before
        self._before, self._held = [], []
        return [torch.stack(rest)] if rest else []
