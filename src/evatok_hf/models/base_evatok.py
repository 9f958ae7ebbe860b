"""What every model of clips in this package has: strict loading, checked input, and a fingerprint of its weights.

A model that leaves weights in the files of its checkpoint (`AbsentWeights`) has the fingerprint of the whole.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from .files_evatok import MISFITS, Rule, adding_to, checked, read_json, ruled, table_of

# What says where a checkpoint is, of the arguments of `from_pretrained`.
PLACE = ("subfolder", "revision", "token", "cache_dir", "local_files_only")


_FILE = Rule("the name of a file beside it", lambda name: isinstance(name, str) and os.path.basename(name) == name)


@checked
@dataclass
class _Index:
    weight_map: dict = ruled(table_of(_FILE))


def read_index(path: str | os.PathLike) -> dict[str, str]:
    """Name of a tensor -> its file, by the index of weights in several files. Raises ValueError for a damaged one."""
    return read_json(path, _Index)["weight_map"]


def check_weights(name: str | os.PathLike, expected: Mapping[str, torch.Size], options: Mapping[str, Any]) -> None:
    """Compares the headers of a checkpoint's files with the tensors that its configuration asks for.

    Args:
        name: folder or Hub id.
        expected: name of a tensor -> its shape.
        options: the arguments of `from_pretrained`.

    Raises:
        ValueError: a damaged file, a tensor of another shape or one that is missing; weights that are a pickle.
        OSError: no weights.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for path in _weight_files(name, options):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {key: (path, file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); get a complete copy.") from error
    for key, shape in expected.items():
        if key in found and list(shape) != found[key][1]:
            raise ValueError(
                f"{found[key][0]} does not fit its config.json: {key} has the shape {tuple(found[key][1])} where "
                f"{tuple(shape)} is asked for; get a complete copy."
            )
    if missing := sorted(set(expected) - set(found)):
        named = ", ".join(missing[:3])
        raise ValueError(f"{name} lacks tensors: {named} ({len(missing)} in all); get a complete copy.")


@dataclass(frozen=True)
class AbsentWeights:
    """Tensors of a checkpoint that a model was loaded without.

    Attributes:
        files: name of a tensor -> the file that has it.
        states: file -> its size in bytes and time of change in ns when the model was loaded.
    """

    files: dict[str, str] = field(default_factory=dict)
    states: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def find(
        cls, name: str | os.PathLike, prefix: str, expected: Iterable[str], options: Mapping[str, Any]
    ) -> AbsentWeights:
        """The tensors whose names begin with `prefix`. Only the headers of the files are read.

        Args:
            name: folder or Hub id.
            prefix: of the part that was left out.
            expected: names that the part has.
            options: the arguments of `from_pretrained`.

        Raises:
            ValueError: tensors that are missing or too many; a checkpoint that is not in safetensors.
        """
        files = {}
        for path in _weight_files(name, options):
            with safe_open(path, framework="pt") as file:
                files |= {key: path for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        for problem, keys in (("lacks", set(expected) - set(files)), ("has unknown", set(files) - set(expected))):
            if keys:
                named = ", ".join(sorted(keys)[:3])
                raise ValueError(f"{name} {problem} tensors: {named} ({len(keys)} in all); get a complete copy.")
        return cls(files, {path: _state(path) for path in set(files.values())})

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """A function from a name to its tensor, on the CPU, while the context lasts.

        Raises:
            ValueError: files that are no longer what they were.
        """
        with ExitStack() as stack:
            handles = {}
            for path, state in self.states.items():
                try:
                    same = _state(path) == state
                    handles[path] = stack.enter_context(safe_open(path, framework="pt")) if same else None
                except OSError:
                    handles[path] = None
                if handles[path] is None:
                    raise ValueError(f"{path} has changed since a part of it was loaded; load the model again.")
            yield lambda name: handles[self.files[name]].get_tensor(name)


def _state(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _weight_files(name: str | os.PathLike, options: Mapping[str, Any]) -> list[str]:
    """Paths of the safetensors files of a checkpoint that has just been loaded."""
    place = {key: options[key] for key in PLACE if options.get(key) is not None}
    variant = options.get("variant")

    def find(file: str) -> str | None:
        if variant is not None:
            stem, end = file.split(".", 1)
            file = f"{stem}.{variant}.{end}"
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **place)

    if whole := find(SAFE_WEIGHTS_NAME):
        return [whole]
    if index := find(SAFE_WEIGHTS_INDEX_NAME):
        shards = set(read_index(index).values())
        return [cached_file(name, shard, **place) for shard in sorted(shards)]
    for pickled in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if find(pickled):
            raise ValueError(f"{name} has its weights in a pickle, {pickled}, which may run code; get safetensors.")
    raise FileNotFoundError(f"{name} has no {SAFE_WEIGHTS_NAME}")


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_own_card(folder: str | os.PathLike, repo_id: str) -> None:
    """Puts this package's card over the general one that transformers or diffusers wrote into a folder to be pushed.

    Any other card stays, and so does the general one where the package is not installed: this module also lies beside
    weights.
    """
    path = Path(folder) / "README.md"
    if not path.is_file() or "has been automatically generated" not in path.read_text(encoding="utf-8"):
        return
    try:
        card = import_module("evatok_hf.hub.card").card_of_folder(repo_id, Path(folder))
    except ModuleNotFoundError as error:
        if error.name != "evatok_hf":
            raise
        return
    path.write_text(card, encoding="utf-8")


class OwnCard:
    """Mixin of what transformers can push: the card says what it is, and how it loads without the package."""

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):  # the last step of `push_to_hub`
        write_own_card(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class CheckedWeights(OwnCard):
    """Mixin of a `PreTrainedModel`: strict loading, a fingerprint of the weights, and a card of its own on the Hub."""

    _fingerprint: tuple[tuple, str] | None = None
    _absent = AbsentWeights()  # what this model of a checkpoint was loaded without

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As transformers' method, but a checkpoint that lacks a tensor or has one too many is refused.

        Raises:
            ValueError: naming the tensors; transformers would go on with random numbers in their place. Also for a
                damaged file, and for weights that are no safetensors.
        """
        name, kwargs = pretrained_model_name_or_path, {**kwargs, "use_safetensors": True}
        if name is not None and kwargs.get("state_dict") is None:
            cls._check_weights(name, kwargs)
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except MISFITS as error:  # what transformers makes of a value that it does not check
            if isinstance(error, ValueError):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"the configuration in {name} is damaged ({reason}); get a complete copy.") from error
        for problem, keys in (("lacks", info["missing_keys"]), ("has unknown", info["unexpected_keys"])):
            if keys:
                named = ", ".join(sorted(keys)[:3])
                raise ValueError(
                    f"{pretrained_model_name_or_path} {problem} tensors: {named} ({len(keys)} in all); "
                    f"get a complete copy, made by this version of {cls.__name__}."
                )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As transformers' method, but files appear only when all are complete, with the modes that new files have.

        Raises:
            ValueError: a folder that cannot be written to.
        """
        folder = Path(save_directory)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        with adding_to(folder) as partial:
            super().save_pretrained(partial, *args, **kwargs)
            written = {path.name for path in partial.iterdir()}
        # Weights in other shards, of an earlier model, would be loaded in place of these.
        for path in folder.iterdir() if any(map(_WEIGHTS.fullmatch, written)) else ():
            if _WEIGHTS.fullmatch(path.name) and path.name not in written:
                path.unlink()

    @classmethod
    def _check_weights(cls, name: str | os.PathLike, options: dict[str, Any]) -> None:
        """Before any memory is taken; transformers looks when it has made what the configuration asks for."""
        config = options.get("config")
        if not isinstance(config, PretrainedConfig):
            place = {key: options[key] for key in PLACE if options.get(key) is not None}
            config = cls.config_class.from_pretrained(name if config is None else config, **place)
        if getattr(config, "quantization_config", None) is not None:
            return
        with torch.device("meta"):
            part = {key: options[key] for key in ("decoder",) if key in options}
            model = cls(config, **part)
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        for tied in model.all_tied_weights_keys or {}:
            shapes.pop(tied, None)
        check_weights(name, shapes, options)

    def fingerprint(self) -> str:
        """Hash of the weights, 16 hex digits, the same for a checkpoint loaded as float32 or bfloat16, and for one that
        was loaded in part, whose other weights are then read from its files.

        Raises:
            ValueError: a model loaded in part whose files have changed since.
        """
        # Hashing takes up to a second, so it is done anew only when the weights have changed. A fused optimiser changes
        # them without counting versions, but not without changing first elements.
        parts = [(name, part) for name, p in sorted(self.named_parameters()) for part in _parts(p.detach())]
        version = sum(0 if part.is_inference() else part._version for _, part in parts)
        firsts = torch.stack([part.flatten()[0].float().to(self.device) for _, part in parts])
        key = (version, *firsts.tolist())
        if self._fingerprint is None or self._fingerprint[0] != key:
            digest = hashlib.sha256()
            present = dict(self.named_parameters())
            with self._absent.opened() as read:
                for name in sorted([*present, *self._absent.files]):
                    for part in _parts(present[name].detach() if name in present else read(name)):
                        digest.update(name.encode())
                        weights = part.to("cpu", torch.bfloat16).contiguous()
                        digest.update(weights.view(torch.int16).numpy().tobytes())
            self._fingerprint = (key, digest.hexdigest()[:16])
        return self._fingerprint[1]


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor, or those that a quantized one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


class EvatokBaseModel(CheckedWeights, PreTrainedModel):
    """A model whose input is `pixel_values_videos` (B, F, C, H, W); its configuration is a `ClipGeometry`."""

    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)

    def check_video(self, video: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        """The video (B, F, C, H, W) as the model takes it; F is `num_frames`, by default those of a clip.

        Raises:
            ValueError: another shape, or integers.
        """
        c = self.config
        expected = (num_frames or c.num_frames, c.num_channels, c.image_size, c.image_size)
        if not isinstance(video, torch.Tensor):
            raise ValueError(
                f"pixel_values_videos must be a float tensor, got {type(video).__name__}; use the processor."
            )
        if video.ndim != 5 or tuple(video.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values_videos must have shape (clips, {', '.join(map(str, expected))}), got "
                f"{tuple(video.shape)}; EvatokVideoProcessor makes such clips."
            )
        if not video.is_floating_point():
            raise ValueError(f"pixel_values_videos must be floats in [-1, 1], got {video.dtype}; use the processor.")
        return video.to(self.device, self.dtype)
