"""Methods that `EvatokPipeline` had for whole videos in the release before, each with a `FutureWarning`.

They are `VideoTokenizer`'s now, and go with the next release.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .models.pipeline_evatok import EvatokPipeline, EvatokPipelineOutput, to_output
from .models.tokens_evatok import VideoTokens
from .tokenize.video_tokenizer import VideoTokenizer


def _replaced(pipe: EvatokPipeline, old: str, new: str) -> VideoTokenizer:
    words = f"EvatokPipeline.{old} goes with the next release; use VideoTokenizer.from_pipe(pipe){new}."
    warnings.warn(words, FutureWarning, stacklevel=3)
    return VideoTokenizer.from_pipe(pipe)


def video_tokenizer(self: EvatokPipeline) -> VideoTokenizer:
    return _replaced(self, "video_tokenizer", "")


def tokenize(self: EvatokPipeline, video: Any, **options: Any) -> VideoTokens:
    return _replaced(self, "tokenize", ".encode(video)").encode(video, **options)


def detokenize(self: EvatokPipeline, tokens: VideoTokens, output_type: str = "np", clips: bool = False) -> Any:
    return _frames(_replaced(self, "detokenize", ".decode(tokens)"), tokens, output_type, clips)


def reconstruct(self: EvatokPipeline, video: Any, *, output_type: str = "np", **options: Any) -> EvatokPipelineOutput:
    tokenizer = _replaced(self, "reconstruct", ".reconstruct(video)")
    tokens = tokenizer.encode(video, **options)
    return EvatokPipelineOutput(_frames(tokenizer, tokens, output_type), tokens, [None])


def _frames(tokenizer: VideoTokenizer, tokens: VideoTokens, output_type: str, clips: bool = False) -> Any:
    decoded = list(tokenizer.decode(replace(tokens, num_frames=None) if clips else tokens))
    video = torch.from_numpy(np.stack(decoded) if clips else np.concatenate(decoded)[None])  # (N, F, H, W, 3)
    return to_output(video.permute(0, 1, 4, 2, 3).float() / 127.5 - 1, output_type)


EvatokPipeline.video_tokenizer = property(video_tokenizer)
EvatokPipeline.tokenize = tokenize
EvatokPipeline.detokenize = detokenize
EvatokPipeline.reconstruct = reconstruct
