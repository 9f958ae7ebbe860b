"""EvatokPipeline: tokenizer, router and generator together, as a pipeline of diffusers.

Generates clips of a class and continues videos. `VideoTokenizer` takes whole videos to tokens and back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import count
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedModel  # noqa: F401 - diffusers looks for the base classes of components here
from transformers.image_processing_base import ImageProcessingMixin  # noqa: F401

from .base_evatok import write_own_card
from .checkpoint_evatok import (
    check_generator,
    checkpoint_name,
    find_dtype,
    find_parts,
    loading,
    local_copy,
    pipeline_files,
    pipeline_index,
    resolve_device,
    save_checkpoint,
)
from .configuration_evatok import ClassLabel, class_names, find_class
from .generation_evatok import sample
from .modeling_evatok import EvatokModel
from .modeling_evatok_generator import EvatokForCausalLM, Prompt
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
    list_videos,
)

Generators = torch.Generator | Sequence[torch.Generator] | None
# Told of each step of drawing: the pipeline, the number of the step, the share that is drawn, and no tensors.
Callback = Callable[["EvatokPipeline", int, float, dict[str, Any]], Any]
# LARP's on UCF-101.
DEFAULT_GUIDANCE = 1.25
# Where a checkpoint is, of the arguments of `from_pretrained`.
_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "token")


@dataclass
class EvatokPipelineOutput(BaseOutput):
    """Output of the pipeline: N videos of F frames.

    Attributes:
        frames: with output_type "np" float32 (N, F, H, W, 3) in [0, 1], so that diffusers' `export_to_video` takes
            `frames[i]`; with "pt" a tensor (N, F, 3, H, W) in [0, 1] on the CPU; with "pil" N lists of F images.
        tokens: the clips that were drawn, on the CPU; of a prediction over several clips, all clips of the
            first video, then of the second.
        labels: of each video the name of its class (the number where classes have no names), or None.
        seeds: the seed of each video, None where nothing was drawn.
    """

    frames: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]
    tokens: VideoTokens
    labels: list[ClassLabel]
    seeds: list[int] | None = None


class EvatokPipeline(DiffusionPipeline):
    """Video generation and frame prediction over adaptive-length tokens.

        pipe = EvatokPipeline.from_pretrained()
        frames = pipe("deadly_corridor", num_videos_per_prompt=4, generator=torch.Generator().manual_seed(0)).frames

    Args:
        tokenizer: from clips to tokens and back.
        processor: brings frames to the tokenizer's size.
        router: chooses lengths of encoded clips; without one every block gets the middle candidate.
        generator: draws tokens; without one nothing can be drawn.

    Raises:
        ValueError: no tokenizer; a router or a generator of another tokenizer.
    """

    _optional_components = ["router", "generator"]

    def __init__(
        self,
        tokenizer: EvatokModel,
        processor: EvatokVideoProcessor,
        router: EvatokRouter | None = None,
        generator: EvatokForCausalLM | None = None,
    ):
        super().__init__()
        if tokenizer is None:
            raise ValueError("a pipeline needs its tokenizer; router and generator may be None.")
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
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None = None, **kwargs: Any) -> EvatokPipeline:
        """Loads whatever of tokenizer, router and generator a checkpoint has.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id that holds the tokenizer itself or in `tokenizer/`, and
                may hold a router in `router/` and a generator in `generator/`, or the name of a checkpoint that comes
                with the package; None takes the first of those that has a generator.
            kwargs: as for `DiffusionPipeline.from_pretrained`: `torch_dtype` or `dtype` (float32 by default; ids may
                differ between dtypes), `device_map`, `variant`, `cache_dir`, `local_files_only`, `revision`, `token`
                and components by keyword, of which `router=None` and `generator=None` leave one out.

        Raises:
            ValueError: as `VideoTokenizer.from_pretrained`; a generator that is incomplete or of another tokenizer.
        """
        if kwargs.pop("proxies", None):
            raise ValueError("huggingface_hub takes no proxies; name one in HTTPS_PROXY.")
        device = _renamed(kwargs, "device", "device_map, or .to(device) of the pipeline")
        where = None if device is None else resolve_device(device)
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or torch.float32
        if isinstance(dtype, dict):  # each part may have any, "auto", too
            named = {part: getattr(torch, str(one), one) for part, one in dtype.items() if one != "auto"}
            if wrong := [one for one in named.values() if not isinstance(one, torch.dtype)]:
                raise ValueError(f"unknown dtype {wrong[0]!r}; give torch.float16, 'bfloat16' or the like.")
            kwargs["dtype"] = dtype | named
        else:
            kwargs["dtype"] = find_dtype(dtype)
        name = _renamed(kwargs, "path_or_hub_id", "pretrained_model_name_or_path", pretrained_model_name_or_path)
        try:
            name = import_module("evatok_hf.bundled").find_checkpoint(name, "generator")
        except ModuleNotFoundError as error:
            if name is None:
                raise ValueError("the bundled checkpoint comes with the package evatok_hf; name another.") from error
        hub = {key: kwargs.pop(key) for key in _PLACE if kwargs.get(key) is not None}
        folder = local_copy(name, ("tokenizer", "router", "generator"), **hub)
        with loading("pipeline", str(name)):
            if kwargs.get("processor") is None:
                tokenizer = folder / find_parts(folder, name)["tokenizer"]
                kwargs["processor"] = EvatokVideoProcessor.from_pretrained(tokenizer)
            pipe = super().from_pretrained(str(folder), **kwargs)
        if kwargs.get("tokenizer") is None:
            pipe.tokenizer.config._name_or_path = checkpoint_name(name)
        pipe.register_to_config(_name_or_path=checkpoint_name(name))
        return pipe if where is None else pipe.to(where)

    @classmethod
    def load_config(cls, folder: str, **kwargs: Any) -> dict[str, Any]:
        """The index of the components in a folder, which need not have been saved as a pipeline."""
        parts = {"processor", *find_parts(Path(folder))}
        return pipeline_index(cls.__name__, cls.__module__, parts)

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

    def require_generator(self) -> EvatokForCausalLM:
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
        num_videos_per_prompt: int = 1,
        *,
        guidance_scale: float | None = None,
        generator: Generators = None,
        seeds: int | Sequence[int] | None = None,
        batch_size: int = 16,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        **sampling: Any,
    ) -> EvatokPipelineOutput | tuple:
        """Draws clips: `num_videos_per_prompt` of the first class, then of the second, and so on.

        A clip is a function of its class, its seed and the settings. Seeds are drawn from `generator` for the first
        clip of every class, then for the second, so that clip i of a class depends neither on the number of clips nor
        on `batch_size` (to rounding, see `sample`).

        Args:
            class_labels: names or numbers of classes, or one; None draws from the model without a class.
            num_videos_per_prompt: clips of each class.
            guidance_scale: classifier-free guidance; by default 1.25 with a class and 1, none, without.
            generator: the generator that seeds are drawn from, or one for each clip; torch's own by default.
            seeds: a seed for each clip instead, or one for one, such as the output of an earlier call names.
            batch_size: clips drawn at once.
            output_type: "np", "pt" or "pil".
            return_dict: False gives a tuple of the output's fields, the frames first.
            callback_on_step_end: called as `callback(pipe, step, share, {})` after each step, with the number of the
                step and the share of all clips that is drawn, from 0 to 1.
            sampling: options of `generation_evatok.sample`: `temperature`, `top_k`, `top_p`, `guidance_schedule`,
                `guidance_start`, `guide_lengths`, `lengths` (of each block, (T,) or (N, T), 0 where the model decides),
                `budget` and `max_block_length` (most tokens of a clip and of a block), `implementation` ("compiled"
                pays for many clips).

        Raises:
            ValueError: a pipeline without generator, an unknown class, guidance without classes, a number of seeds that
                is not the number of clips, options out of range.
        """
        model = self.require_generator()
        check_output_type(output_type)
        num_videos_per_prompt = _renamed(sampling, "num_videos", "num_videos_per_prompt", num_videos_per_prompt)
        number = positive("num_videos_per_prompt", num_videos_per_prompt)
        asked = _as_list(class_labels)
        if not asked:
            raise ValueError("class_labels is an empty list; name a class, or give None for no class.")
        labels = [find_class(model.config, name) for name in asked for _ in range(number)]
        if guidance_scale is None:
            guidance_scale = 1.0 if None in labels else DEFAULT_GUIDANCE
        drawn = draw_seeds(generator, seeds, len(asked), number)
        prompts = [Prompt(label) for label in labels]
        with self._reporter(callback_on_step_end, sampling) as report:
            tokens = self._draw(prompts, drawn, batch_size, report, guidance_scale=guidance_scale, **sampling)
        return self._output(self.tokenizer.decode(tokens), tokens, labels, drawn, output_type, return_dict)

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
        guidance_scale: float = 1.0,
        generator: Generators = None,
        seeds: int | Sequence[int] | None = None,
        batch_size: int = 16,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        **sampling: Any,
    ) -> EvatokPipelineOutput | tuple:
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
                `fade_from_known`). It hedges: 0 moves more and is further from the truth. What stands still keeps the
                known frame in any case (see `keep_still`), but for None, which shows what the tokenizer decodes and
                nothing else.
            guidance_scale, generator, seeds, batch_size, output_type, return_dict, callback_on_step_end, sampling: as
                for generation, a seed a video; without guidance by default.

        Returns:
            N videos of `num_frames` frames that begin with the known ones; longer predictions of the same seeds begin
            with shorter ones.

        Raises:
            ValueError: no frames, frames that are no video, numbers of frames or a share out of range, and as
                generation.
        """
        model = self.require_generator()
        check_output_type(output_type)
        if known not in ("input", "decoded"):
            raise ValueError(f"known must be 'input' or 'decoded', got {known!r}.")
        if hold is not None:
            check_hold(hold)
        size = self.tokenizer.config.num_frames
        seen = model.config.known_frames if known_frames is None else known_frames
        check_known_frames(seen, size)
        given = [self._preprocess(video, seen) for video in list_videos(frames)]
        total = positive("num_frames", num_frames)
        longest = max(map(len, given))
        if total <= longest:
            raise ValueError(
                f"num_frames is {total}, which counts the {longest} known frames, too; give at least {longest + 1}."
            )
        asked = _as_list(class_labels)
        if len(asked) not in (1, len(given)):
            raise ValueError(f"{len(given)} videos but {len(asked)} class_labels; give one for all, or one each.")
        labels = [find_class(model.config, name) for name in asked * (len(given) // len(asked))]
        drawn = draw_seeds(generator, seeds, 1, len(given))
        streams = [torch.Generator().manual_seed(seed) for seed in drawn]
        filled = [seen - len(video) for video in given]
        videos = torch.stack(
            [torch.cat([video[:1].expand(fill, -1, -1, -1), video]) for video, fill in zip(given, filled, strict=True)]
        ).to(self.tokenizer.device)  # (N, seen, 3, H, W)
        last = videos[:, -1]
        rounds = math.ceil((max(filled) + total - seen) / (size - seen))
        sampling["known_blocks"] = seen // self.tokenizer.config.frames_per_block
        parts = []
        with self._reporter(callback_on_step_end, sampling) as report:
            for turn in range(rounds):
                recent = videos[:, -seen:]
                tokens = self._draw(
                    self._conditions(recent, labels),
                    [next_seed(stream) for stream in streams],
                    batch_size,
                    lambda done, turn=turn: report((turn + done) / rounds),
                    guidance_scale=guidance_scale,
                    **sampling,
                )
                decoded = self.tokenizer.decode(tokens).float()
                new = decoded if hold is None else keep_still(decoded, recent[:, -1], seen - 1)
                if turn == 0 and known == "decoded":
                    videos = decoded[:, :seen]
                videos = torch.cat([videos, new[:, seen:]], dim=1)
                parts.append(tokens)
        if hold:  # only in what is shown: what goes on from it again and again would come to a standstill
            videos = torch.cat([videos[:, :seen], fade_from_known(videos[:, seen:], last, hold)], dim=1)
        shown = torch.stack([video[fill : fill + total] for video, fill in zip(videos, filled, strict=True)])
        clips = [part.clip(index) for index in range(len(given)) for part in parts]
        return self._output(shown, VideoTokens.concatenate(clips), labels, drawn, output_type, return_dict)

    # --- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _reporter(self, callback: Callback | None, options: dict[str, Any]) -> Iterator[Callable[[float], None]]:
        """A function that is told the share that is drawn, and tells the bar and the callback."""
        steps, progress = count(), _renamed(options, "progress", "callback_on_step_end")
        with self.progress_bar(total=100) as bar:

            def report(done: float) -> None:
                bar.update(int(100 * done) - bar.n)
                if progress is not None:
                    progress(done)
                if callback is not None:
                    callback(self, next(steps), done, {})

            yield report

    def _output(
        self,
        video: torch.Tensor,
        tokens: VideoTokens,
        labels: Sequence[int | None],
        seeds: list[int],
        output_type: str,
        return_dict: bool,
    ) -> EvatokPipelineOutput | tuple:
        """Videos (N, F, 3, H, W) in [-1, 1] and what they were drawn with, as a call gives them."""
        frames = to_output(video, output_type)
        names = self.generator.config.class_names
        told = [names[label] if names and label is not None else label for label in labels]
        output = EvatokPipelineOutput(frames, tokens, told, seeds)
        return output if return_dict else output.to_tuple()

    def _preprocess(self, video: Any, most: int) -> torch.Tensor:
        """The last `most` frames of a video, (f, 3, H, W) in [-1, 1] at the tokenizer's size."""
        batch = self.processor(frames_tensor(video)[-most:], do_sample_frames=False, input_data_format="channels_first")
        return batch["pixel_values_videos"][0]

    def _conditions(self, recent: torch.Tensor, labels: Sequence[int | None]) -> list[Prompt]:
        clips = held_clip(recent, self.tokenizer.config.num_frames)
        lengths = None if self.router is None else self.router.assign(clips)
        tokens = self.tokenizer.encode(clips, lengths, return_dict=True)
        ids = tokens.ids.cpu().split(tokens.lengths.sum(-1).tolist())
        return [Prompt(*row) for row in zip(labels, tokens.lengths.cpu(), ids, strict=True)]

    def _draw(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        batch_size: int,
        progress: Callable[[float], None],
        **options: Any,
    ) -> VideoTokens:
        """Tokens of all prompts; `progress` is told the share that is done."""
        size = positive("batch_size", batch_size)
        drawn = sample(self.generator, prompts, seeds, batch_size=size, progress=progress, **options)
        return replace(drawn, fps=self.fps, **self.tokenizer.origin() | {"checkpoint": self.name})


def _renamed(options: dict[str, Any], old: str, new: str, value: Any = None) -> Any:
    """The value of an argument by its old name, taken out of `options`; `value` where that was not given."""
    if old not in options:
        return value
    warnings.warn(f"{old} goes with the next release; use {new}.", FutureWarning, stacklevel=3)
    return options.pop(old)


# --- classes and seeds ------------------------------------------------------------------------------------------------


def _as_list(value: Any) -> list[Any]:
    """One label or seed, or several -> a list of them, without tensors and arrays."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Iterable):
        return [value]
    return [one.tolist() if hasattr(one, "tolist") else one for one in value]


def positive(name: str, value: int) -> int:
    """Raises ValueError unless a number is whole and at least 1."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{name} is {value}; give a whole number of 1 or more.")
    return int(value)


def next_seed(stream: torch.Generator | None) -> int:
    """A seed from a generator, or from torch's own."""
    device = "cpu" if stream is None else stream.device
    return int(torch.randint(2**53, (1,), generator=stream, device=device))  # JSON carries 53 bits


def draw_seeds(generator: Generators, seeds: int | Sequence[int] | None, classes: int, count: int) -> list[int]:
    """A seed for each of `count` clips of each class, class after class.

    From a generator they are drawn for the first clip of every class, then for the second, so that those of a clip do
    not depend on `count`.

    Raises:
        ValueError: another number of seeds or generators, what is neither, or both.
    """
    total = classes * count
    if seeds is not None:
        if generator is not None:
            raise ValueError("give either generator or seeds, not both.")
        seeds = _as_list(seeds)
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= seed < 2**64:
                raise ValueError(f"{seed!r} is no seed; give whole numbers, a seed for each video.")
        if len(seeds) != total:
            raise ValueError(f"{len(seeds)} seeds for {total} videos; give one each.")
        return seeds
    for stream in generator if isinstance(generator, Sequence) else [generator]:
        if not isinstance(stream, torch.Generator | None):
            raise ValueError(f"a generator is a torch.Generator, not a {type(stream).__name__}; or give seeds.")
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
    return VideoProcessor().postprocess_video(video.float().cpu().transpose(1, 2), output_type)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] to the nearest of 256 levels."""
    return (frames * 255).round().clip(0, 255).astype(np.uint8)
