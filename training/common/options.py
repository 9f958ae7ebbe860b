"""Options that scripts share; each of them gives them its own defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from accelerate import Accelerator

from evatok_hf.allocation import DATASET_STRATEGIES, Allocation
from evatok_hf.data.decoded import DecodedSource
from evatok_hf.data.streaming import ClipConfig, ClipStream
from training.common.arguments import choose_precision, parse_sources
from training.common.fields import OptionClass, option
from training.common.hub_push import HubArguments

_Stream = TypeVar("_Stream", bound=ClipStream)


@dataclass(kw_only=True)
class VideoOptions(OptionClass):
    """Options of scripts that stream clips of videos."""

    train_data: list[str] = option("Folders, WebDataset globs or Hub data sets; SOURCE=WEIGHT mixes several by weight.")
    strides: list[int] = option("Frame strides to draw from.", [1])
    scale: list[float] = option("Side of the square crop over the short side: lo hi.", [1.0, 1.0])
    clips_per_video: int = option("Clips cut from a video each time it comes up.", 1)
    shuffle_buffer: int = option("Undecoded examples that streams are shuffled among.", 256)
    num_workers: int = option("Loader processes a process.", 1)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "clips_per_video")

    def clip_config(self, sizes: Any) -> ClipConfig:
        """The way in which clips are cut, with the `num_frames` and the `image_size` of a configuration."""
        told = {field.name: getattr(self, field.name) for field in fields(ClipConfig) if hasattr(self, field.name)}
        told |= {"strides": tuple(self.strides), "scale": tuple(self.scale)}
        return ClipConfig(**told | {"num_frames": sizes.num_frames, "image_size": sizes.image_size})

    def open_stream(
        self, kind: type[_Stream], split: str, clip: ClipConfig, accelerator: Accelerator, **more: Any
    ) -> _Stream:
        """This process's clips of the sources. Raises ValueError as `ClipStream`."""
        return kind(
            parse_sources(self.train_data),
            split,
            clip,
            seed=self.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            shuffle_buffer=self.shuffle_buffer,
            **more,
        )


@dataclass(kw_only=True)
class ViewOptions(VideoOptions):
    """Options of scripts that make tokens of clips."""

    random_position: bool = option("Crop anywhere rather than at the centre.", False)
    flip_probability: float = option("How often a view is mirrored left to right.", 0.5)
    random_start: bool = option("Start anywhere rather than evenly spaced.", True)
    strategy: str | None = option(f"Of {', '.join(DATASET_STRATEGIES)}; the router's, without one uniform.", None)
    quality: float | None = option("Weight of quality, 0 to 2, of the router (1.2).", None)
    uniform: int | None = option("The same tokens for every block.", None)
    lengths: str | None = option("Tokens of each block, such as 128,32,16,64.", None)
    budget_per_clip: int | None = option("At most so many tokens for each clip.", None)
    known_frames: int | None = option(
        "Also make the condition of frame prediction: so many frames, the last one held (LARP: 5).", None
    )

    def allocation(self) -> Allocation:
        """The strategy of lengths. Raises ValueError for an unknown one, or options that contradict each other."""
        told = {"quality": self.quality, "budget_per_clip": self.budget_per_clip}
        return Allocation.from_options(self.strategy, self.lengths, self.uniform, DATASET_STRATEGIES, **told)


@dataclass(kw_only=True)
class RunOptions(OptionClass):
    """Options of every trainer."""

    output_dir: str = option("Folder for checkpoints, logs, samples and what is trained.")
    steps: int = option("Optimiser steps.", 1000)
    minutes: float | None = option(
        "How long the run may take, to its written result: --steps then stands for that time, which all "
        "schedules follow, and a checkpoint comes every two minutes. A resumed run has so many minutes more.",
        None,
    )
    learning_rate: float = option("Peak learning rate.", 1e-4)
    min_learning_rate_ratio: float = option("Final over peak learning rate.", 0.01)
    warmup_steps: int = option("Linear warm-up steps.", 500)
    weight_decay: float = option("AdamW weight decay.", 0.05)
    max_grad_norm: float = option("Gradient norm clipping.", 1.0)
    mixed_precision: str = option("no, fp16 or bf16; auto: bf16 where the device computes in it.", "auto")
    seed: int = option("Seed of weights, clips and all that is drawn.", 0)
    resume: str | None = option("'latest', or the path of a checkpoint-N folder.", None)
    save_every: int = option("Steps between checkpoints.", 1000)
    keep_checkpoints: int = option("How many checkpoints to keep.", 2)
    log_every: int = option("Steps between log lines.", 20)
    tracker: str = option("none, or a tracker of accelerate: tensorboard, wandb, ..", "none")
    cpu: bool = option("Train on the CPU even where there is a GPU.", False)
    # Options of some trainers only.
    gradient_accumulation_steps: ClassVar[int] = 1
    cooldown_steps: ClassVar[int] = 0

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "steps", "save_every", "keep_checkpoints", "log_every", "gradient_accumulation_steps")
        self.above_zero("minutes")
        self.mixed_precision = choose_precision(self.mixed_precision, self.cpu)


@dataclass(kw_only=True)
class ClipOptions(VideoOptions, RunOptions):
    """Options of trainers of clips."""

    train_split: str = option("Split of the training sources.", "train")
    batch_size: int = option("Clips a process and forward pass.", 16)
    adam_beta1: float = option("AdamW beta 1.", 0.9)
    adam_beta2: float = option("AdamW beta 2.", 0.95)
    resident: bool = option(
        "Keep all frames in the memory of the device and cut clips there; for sources that were decoded "
        "once (evatok_hf.data.decoded), and --num_workers 0.",
        False,
    )
    num_workers: int = option(
        "Loader processes a training process; each gives an equal part of every batch. Runs with the same "
        "number of them in all, and the same global batch, see the same clips whatever the number of processes.",
        1,
    )

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "batch_size")
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
        stream = self.open_stream(ClipStream, self.train_split, clip, accelerator)
        for source in stream.sources if self.resident else ():
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

    preset: str = option("Model size: tiny, small or a larger one of the model's.", "tiny")
    model_overrides: str = option("JSON of fields of the model's configuration; they replace the preset's.", "{}")
    ema_decay: float = option("Decay of the averaged weights.", 0.9999)
    validate_every: int = option("Steps between validations.", 1000)
    export_dtype: str = option("dtype of the final weights: float32 or bfloat16.", "float32")

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "validate_every")
        self.one_of(export_dtype=("float32", "bfloat16"))
