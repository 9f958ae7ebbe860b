"""Seams between clips, at which the picture jumps because each clip is coded on its own.

Two remedies, both our choice (the method treats clips on their own). Clips that overlap are faded into each other,
which costs tokens. And what stood still at the end of the earlier clip, where the decoder knew more of it, is carried
on into the later one, which costs none.
"""

from __future__ import annotations

import torch

from ..models.video_processing_evatok import blurred

BLENDS = ("fade", "cut", "carry")
# d in frames, s and r in units of the values, blur in pixels. Chosen on 34 training videos of evatok-tiny, at 32 tokens
# a block and with the router. A larger r takes away more of the jump; larger d and s give more PSNR where later frames
# of a clip are much better than its first, as with uniform lengths, and lower it in some videos with the router.
CARRY_FRAMES, CARRY_MOTION, CARRY_GAP, CARRY_BLUR = 4.0, 0.15, 0.45, 2.0


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

    "carry": with B the later clip and x the earlier one's frame at the time of B_0 (where they overlap) or just before,
    frame t becomes B_t + w_t (x - B_0), w_t = exp(-t / d - (m_t / s)^2 - (g / r)^2). m_t is the largest change
    |B_u - B_0| of u <= t plus twice that over the last block of the earlier clip, g is |x - B_0|, both means over
    channels and blurred. So what stands still passes over into the later clip, what moves is the later clip's at once,
    and after a cut nothing is left of the earlier one.

    Args:
        num_frames: frames F of a clip.
        overlap: frames k that it has in common with the one before.
        blend: "fade": the common frame j of k shows the later clip with weight (j + 1) / (k + 1); "cut": it shows the
            earlier clip, which knows more of what came before; "carry": as "fade", and the later clip is made as above.
            Only "carry" does something where clips do not overlap.

    Raises:
        ValueError: an overlap or blend that there is not.
    """

    def __init__(self, num_frames: int, overlap: int = 0, blend: str = "fade") -> None:
        check_blend(blend)
        self.overlap = check_overlap(overlap, num_frames)
        self._size, self._blend = num_frames, blend
        self._before: list[torch.Tensor] = []  # frames that the clip before has in common with this one, (3, H, W)
        self._held: list[torch.Tensor] = []  # frames that this clip has in common with the next one
        self._last: torch.Tensor | None = None  # the last frame of the clip before, where it has none in common
        self._start: torch.Tensor | None = None  # B_0
        self._gap = self._weight = None  # x - B_0 (3, H, W) and exp(-(g / r)^2) (H, W)
        self._motion = self._before_motion = None  # over the last block of this clip, and of the one before, (H, W)
        self._most = None  # |B_u - B_0| at its largest, (H, W)

    def push(self, frames: torch.Tensor, first: int) -> list[torch.Tensor]:
        """Takes a block of a clip, (n, 3, H, W) from its frame `first` on, and gives the frames that are settled with
        it, (m, 3, H, W) each."""
        if not len(frames):
            return []
        if self._blend == "carry":
            frames = self._carried(frames.float(), first)
        ready = []
        for place, frame in enumerate(frames, first):
            if self._before and place < self.overlap:
                weight = 0.0 if self._blend == "cut" else (place + 1) / (self.overlap + 1)
                frame = torch.lerp(self._before[place].float(), frame.float(), weight)
            (self._held if place >= self._size - self.overlap else ready).append(frame)
        self._last = frames[-1]
        return [torch.stack(ready)] if ready else []

    def end_clip(self) -> None:
        """Ends a clip; the next frames are of the next one."""
        self._before, self._held = self._held, []

    def finish(self) -> list[torch.Tensor]:
        """The frames that are still held, when no clip follows."""
        rest = self._held or self._before
        self._before, self._held = [], []
        return [torch.stack(rest)] if rest else []

    def _carried(self, frames: torch.Tensor, first: int) -> torch.Tensor:
        known = self._before[0] if self._before else self._last
        if first == 0 and known is not None:  # not the first clip of the video
            self._start, self._gap = frames[0], known.float() - frames[0]
            gap = blurred(self._gap.abs().mean(0)[None, None, None], CARRY_BLUR)[0, 0, 0]  # (H, W)
            self._weight = torch.exp(-((gap / CARRY_GAP) ** 2))
            self._before_motion, self._most = self._motion, torch.zeros_like(gap)
        self._motion = (frames[-1] - frames[0]).abs().mean(0)
        if self._gap is None:
            return frames
        most = torch.cat([self._most[None], (frames - self._start).abs().mean(1)]).cummax(0).values[1:]  # (n, H, W)
        self._most = most[-1]
        change = blurred((most + 2 * self._before_motion)[None, :, None], CARRY_BLUR)[0]  # (n, 1, H, W)
        place = torch.arange(first, first + len(frames), device=frames.device).view(-1, 1, 1, 1)
        weight = self._weight * torch.exp(-place / CARRY_FRAMES - (change / CARRY_MOTION) ** 2)
        return (frames + weight * self._gap).clamp(-1, 1)
