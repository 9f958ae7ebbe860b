"""A checkpoint under the generation benchmark: what it makes of real clips, and the clips that it generates."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.generation.clips import LabelledClips
from evatok_hf import EvatokPipeline, VideoTokens
from evatok_hf.allocation import Allocation
from evatok_hf.data.streaming import to_float
from evatok_hf.models.checkpoint_evatok import resolve_device
from training.common.checkpoints import earlier_run

BATCH = 64  # clips drawn at once


@dataclass
class Checkpoint:
    """A pipeline and what its generator's `training.json` says, where it is at hand."""

    name: str
    pipe: EvatokPipeline
    training: dict[str, Any]

    @classmethod
    def load(cls, name: str, device: str) -> Checkpoint:
        pipe = EvatokPipeline.from_pretrained(name).to(resolve_device(device))
        if pipe.generator is None:
            raise ValueError(f"{name} has no generator; name a checkpoint with generator/ beside tokenizer/.")
        return cls(name, pipe, earlier_run(str(Path(name).expanduser() / "generator")) or {})

    @property
    def tokens_of(self) -> dict[str, Any]:
        """The summary of the token data set that it learned."""
        return self.training.get("data") or {}

    @property
    def predicts(self) -> bool:
        """True if its generator learned frame prediction."""
        return self.tokens_of.get("known_frames", self.pipe.generator.config.known_frames) is not None

    def allocation(self) -> tuple[Allocation, str]:
        """The allocation of real clips' lengths: as in the token data set, by default the router; and that in words."""
        tokens, told = self.tokens_of, {}
        strategy = tokens.get("strategy")
        takes = {"uniform": "lengths", "fixed": "lengths", "router": "quality", "budget": "budget_per_clip"}
        if tokens.get(takes.get(strategy)) is not None:
            told[takes[strategy]] = tokens[takes[strategy]]
        words = tokens.get("allocation", "the default: the router, if there is one")
        return Allocation(strategy, **told).bind(self.pipe.tokenizer, self.pipe.router), words

    @property
    def coding(self) -> str:
        """The facts that tell its reconstructions of clips from those of another checkpoint."""
        router = None if self.pipe.router is None else self.pipe.router.fingerprint()
        return f"tokenizer {self.pipe.tokenizer.fingerprint()}, router {router}, {self.allocation()[1]}"

    @torch.no_grad()
    def reconstruct(self, clips: LabelledClips, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, F, 3, S, S) decoded from the tokens of each clip, on the CPU, and the lengths (N, T)."""
        model, (allocation, _) = self.pipe.tokenizer, self.allocation()
        video, lengths = [], []
        for part in tqdm(clips.video.split(1), desc=name, unit="clip", file=sys.stderr):
            x = to_float(part).to(model.device)
            tokens = model.encode(x, allocation(x), return_dict=True)
            video.append(model.decode(tokens).float().cpu())
            lengths.append(tokens.lengths.cpu())
        return torch.cat(video), torch.cat(lengths)

    def check(self, clips: LabelledClips) -> None:
        """Raises ValueError for classes that the generator does not know, or a rate that it has not learned."""
        if unknown := sorted(set(clips.classes) - set(self.pipe.classes)):
            raise ValueError(
                f"the generator of {self.name} knows no class {', '.join(unknown)}; name the data that it learned."
            )
        fps = self.pipe.fps
        if fps is not None and abs(clips.fps / fps - 1) > 0.02:
            raise ValueError(
                f"the generator of {self.name} learned {fps:.2f} frames a second and the clips have {clips.fps:.2f}; "
                "choose another --stride."
            )


@dataclass
class Samples:
    """Generated clips: video (N, F, 3, S, S) in [-1, 1], labels (N,) of the data's classes, their tokens, and the time
    that one took."""

    video: torch.Tensor
    labels: torch.Tensor
    tokens: VideoTokens
    seconds: float
    cpu_seconds: float


def sample_seeds(seed: int, classes: int, count: int) -> list[int]:
    """A seed for each of `count` samples of each class; that of a sample does not depend on `count`."""
    return [(seed * classes + label) * 10**6 + index for label in range(classes) for index in range(count)]


def generate(
    checkpoint: Checkpoint, classes: list[str], count: int, seed: int, guidance: float, temperature: float
) -> Samples:
    """`count` clips of each class, class after class."""
    pipe, options = checkpoint.pipe, {"guidance_scale": guidance, "temperature": temperature, "batch_size": BATCH}
    pipe.set_progress_bar_config(desc="samples", file=sys.stderr)
    started, cpu = time.perf_counter(), time.process_time()
    seeds = sample_seeds(seed, len(classes), count)
    made = pipe(classes, count, seeds=seeds, output_type="pt", **options)
    seconds, cpu = (time.perf_counter() - started) / len(seeds), (time.process_time() - cpu) / len(seeds)
    labels = torch.arange(len(classes)).repeat_interleave(count)
    return Samples(made.frames * 2 - 1, labels, made.tokens, seconds, cpu)
