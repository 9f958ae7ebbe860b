"""From a folder or a Hub id to the models in it.

A checkpoint holds the tokenizer (its model and its video processor) in `tokenizer/` or by itself, and may hold a router
in `router/`.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from .configuration_evatok import EvatokConfig, EvatokRouterConfig
from .modeling_evatok import EvatokModel
from .modeling_evatok_router import EvatokRouter
from .video_processing_evatok import EvatokVideoProcessor

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_checkpoint(
    name: str, device: torch.device, dtype: torch.dtype, revision: str | None = None, token: str | bool | None = None
) -> tuple[EvatokModel, EvatokVideoProcessor, EvatokRouter | None]:
    """Tokenizer, processor, and the router where there is one.

    Raises:
        ValueError: a folder or repository that is missing, not reachable, or holds no complete tokenizer, or an
            incomplete router.
    """
    folder = Path(name).expanduser().absolute()
    if folder.is_dir():
        name = str(folder)
    hub = {"revision": revision, "token": token}
    subfolder = _find_tokenizer(name, **hub)
    with_router = _has_router(name, **hub)
    part, router = "tokenizer", None
    try:
        model = EvatokModel.from_pretrained(name, subfolder=subfolder, dtype=dtype, **hub)
        processor = EvatokVideoProcessor.from_pretrained(name, subfolder=subfolder, **hub)
        if with_router:
            part = "router"
            router = EvatokRouter.from_pretrained(name, subfolder="router", dtype=dtype, **hub).to(device)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the {part} in {name} does not load ({_one_line(error)}); get a complete copy.") from error
    # what messages and token files call it: the checkpoint, not the folder "tokenizer" in it
    model.config._name_or_path = str(folder.parent) if folder.is_dir() and folder.name == "tokenizer" else name
    return model.to(device), processor, router


def save_checkpoint(
    folder: str | Path, model: EvatokModel, processor: EvatokVideoProcessor, router: EvatokRouter | None
) -> None:
    """Writes what `load_checkpoint` reads; each file appears only when it is complete.

    Raises:
        ValueError: a folder that cannot be written to, or that already has a router where none is to be written.
    """
    folder = Path(folder).expanduser()
    if router is None and (folder / "router" / "config.json").exists():
        raise ValueError(f"{folder} has a router of another checkpoint; choose another folder, or remove router/.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            model.save_pretrained(Path(partial) / "tokenizer")
            processor.save_pretrained(Path(partial) / "tokenizer")
            if router is not None:
                router.save_pretrained(Path(partial) / "router")
            for path in sorted(Path(partial).rglob("*")):
                target = folder / path.relative_to(partial)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    os.replace(path, target)
    except OSError as error:
        raise ValueError(f"cannot write {folder} ({error.strerror or error}); choose another place.") from error


def resolve_device(name: str) -> torch.device:
    """The device of that name, "auto" being a GPU with CUDA if there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:0 .., or mps.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device {name} is not available, PyTorch finds {count} CUDA GPUs; choose cpu or auto.")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device mps is not available on this machine; choose cpu or auto.")
    elif device.type != "cpu":
        raise ValueError(f"device {name!r} is not supported; choose auto, cpu, cuda, cuda:0 .., or mps.")
    return device


def _find_tokenizer(name: str, revision: str | None, token: str | bool | None) -> str:
    """The subfolder, "" or "tokenizer", of a folder or Hub repository in which the tokenizer is."""
    folder = Path(name).expanduser()
    local = folder.exists()
    if not local and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise ValueError(f"there is no folder {name}; give a folder, or a Hub id owner/name.")
    found = None
    for subfolder in ("", "tokenizer"):
        if local:
            path = folder / subfolder / "config.json"
        else:
            path = _from_hub(name, subfolder, revision, token)
        if path is None or not path.is_file():
            continue
        found = _model_type(path)
        if found == EvatokConfig.model_type:
            return subfolder
    what = "no config.json" if found is None else f"a model of type {found!r}"
    raise ValueError(f"{name} holds {what}, not an EVATok tokenizer; name a checkpoint or its tokenizer/ folder.")


def _has_router(name: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether a folder or Hub repository in which a tokenizer was found has a router, too."""
    if Path(name).is_dir():
        path = Path(name) / "router" / "config.json"
    else:
        try:
            path = _from_hub(name, "router", revision, token)
        except _Unreachable:  # the tokenizer came from the cache, which has no router
            logger.warning("the Hub is not reachable to look whether %s has a router; going on without one", name)
            return False
    if path is None or not path.is_file():
        return False
    found = _model_type(path)
    if found != EvatokRouterConfig.model_type:
        raise ValueError(f"router/ in {name} holds a model of type {found!r}, not an EVATok router; get another copy.")
    return True


def _model_type(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no readable configuration ({_one_line(error)}); get a complete copy.") from error


class _Unreachable(ValueError):
    """The Hub does not answer, and the cache has no such file."""


def _from_hub(name: str, subfolder: str, revision: str | None, token: str | bool | None) -> Path | None:
    """The configuration in that subfolder of a repository, None if it has none."""
    try:
        return Path(hf_hub_download(name, "config.json", subfolder=subfolder or None, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        raise _Unreachable(
            f"there is no folder {name}, and the Hub is not reachable to look for it there; check the name and the "
            "network."
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"there is no folder {name}, and no such repository could be read from the Hub ({_one_line(error)}); check "
            "the name, the revision and, for a private one, the token."
        ) from error


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
