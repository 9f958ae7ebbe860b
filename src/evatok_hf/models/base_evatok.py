"""The base of every model of clips in this package: strict loading, checked input, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file
from transformers.utils.generic import ModelOutput

from .files_evatok import MISFITS, Rule, adding_to, checked, read_json, ruled, table_of

# What says where a checkpoint is, of the arguments of `from_pretrained`.
PLACE = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
_FILE = Rule("the name of a file beside it", lambda name: isinstance(name, str) and os.path.basename(name) == name)
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@checked
@dataclass
class _Index:
    weight_map: dict = ruled(table_of(_FILE))


def read_index(path: str | os.PathLike) -> dict[str, str]:
    """Name of a tensor -> its file, by the index of weights in several files. Raises ValueError for a damaged one."""
    return read_json(path, _Index)["weight_map"]


def check_weights(name: str | os.PathLike, expected: Mapping[str, torch.Size], options: Mapping[str, Any]) -> None:
    """Compares the headers of a checkpoint's files with the names and shapes that its configuration asks for;
    `options` are the arguments of `from_pretrained`.

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
    if missing := set(expected) - set(found):
        raise ValueError(f"{name} lacks tensors: {_named(missing)}; get a complete copy.")


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

    _fingerprint: str | None = None
    _is_part = False  # whether its weights are some of a checkpoint's

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, strict: bool = True, output_loading_info: bool = False, **kwargs
    ):
        """Loads a model as transformers does, but refuses a checkpoint that lacks a tensor or has one too many.

        Args:
            strict: False goes on as transformers does, with new weights in place of those that are missing, and with
                `ignore_mismatched_sizes=True` of those of another shape: for training with another head.

        Raises:
            ValueError: naming the tensors. Also for a damaged file, and for weights that are no safetensors.
        """
        name, kwargs = pretrained_model_name_or_path, {**kwargs, "use_safetensors": True}
        from_files = name is not None and kwargs.get("state_dict") is None
        if strict and from_files:
            cls._check_weights(name, kwargs)
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except MISFITS as error:  # what transformers makes of a value that it does not check
            if isinstance(error, ValueError):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"the configuration in {name} is damaged ({reason}); get a complete copy.") from error
        for problem, keys in (("lacks", info["missing_keys"]), ("has unknown", info["unexpected_keys"])):
            if strict and keys:
                raise ValueError(
                    f"{name} {problem} tensors: {_named(keys)}; get a complete copy, made by this version of "
                    f"{cls.__name__}."
                )
        if from_files and kwargs.get("quantization_config") is None and not any(info.values()):
            # Checkpoints of earlier versions do not say theirs.
            model._fingerprint = model.config.fingerprint or fingerprint_of_files(_weight_files(name, kwargs))
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Writes a model as transformers does, but files appear only when all are complete, with the modes that new
        files have, and the configuration says the fingerprint of the weights.

        Raises:
            ValueError: a folder that cannot be written to.
        """
        folder = Path(save_directory)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        if self._fingerprint is None or not self._is_part:
            weights = kwargs.get("state_dict") or {}
            self._fingerprint = fingerprint_of(
                (name, weights.get(name, p.detach())) for name, p in sorted(self.named_parameters())
            )
        self.config.fingerprint = self._fingerprint
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
            known = (*PLACE, *cls.config_class.__dataclass_fields__)
            given = {key: options[key] for key in known if options.get(key) is not None}
            config = cls.config_class.from_pretrained(name if config is None else config, **given)
        if getattr(config, "quantization_config", None) is not None:
            return
        with torch.device("meta"):
            model = cls(config)
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        for tied in model.all_tied_weights_keys or {}:
            shapes.pop(tied, None)
        check_weights(name, shapes, options)

    def fingerprint(self) -> str | None:
        """Hash of the weights as they were last loaded or saved, 16 hex digits, whatever dtype they have here.

        It is worked out by `save_pretrained`, which writes it into the configuration. A model that was never saved has
        none, and so has one from the moment on that it is put into training mode (`train()`) or given other weights
        (`load_state_dict`), until it is saved. Weights that are changed in place in evaluation mode are not noticed
        before that.
        """
        return self._fingerprint

    def train(self, mode: bool = True):
        if mode:
            self._fingerprint = None
        return super().train(mode)

    def load_state_dict(self, *args, **kwargs):
        self._fingerprint = None
        return super().load_state_dict(*args, **kwargs)


def fingerprint_of(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of tensors by name, in the order that they come in, each as bfloat16; 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        for part in _parts(tensor):
            digest.update(name.encode())
            digest.update(part.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_of_files(paths: Iterable[str]) -> str:
    """`fingerprint_of` all tensors in safetensors files, by name."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        return fingerprint_of((name, where[name].get_tensor(name)) for name in sorted(where))


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor, or those that a quantized one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def _named(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return f"{', '.join(keys[:3])} ({len(keys)} in all)"


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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            self._draw(module.weight, self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @staticmethod
    def _draw(weight: torch.Tensor, std: float) -> None:
        init.trunc_normal_(weight, mean=0.0, std=std, a=-2 * std, b=2 * std)

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _exact(self, exact: bool | None) -> bool:
        return self.device.type == "cpu" if exact is None else exact
