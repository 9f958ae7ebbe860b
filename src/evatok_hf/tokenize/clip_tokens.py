"""Clips to the tokens that a generator learns: lengths and ids, and those of what it is shown in frame prediction."""

from __future__ import annotations

import torch

from ..allocation.strategies import Allocation
from ..models.video_processing_evatok import check_known_frames, hold_last_frame
from .ahead import to_device


class ClipTokens:
    """Called with clips, gives the tokens of each; those of a clip do not depend on its batch-mates.

    Args:
        allocation: how lengths are chosen, bound to the tokenizer on its device.
        known_frames: also give the condition of frame prediction, from 1 to F - 1 frames (see `hold_last_frame`);
            None for none.

    Raises:
        ValueError: known frames out of range; an allocation that is not for data sets.
    """

    def __init__(self, allocation: Allocation, known_frames: int | None = None):
        if known_frames is not None:
            check_known_frames(known_frames, allocation.model.config.num_frames)
        allocation.check_for_dataset()
        self.model, self.allocation, self.known_frames = allocation.model, allocation, known_frames

    @torch.no_grad()
    def __call__(self, video: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Tokens of each clip, on the CPU, for which an accelerator is waited for once.

        Args:
            video: (B, F, C, H, W), floats in [-1, 1] or uint8, anywhere.

        Returns:
            B dicts: "lengths" (T,) int64 and "ids" (N,) int64, block after block; with `known_frames` also
            "condition_lengths" and "condition_ids", whose lengths are what the allocation gives to the held clip.

        Raises:
            ValueError: a wrong shape; an allocation that gives lengths outside the model's.
        """
        video = to_device(video, self.model.device)
        if not video.is_floating_point():
            video = video.float() / 127.5 - 1.0
        rows = self._encode(video, "")
        if self.known_frames is not None:
            conditions = self._encode(hold_last_frame(video, self.known_frames), "condition_")
            rows = [row | condition for row, condition in zip(rows, conditions, strict=True)]
        return rows

    def _encode(self, video: torch.Tensor, prefix: str) -> list[dict[str, torch.Tensor]]:
        lengths = self.allocation(video)
        ids = self.model.encode(video, lengths, return_dict=True).ids.cpu().split(lengths.sum(-1).tolist())
        return [{f"{prefix}lengths": row, f"{prefix}ids": part} for row, part in zip(lengths, ids, strict=True)]
