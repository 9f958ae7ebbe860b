"""Options that the trainers share; each of them gives them its own defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from accelerate import Accelerator

from evatok_hf.data.decoded import DecodedSource
from evatok_hf.data.streaming import ClipConfig, ClipStream
from training.common.arguments import choose_precision, parse_sources
from training.common.hub_push import HubArguments


@dataclass(kw_only=True)
class RunOptions:
    """Options of every trainer. A subclass that names one with another default keeps its help."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints, logs, samples and what is trained."})
    steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    minutes: float | None = field(
        default=None,
        metadata={
            "help": "How long the run may take, to its written result: --steps then stands for that time, which all "
            "schedules follow, and a checkpoint comes every two minutes. A resumed run has so many minutes more."
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    min_learning_rate_ratio: float = field(default=0.01, metadata={"help": "Final over peak learning rate."})
    warmup_steps: int = field(default=500, metadata={"help": "Linear warm-up steps."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm clipping."})
    mixed_precision: str = field(
        default="auto", metadata={"help": "no, fp16 or bf16; auto: bf16 where the device computes in it."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, clips and all that is drawn."})
    resume: str | None = field(default=None, metadata={"help": "'latest', or the path of a checkpoint-N folder."})
    save_every: int = field(default=1000, metadata={"help": "Steps between checkpoints."})
    keep_checkpoints: int = field(default=2, metadata={"help": "How many checkpoints to keep."})
    log_every: int = field(default=20, metadata={"help": "Steps between log lines."})
    tracker: str = field(default="none", metadata={"help": "none, or a tracker of accelerate: tensorboard, wandb, .."})
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is a GPU."})
    # Options of some trainers only.
    gradient_accumulation_steps: ClassVar[int] = 1
    cooldown_steps: ClassVar[int] = 0

    def __init_subclass__(cls):
        inherited = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= base.__dict__.get("__dataclass_fields__", {})
        for name in cls.__annotations__.keys() & inherited.keys() & cls.__dict__.keys():
            given, metadata = cls.__dict__[name], inherited[name].metadata
            if not isinstance(given, dataclasses.Field):
                setattr(cls, name, field(default=given, metadata=metadata))
            elif not given.metadata:
                given.metadata = metadata

    def __post_init__(self):
        self.at_least_one("steps", "save_every", "keep_checkpoints", "log_every", "gradient_accumulation_steps")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise ValueError(f"--minutes must be more than 0, got {self.minutes}.")
        self.mixed_precision = choose_precision(self.mixed_precision, self.cpu)

    def at_least_one(self, *names: str) -> None:
        """Raises ValueError for an option of these that is less than 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")

    def fractions(self, *names: str) -> None:
        """Raises ValueError for an option of these that is no share or probability."""
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in [0, 1], got {getattr(self, name)}.")

    def one_of(self, **choices: Any) -> None:
        """Raises ValueError for an option that is none of its choices."""
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be one of {list(allowed)}, got {getattr(self, name)!r}.")


@dataclass(kw_only=True)
class ClipOptions(RunOptions):
    """Options of trainers that stream clips of videos."""

    train_data: list[str] = field(
        metadata={"help": "Folders, WebDataset globs or Hub data sets; SOURCE=WEIGHT mixes several by weight."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of the training sources."})
    batch_size: int = field(default=16, metadata={"help": "Clips a process and forward pass."})
    strides: list[int] = field(default_factory=lambda: [1], metadata={"help": "Frame strides to draw from."})
    scale: list[float] = field(
        default_factory=lambda: [1.0, 1.0], metadata={"help": "Side of the square crop over the short side: lo hi."}
    )
    clips_per_video: int = field(default=1, metadata={"help": "Clips cut from a video each time it comes up."})
    shuffle_buffer: int = field(default=256, metadata={"help": "Undecoded examples that streams are shuffled among."})
    resident: bool = field(
        default=False,
        metadata={
            "help": "Keep all frames in the memory of the device and cut clips there; for sources that were decoded "
            "once (evatok_hf.data.decoded), and --num_workers 0."
        },
    )
    num_workers: int = field(
        default=1,
        metadata={
            "help": "Loader processes a training process; each gives an equal part of every batch. Runs with the same "
            "number of them in all, and the same global batch, see the same clips whatever the number of processes."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.at_least_one("batch_size", "clips_per_video")
        if self.num_workers < 0 or self.batch_size % max(1, self.num_workers):
            raise ValueError(
                f"--batch_size {self.batch_size} must be a multiple of --num_workers {self.num_workers}, each of which "
                "gives an equal part of it."
            )
        if self.resident and self.num_workers:
            raise ValueError("--resident true cuts clips in the training process; give --num_workers 0.")

    def stream(self, clip: ClipConfig, accelerator: Accelerator) -> ClipStream:
        """This process's clips of the training sources.

        Raises:
            ValueError: as `ClipStream`, and for a source that is not decoded where --resident asks for it.
        """
        stream = ClipStream(
            parse_sources(self.train_data),
            self.train_split,
            clip,
            seed=self.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            shuffle_buffer=self.shuffle_buffer,
        )
        if self.resident:
            for source in stream.sources:
                if not isinstance(source, DecodedSource):
                    raise ValueError(
                        f"--resident true needs decoded videos, and {source.name} is none; decode it once with "
                        "evatok_hf.data.decoded.decode_videos."
                    )
                source.to(accelerator.device)
        return stream


@dataclass(kw_only=True)
class ModelOptions(RunOptions, HubArguments):
    """Options of trainers of the package's own models, which can be pushed to the Hub."""

    preset: str = field(default="tiny", metadata={"help": "Model size: tiny, small or a larger one of the model's."})
    model_overrides: str = field(
        default="{}", metadata={"help": "JSON of fields of the model's configuration; they replace the preset's."}
    )
    ema_decay: float = field(default=0.9999, metadata={"help": "Decay of the averaged weights."})
    validate_every: int = field(default=1000, metadata={"help": "Steps between validations."})
    export_dtype: str = field(default="float32", metadata={"help": "dtype of the final weights: float32 or bfloat16."})

    def __post_init__(self):
        HubArguments.__post_init__(self)
        super().__post_init__()
        self.at_least_one("validate_every")
        if self.export_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--export_dtype must be float32 or bfloat16, got {self.export_dtype!r}.")
