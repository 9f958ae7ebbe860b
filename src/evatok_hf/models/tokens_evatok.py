"""`VideoTokens`: what a video is between `encode` and `decode`, and its safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import ModelOutput

from .files_evatok import MISFITS, Replacement, check, checked, number, optional, readable, ruled, text, whole

_FORMAT = "evatok-tokens-1"


@checked
@dataclass
class _Metadata:
    """The metadata of a token file, beside its tensors."""

    fps: int | float | None = ruled(optional(number(0, 1_000_000, above=True)), None)
    height: int | None = ruled(optional(whole(1, 1 << 16)), None)
    width: int | None = ruled(optional(whole(1, 1 << 16)), None)
    num_frames: int | None = ruled(optional(whole(0, 1 << 40)), None)
    checkpoint: str | None = ruled(optional(text()), None)
    fingerprint: str | None = ruled(optional(text(128)), None)
    overlap: int = ruled(whole(0, 1 << 16), 0)


@dataclass
class VideoTokens(ModelOutput):
    """The discrete tokens of one or more clips, packed without padding: what `encode` returns and `decode` takes.

    A `ModelOutput`, but that its length is the number of clips; as there, a mapping of all fields may stand in place of
    the first. `save` and `load` are its file; `torch.save` and, after the import of this class, `torch.load` take it,
    too.

    Attributes:
        ids: (N,) int64, clip after clip, block after block; `N == lengths.sum()`.
        lengths: (B, T) int64, tokens of each block.
        fps: frames per second of the encoded frames, None when unknown.
        height, width: size of the decoded frames, pixels.
        num_frames: true number of frames of all clips together; less than the clips hold when the last one was padded.
            None means that nothing was padded.
        checkpoint: name of the tokenizer that made the ids, for messages.
        fingerprint: fingerprint of that tokenizer's weights; decoding with other weights is refused.
        overlap: frames that every clip but the first has in common with the end of the one before.

    Raises:
        ValueError: ids and lengths that do not fit together, or an overlap that is no number of frames.
    """

    ids: torch.Tensor
    lengths: torch.Tensor | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    checkpoint: str | None = None
    fingerprint: str | None = None
    overlap: int = 0

    def __post_init__(self):
        if isinstance(self.ids, Mapping):
            if any(getattr(self, field.name) != field.default for field in fields(self)[1:]):
                raise ValueError("a mapping stands for all fields of the tokens; give no others beside it.")
            return self.__init__(**self.ids)
        for name, value, ndim in (("ids", self.ids, 1), ("lengths", self.lengths, 2)):
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{name} must be a tensor of {ndim}-D integers, got {type(value).__name__}.")
            if value.ndim != ndim or value.is_floating_point() or value.dtype == torch.bool:
                raise ValueError(f"{name} must be {ndim}-D integers, got {value.dtype} of shape {tuple(value.shape)}.")
        if not isinstance(self.overlap, int) or self.overlap < 0:
            raise ValueError(f"overlap must be a number of frames, 0 or more, got {self.overlap!r}.")
        self.ids = self.ids.to(torch.int64)
        self.lengths = self.lengths.to(torch.int64)
        if (self.lengths < 0).any() or int(self.lengths.sum()) != self.ids.numel():
            raise ValueError(
                f"lengths announce {int(self.lengths.sum())} tokens but there are {self.ids.numel()} ids; "
                "the tokens are incomplete or mixed up."
            )

    def __len__(self) -> int:
        """Number of clips."""
        return self.lengths.shape[0]

    def __reduce__(self):
        # The fields alone, which torch.load can make an object of by its safe way.
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    def clip(self, index: int) -> VideoTokens:
        """The tokens of one clip (B = 1). Its frame count is not known to be padded, so `num_frames` is None."""
        counts = self.lengths.sum(-1)
        start = int(counts[:index].sum())
        ids = self.ids[start : start + int(counts[index])]
        return replace(self, ids=ids, lengths=self.lengths[index : index + 1], num_frames=None)

    @classmethod
    def concatenate(cls, parts: list[VideoTokens], num_frames: int | None = None) -> VideoTokens:
        """Joins the clips of several `VideoTokens` of one checkpoint, in order.

        Raises:
            ValueError: nothing to join, what is no tokens, or parts of different checkpoints, numbers of blocks or
                overlaps.
        """
        parts = list(parts)
        for part in parts:
            check_is_tokens(part)
        if not parts:
            raise ValueError("there are no tokens to concatenate.")
        if len({part.fingerprint for part in parts}) > 1:
            raise ValueError("tokens of different checkpoints cannot be concatenated.")
        if len({part.lengths.shape[1] for part in parts}) > 1:
            raise ValueError("tokens of different numbers of temporal blocks cannot be concatenated.")
        if len({part.overlap for part in parts}) > 1:
            raise ValueError("tokens of clips with different overlaps cannot be concatenated.")
        ids = torch.cat([part.ids for part in parts])
        lengths = torch.cat([part.lengths for part in parts])
        return replace(parts[0], ids=ids, lengths=lengths, num_frames=num_frames)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file; the target appears only when it is complete. "-" is standard output.

        Raises:
            ValueError: the folder is missing or not writable.
        """
        told = [field.name for field in fields(_Metadata) if field.name != "overlap" or self.overlap]
        metadata = {name: json.dumps(getattr(self, name)) for name in told}
        tensors = {"ids": self.ids.to("cpu", torch.int32), "lengths": self.lengths.to("cpu", torch.int32)}
        metadata["checksum"] = _checksum(tensors, metadata)
        with Replacement(path) as partial:
            try:
                save_file(tensors, partial, metadata={"format": _FORMAT, **metadata})
            except SafetensorError as error:
                raise ValueError(f"cannot write {path}: {error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> VideoTokens:
        """Reads what `save` wrote, also from a pipe; "-" is standard input.

        Raises:
            ValueError: the file is missing, no safetensors, damaged, or holds something else.
        """
        try:
            with readable(path) as regular, safe_open(regular, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no video tokens; make such a file with `evatok encode`.")
                tensors = {name: file.get_tensor(name) for name in ("ids", "lengths")}
        except FileNotFoundError as error:
            raise ValueError(f"there is no file {path}.") from error
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable token file ({error}); encode the video again.") from error
        metadata.pop("format")
        said = metadata.pop("checksum", None)
        try:
            if said is not None and said != _checksum(tensors, metadata):  # files of before have none
                raise ValueError("its checksum is another: it was changed on the way")
            if unknown := sorted(set(metadata) - {field.name for field in fields(_Metadata)}):
                raise ValueError(f"{unknown[0][:80]} is no field of video tokens")
            values = check(_Metadata, {name: json.loads(value) for name, value in metadata.items()})
            return cls(**tensors, **vars(values))
        except MISFITS as error:
            raise ValueError(f"{path} is not a readable token file ({error}); encode the video again.") from error


def check_is_tokens(value: Any) -> None:
    """Raises ValueError for what is no `VideoTokens`."""
    if not hasattr(value, "fingerprint"):  # not by the class, of which the code beside weights has one of its own
        raise ValueError(
            f"a {type(value).__name__} is no VideoTokens; make them of ids (N,) and lengths (B, T) by "
            "VideoTokens(ids=.., lengths=..), or of a file by VideoTokens.load(path)."
        )


torch.serialization.add_safe_globals([VideoTokens])


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
