"""EvatokPipeline: tokenizer, router and generator together, as a pipeline of diffusers.

Generates clips of a class and continues videos. `VideoTokenizer` takes whole videos to tokens and back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from transformers import PreTrainedModel  # noqa: F401 - diffusers looks for the base classes of components here
from transformers.image_processing_base import ImageProcessingMixin  # noqa: F401

from .base_evatok import write_own_card
from .checkpoint_evatok import (
    check_generator,
    find_dtype,
    load_checkpoint,
    load_generator,
    pipeline_files,
    resolve_device,
    save_checkpoint,
)
from .configuration_evatok import ClassLabel, LengthsLike, class_names, find_class
from .generation_evatok import sample
from .modeling_evatok import EvatokModel
from .modeling_evatok_generator import EvatokGenerator, Prompt
from .modeling_evatok_router import EvatokRouter, check_same_space
from .tokens_evatok import VideoTokens
from .video_processing_evatok import (
    HOLD,
    EvatokVideoProcessor,
    check_hold,
    check_known_frames,
    fade_from_known,
    frames_tensor,
    held_clip,
    keep_still,
)

Generators = torch.Generator | Sequence[torch.Generator] | None
# LARP's on UCF-101.
DEFAULT_GUIDANCE = 1.25

_SAMPLING = (
    "guidance_scale guidance_schedule guidance_start guide_lengths temperature top_k top_p lengths budget "
    "max_block_length implementation"
).split()


@dataclass
class EvatokPipelineOutput(BaseOutput):
    """What a call of the pipeline gives, for N videos of F frames.

    Attributes:
        frames: with output_type "np" float32 (N, F, H, W, 3) in [0, 1], so that diffusers' `export_to_video` takes
            `frames[i]`; with "pt" a tensor (N, F, 3, H, W) in [0, 1] on the CPU; with "pil" N lists of F images.
        tokens: the clips that were drawn, on the CPU; of a prediction over several clips, all clips of the
            first video, then of the second.
        labels: what each video was asked for with: the name of a class (its number where classes have no names), or
            None.
        seeds: the seed of each video, None where nothing was drawn.
    """

    frames: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]
    tokens: VideoTokens
    labels: list[ClassLabel]
    seeds: list[int] | None = None


class EvatokPipeline(DiffusionPipeline):
    """Video generation and frame prediction over adaptive-length tokens.

        pipe = EvatokPipeline.from_pretrained()
        frames = pipe("deadly_corridor", num_videos=4, seeds=[0, 1, 2, 3]).frames

    Args:
        tokenizer: from clips to tokens and back.
        processor: brings frames to the tokenizer's size.
        router: chooses lengths of encoded clips; without one every block gets the middle candidate.
        generator: draws tokens; without one nothing can be drawn.

    Raises:
        ValueError: a router or a generator of another tokenizer.
    """

    _optional_components = ["router", "generator"]

    def __init__(
        self,
        tokenizer: EvatokModel,
        processor: EvatokVideoProcessor,
        router: EvatokRouter | None = None,
        generator: EvatokGenerator | None = None,
    ):
        super().__init__()
        tokenizer.eval()
        if router is not None:
            check_same_space(tokenizer, router)
            router.eval()
        if generator is not None:
            check_generator(tokenizer, generator.config)
            generator.eval()
        self.register_modules(tokenizer=tokenizer, processor=processor, router=router, generator=generator)

    # --- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> EvatokPipeline:
        """Loads whatever of tokenizer, router and generator a checkpoint has.

        Args:
            path_or_hub_id: a folder or a Hub id that holds the tokenizer itself or in `tokenizer/`, and may hold a
                router in `router/` and a generator in `generator/`; None takes the checkpoint that comes with the
                package.
            device, dtype, revision, token: as for `VideoTokenizer.from_pretrained`.

        Raises:
            ValueError: as `VideoTokenizer.from_pretrained`; a generator that is incomplete or of another tokenizer.
        """
        where, kind = resolve_device(device), find_dtype(dtype)
        if path_or_hub_id is None:
            path_or_hub_id = _package("the bundled checkpoint").default_checkpoint()
        name = str(path_or_hub_id)
        parts = load_checkpoint(name, where, kind, revision, token)
        pipeline = cls(*parts, load_generator(name, where, kind, revision, token))
        pipeline.register_to_config(_name_or_path=parts[0].config._name_or_path)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes what `from_pretrained` reads, and what diffusers' `DiffusionPipeline.from_pretrained` needs with
        `trust_remote_code=True`: also the code, for where this package is not installed.

        Args:
            save_directory: made if need be; files appear only when all of them are complete.
            kwargs: what `push_to_hub` says of formats, of which there is only one: safetensors.

        Raises:
            ValueError: as `save_checkpoint`; a format other than safetensors.
        """
        if unknown := set(kwargs) - {"safe_serialization", "variant"}:
            raise ValueError(f"unknown option {', '.join(sorted(unknown))}; save_pretrained takes a folder.")
        if kwargs.get("safe_serialization") is False or kwargs.get("variant") is not None:
            raise ValueError("checkpoints are written as safetensors without variants; leave these options out.")

        def write(folder: Path) -> None:
            self.processor.save_pretrained(folder / "processor")  # where diffusers looks for it
            parts = [name for name, part in self.components.items() if part is not None]
            for path, content in pipeline_files(parts).items():
                (folder / path).write_bytes(content)

        save_checkpoint(save_directory, self.tokenizer, self.processor, self.router, self.generator, write)

    def _upload_folder(self, working_dir, repo_id, *args, **kwargs):  # the last step of diffusers' `push_to_hub`
        write_own_card(working_dir, repo_id)
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the checkpoint."""
        return Path(self.tokenizer.config._name_or_path).name or "unnamed"

    @property
    def classes(self) -> list[str]:
        """Names of the classes that can be asked for, in the order of labels; numbers where they have no names."""
        return class_names(None if self.generator is None else self.generator.config)

    @property
    def fps(self) -> float | None:
        """Frames a second of generated clips, None where that is not known."""
        return None if self.generator is None else self.generator.config.fps

    def require_generator(self) -> EvatokGenerator:
        """The generator. Raises ValueError where there is none."""
        if self.generator is None:
            name = self.tokenizer.config._name_or_path or "this checkpoint"
            raise ValueError(f"{name} has no generator; take a checkpoint with generator/ beside tokenizer/.")
        return self.generator

    # --- generation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabel | Sequence[ClassLabel] = None,
        num_videos: int = 4,
        *,
        guidance_scale: float | None = None,
        guidance_schedule: str = "constant",
        guidance_start: float = 0.18,
        guide_lengths: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        lengths: LengthsLike | None = None,
        budget: int | None = None,
        max_block_length: int | None = None,
        generator: Generators = None,
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
        implementation: str = "auto",
        output_type: str = "np",
        progress: Callable[[float], None] | None = None,
    ) -> EvatokPipelineOutput:
        """Draws clips: `num_videos` of the first class, then of the second, and so on.

        A clip is a function of its class, its seed and the settings. Seeds are drawn from `generator` for the first
        clip of every class, then for the second, so that clip i of a class does not depend on `num_videos`, nor on
        `batch_size` (to rounding, see `sample`).

        Args:
            class_labels: names or numbers of classes, or one; None draws from the model without a class.
            num_videos: clips of each class.
            guidance_scale: classifier-free guidance; by default 1.25 with a class and 1, none, without.
            guidance_schedule, guidance_start, guide_lengths, temperature, top_k, top_p: see `generation_evatok.sample`.
            lengths: tokens of each block, (T,) or (N, T), 0 where the model decides; by default it decides them all.
            budget: most tokens of a clip.
            max_block_length: most tokens of a block.
            generator: what seeds are drawn from, or one generator a clip; torch's own by default.
            seeds: a seed for each clip instead.
            batch_size: clips drawn at once.
            implementation: how, see `generation_evatok.sample`; "compiled" pays for many clips.
            output_type: "np", "pt" or "pil".
            progress: told from time to time what share is drawn, from 0 to 1.

        Raises:
            ValueError: a pipeline without generator, an unknown class, guidance without classes, a number of seeds that
                is not the number of clips, options out of range.
        """
        model = self.require_generator()
        check_output_type(output_type)
        count = positive("num_videos", num_videos)
        asked = [None] if class_labels is None else as_list(class_labels)
        if not asked:
            raise ValueError("class_labels is an empty list; name a class, or give None for no class.")
        labels = [self._label(name) for name in asked for _ in range(count)]
        if guidance_scale is None:
            guidance_scale = 1.0 if None in labels else DEFAULT_GUIDANCE
        elif guidance_scale != 1 and None in labels:
            raise ValueError("guidance needs a class to guide towards; give class_labels, or guidance_scale 1.")
        drawn = draw_seeds(generator, seeds, len(asked), count)
        with self.progress_bar(total=100) as bar:
            tokens = self._draw(
                [Prompt(label) for label in labels],
                drawn,
                batch_size,
                _reporter(bar, progress),
                lengths=lengths,
                budget=budget,
                max_block_length=max_block_length,
                guidance_scale=guidance_scale,
                guidance_schedule=guidance_schedule,
                guidance_start=guidance_start,
                guide_lengths=guide_lengths,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                implementation=implementation,
            )
        video = self.tokenizer.decode(tokens)
        names = [self._name(model, label) for label in labels]
        return EvatokPipelineOutput(to_output(video, output_type), tokens, names, drawn)

    @torch.no_grad()
    def predict(
        self,
        frames: Any,
        num_frames: int = 16,
        known_frames: int | None = None,
        class_labels: ClassLabel | Sequence[ClassLabel] = None,
        known: str = "input",
        hold: float | None = HOLD,
        *,
        generator: Generators = None,
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
        output_type: str = "np",
        progress: Callable[[float], None] | None = None,
        **sampling: Any,
    ) -> EvatokPipelineOutput:
        """Continues videos, which should have the rate `fps`.

        The generator is shown the tokens of a clip that stands still from the last known frame on, whose whole known
        blocks are kept. What is longer than a clip is continued from its own last `known_frames` frames.

        Args:
            frames: a video, (f, H, W, 3) or (f, 3, H, W) uint8 or floats in [0, 1], or a list of PIL images; or several
                (a list, or five axes). Of more than `known_frames` frames the last are used; fewer are preceded by
                copies of the first, which the result does not show.
            num_frames: frames of the result, the known ones included.
            known_frames: frames that the generator sees; by default as in its training.
            class_labels: one for all videos, or one each; None for no class.
            known: "input" begins the result with the known frames as they were given (resized), "decoded" as the
                tokenizer decodes them.
            hold: share of the last known frame in those after it, halving every 16 frames, from 0 to 1 (see
                `prediction.fade_from_known`). It hedges: 0 moves more and is further from the truth. What stands still
                keeps the known frame in any case (see `prediction.keep_still`), but for None, which shows what the
                tokenizer decodes and nothing else.
            generator, seeds, batch_size, output_type, progress: as for generation, a seed a video.
            sampling: the other options of generation: guidance_scale (1, none, by default), guidance_schedule,
                guidance_start, guide_lengths, temperature, top_k, top_p, lengths, budget, max_block_length,
                implementation.

        Returns:
            N videos of `num_frames` frames that begin with the known ones; longer predictions of the same seeds begin
            with shorter ones.

        Raises:
            ValueError: no frames, frames that are no video, numbers of frames or a share out of range, and as
                generation.
        """
        model = self.require_generator()
        check_output_type(output_type)
        if unknown := set(sampling) - set(_SAMPLING):
            raise TypeError(f"predict has no option {', '.join(sorted(unknown))}; it has {', '.join(_SAMPLING)}.")
        if known not in ("input", "decoded"):
            raise ValueError(f"known must be 'input' or 'decoded', got {known!r}.")
        if hold is not None:
            check_hold(hold)
        size = self.tokenizer.config.num_frames
        seen = model.config.known_frames if known_frames is None else known_frames
        check_known_frames(seen, size)
        given = [self._preprocess(video, seen) for video in as_videos(frames)]
        total = positive("num_frames", num_frames)
        longest = max(map(len, given))
        if total <= longest:
            raise ValueError(
                f"num_frames is {total}, which counts the {longest} known frames, too; give at least {longest + 1}."
            )
        labels = self._labels_of(class_labels, len(given))
        names = [self._name(model, label) for label in labels]
        drawn = draw_seeds(generator, seeds, 1, len(given))
        streams = [torch.Generator().manual_seed(seed) for seed in drawn]
        filled = [seen - len(video) for video in given]
        videos = torch.stack(
            [torch.cat([video[:1].expand(fill, -1, -1, -1), video]) for video, fill in zip(given, filled, strict=True)]
        ).to(self.tokenizer.device)  # (N, seen, 3, H, W)
        last = videos[:, -1]
        rounds = math.ceil((max(filled) + total - seen) / (size - seen))
        options = {"guidance_scale": 1.0, "known_blocks": seen // self.tokenizer.config.frames_per_block, **sampling}
        parts = []
        with self.progress_bar(total=100) as bar:
            report = _reporter(bar, progress)
            for turn in range(rounds):
                recent = videos[:, -seen:]
                tokens = self._draw(
                    self._conditions(recent, labels),
                    [next_seed(stream) for stream in streams],
                    batch_size,
                    lambda done, turn=turn: report((turn + done) / rounds),
                    **options,
                )
                decoded = self.tokenizer.decode(tokens).float()
                new = decoded if hold is None else keep_still(decoded, recent[:, -1], seen - 1)
                if turn == 0 and known == "decoded":
                    videos = decoded[:, :seen]
                videos = torch.cat([videos, new[:, seen:]], dim=1)
                parts.append(tokens)
        if hold:  # only in what is shown: what goes on from it again and again would come to a standstill
            videos = torch.cat([videos[:, :seen], fade_from_known(videos[:, seen:], last, hold)], dim=1)
        shown = [video[fill : fill + total] for video, fill in zip(videos, filled, strict=True)]
        clips = [part.clip(index) for index in range(len(given)) for part in parts]
        return EvatokPipelineOutput(
            to_output(torch.stack(shown), output_type), VideoTokens.concatenate(clips), names, drawn
        )

    # --- for one more release: whole videos are `VideoTokenizer`'s ----------------------------------------------------

    @property
    def video_tokenizer(self) -> Any:
        """Replaced by `VideoTokenizer.from_pipe(pipe)`."""
        return self._whole_videos("video_tokenizer", "VideoTokenizer.from_pipe(pipe)")

    def tokenize(self, video: Any, *, fps: float | None = None, **options: Any) -> VideoTokens:
        """Replaced by `VideoTokenizer.from_pipe(pipe).encode(video)`, which has the same options."""
        tokenizer = self._whole_videos("tokenize", "VideoTokenizer.from_pipe(pipe).encode(video)")
        if isinstance(video, str | Path | bytes) or hasattr(video, "read") or hasattr(video, "iter_chunks"):
            return tokenizer.encode(video, fps=fps, **options)
        if fps is None and self.processor.fps is not None:
            raise ValueError(f"the processor samples to {self.processor.fps:g} fps; give fps, the rate of the frames.")
        frames = frames_tensor(stacked(video)).permute(0, 2, 3, 1).contiguous().numpy()
        in_memory = import_module("evatok_hf.tokenize.memory").MemoryVideo(frames, fps or 1.0)
        return replace(tokenizer.encode(in_memory, **options), fps=fps)

    def detokenize(self, tokens: VideoTokens, output_type: str = "np", clips: bool = False) -> Any:
        """Replaced by `VideoTokenizer.from_pipe(pipe).decode(tokens)`, with `clips` by `pipe.tokenizer.decode`."""
        check_output_type(output_type)
        tokenizer = self._whole_videos("detokenize", "VideoTokenizer.from_pipe(pipe).decode(tokens)")
        decoded = list(tokenizer.decode(replace(tokens, num_frames=None) if clips else tokens))
        video = torch.from_numpy(np.stack(decoded) if clips else np.concatenate(decoded)[None])  # (N, F, H, W, 3)
        return to_output(video.permute(0, 1, 4, 2, 3).float() / 127.5 - 1, output_type)

    def reconstruct(self, video: Any, *, output_type: str = "np", **options: Any) -> EvatokPipelineOutput:
        """Replaced by `VideoTokenizer.from_pipe(pipe).reconstruct(video)`."""
        check_output_type(output_type)
        tokens = self.tokenize(video, **options)
        return EvatokPipelineOutput(self.detokenize(tokens, output_type), tokens, [None])

    def _whole_videos(self, old: str, new: str) -> Any:
        warnings.warn(f"EvatokPipeline.{old} goes with the next release; use {new}.", FutureWarning, stacklevel=3)
        return _package(f"EvatokPipeline.{old}").VideoTokenizer.from_pipe(self)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _label(self, name: ClassLabel) -> int | None:
        return find_class(self.generator.config, name)

    @staticmethod
    def _name(model: EvatokGenerator, label: int | None) -> ClassLabel:
        names = model.config.class_names
        return names[label] if names and label is not None else label

    def _labels_of(self, class_labels: ClassLabel | Sequence[ClassLabel], count: int) -> list[int | None]:
        asked = as_list(class_labels)
        if len(asked) not in (1, count):
            raise ValueError(f"{count} videos but {len(asked)} class_labels; give one for all, or one each.")
        return [self._label(name) for name in (asked * count if len(asked) == 1 else asked)]

    def _preprocess(self, video: Any, most: int) -> torch.Tensor:
        """The last `most` frames of a video, (f, 3, H, W) in [-1, 1] at the tokenizer's size."""
        batch = self.processor(frames_tensor(video)[-most:], do_sample_frames=False, input_data_format="channels_first")
        return batch["pixel_values_videos"][0]

    def _conditions(self, recent: torch.Tensor, labels: Sequence[int | None]) -> list[Prompt]:
        clips = held_clip(recent, self.tokenizer.config.num_frames)
        lengths = None if self.router is None else self.router.assign(clips)
        tokens = self.tokenizer.encode(clips, lengths)
        ids = tokens.ids.cpu().split(tokens.lengths.sum(-1).tolist())
        return [Prompt(*row) for row in zip(labels, tokens.lengths.cpu(), ids, strict=True)]

    def _draw(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        batch_size: int,
        progress: Callable[[float], None],
        lengths: LengthsLike | None = None,
        **options: Any,
    ) -> VideoTokens:
        """Tokens of all prompts; `progress` is told the share that is done."""
        total = len(prompts)
        if lengths is not None and np.ndim(lengths) == 0:
            lengths = [int(lengths)] * self.generator.config.num_blocks
        rows = None if lengths is None else torch.as_tensor(lengths)
        if rows is not None and rows.ndim == 2 and len(rows) != total:
            raise ValueError(f"{len(rows)} rows of lengths for {total} videos; give one for all, or one each.")
        size = positive("batch_size", batch_size)
        drawn = sample(self.generator, prompts, seeds, lengths=rows, batch_size=size, progress=progress, **options)
        return replace(drawn, fps=self.fps, **self.tokenizer.origin() | {"checkpoint": self.name})


def _package(what: str) -> Any:
    """The package evatok_hf, which these files also work without. Raises ValueError where it is not installed."""
    try:
        return import_module("evatok_hf")
    except ModuleNotFoundError as error:
        if error.name != "evatok_hf":
            raise
        raise ValueError(f"{what} needs the package evatok_hf, which is not installed; install it.") from error


def _reporter(bar: Any, progress: Callable[[float], None] | None) -> Callable[[float], None]:
    """What is told the share that is done: the bar of 100, and whoever else wants to know."""

    def report(done: float) -> None:
        bar.update(int(100 * done) - bar.n)
        if progress is not None:
            progress(done)

    return report


# --- classes and seeds ------------------------------------------------------------------------------------------------


def as_list(value: Any) -> list[Any]:
    """One label or several -> a list of labels."""
    if value is None or isinstance(value, str | Integral):
        return [value]
    return value.tolist() if isinstance(value, torch.Tensor) else list(value)


def positive(name: str, value: int) -> int:
    """Raises ValueError unless a number is whole and at least 1."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{name} is {value}; give a whole number of 1 or more.")
    return int(value)


def next_seed(stream: torch.Generator | None) -> int:
    """A seed from a generator, or from torch's own."""
    device = "cpu" if stream is None else stream.device
    return int(torch.randint(2**53, (1,), generator=stream, device=device))  # JSON carries 53 bits


def draw_seeds(generator: Generators, seeds: Sequence[int] | None, classes: int, count: int) -> list[int]:
    """A seed for each of `count` clips of each class, class after class.

    From a generator they are drawn for the first clip of every class, then for the second, so that those of a clip do
    not depend on `count`.

    Raises:
        ValueError: another number of seeds or generators; both.
    """
    total = classes * count
    if seeds is not None:
        if generator is not None:
            raise ValueError("give either generator or seeds, not both.")
        seeds = [int(seed) for seed in seeds]
        if len(seeds) != total:
            raise ValueError(f"{len(seeds)} seeds for {total} videos; give one each.")
        return seeds
    if isinstance(generator, Sequence):
        if len(generator) != total:
            raise ValueError(f"{len(generator)} generators for {total} videos; give one, or one each.")
        return [next_seed(stream) for stream in generator]
    table = [[next_seed(generator) for _ in range(classes)] for _ in range(count)]
    return [row[index] for index in range(classes) for row in table]


# --- frames -----------------------------------------------------------------------------------------------------------


def check_output_type(output_type: str) -> None:
    """Raises ValueError for a kind of frames that is none of "np", "pt" and "pil"."""
    if output_type not in ("np", "pt", "pil"):
        raise ValueError(f"output_type must be 'np', 'pt' or 'pil', got {output_type!r}.")


def to_output(video: torch.Tensor, output_type: str) -> np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]:
    """(N, F, 3, H, W) in [-1, 1] -> the kind of frames that was asked for (see `EvatokPipelineOutput`)."""
    video = ((video.float().cpu() + 1) / 2).clamp(0, 1)
    if output_type == "pt":
        return video
    frames = video.permute(0, 1, 3, 4, 2).contiguous().numpy()  # (N, F, H, W, 3)
    if output_type == "np":
        return frames
    return [[PIL.Image.fromarray(frame) for frame in clip] for clip in to_uint8(frames)]


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] to the nearest of 256 levels."""
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


def stacked(video: Any) -> Any:
    """A list of arrays (H, W, 3) as one array, anything else as it is."""
    if isinstance(video, list | tuple) and video and getattr(video[0], "ndim", None) == 3:
        return torch.stack(list(video)) if isinstance(video[0], torch.Tensor) else np.stack(video)
    return video


def as_videos(frames: Any) -> list[Any]:
    """One video or several -> a list of videos. Raises ValueError for none, or something else."""
    frames = stacked(frames)
    if isinstance(frames, np.ndarray | torch.Tensor):
        videos = list(frames) if frames.ndim == 5 else [frames]
    elif isinstance(frames, list | tuple) and frames and isinstance(frames[0], PIL.Image.Image):
        videos = [frames]
    elif isinstance(frames, list | tuple):
        videos = [stacked(video) for video in frames]
    else:
        raise ValueError(f"a video cannot be a {type(frames).__name__}; give frames, such as read_video gives.")
    if not videos:
        raise ValueError("there is no video; give frames, at least one.")
    return videos
