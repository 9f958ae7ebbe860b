"""Checkpoints of the training scripts, exact to resume from, and their results: written whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, patch_environment
from safetensors import safe_open

from evatok_hf.data.streaming import ClipStream
from evatok_hf.models.checkpoint_evatok import one_line
from evatok_hf.models.files_evatok import (
    MISFITS,
    check,
    checked,
    number,
    read_json,
    remove_left_over,
    replacing_folder,
    ruled,
    whole,
)
from training.common.checkpoint_files import check_files, write_checksums

logger = logging.getLogger(__name__)


@checked
@dataclass
class Progress:
    """Step and seconds, kept in the checkpoint."""

    step: int = ruled(whole(0, 1 << 40))
    seconds: int | float = ruled(number(0, 1e12))

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(vars(check(Progress, state)))


def earlier_run(init_from: str | None) -> dict | None:
    """The content of the `training.json` beside the weights that a run starts from; None where there is none.

    Raises:
        ValueError: a damaged one.
    """
    if init_from is None or not (path := Path(init_from) / "training.json").is_file():
        return None
    return read_json(path)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, keep: int, stream: ClipStream | None = None
) -> Path:
    """Writes checkpoint-N, which is there when all of it is, then removes the oldest."""
    target = output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        remove_left_over(output_dir)  # of steps that a resumed run does not come to again
    with replacing_folder(target) if accelerator.is_main_process else nullcontext() as folder:
        (folder,) = broadcast_object_list([str(folder)])
        accelerator.save_state(folder, safe_serialization=True)
        if stream is not None:
            state = json.dumps(stream.state_dict())
            Path(folder, f"stream-{accelerator.process_index}.json").write_text(state)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_checksums(Path(folder))
    if accelerator.is_main_process:
        for old in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def refuse_used(output_dir: Path) -> None:
    """Raises ValueError when a run's files are there already, and it is not to be resumed."""
    checkpoints, log = list_checkpoints(output_dir), output_dir / "log.jsonl"
    earlier = ", ".join(path.name for path in (*checkpoints, log) if path.exists())
    if checkpoints:
        raise ValueError(f"{output_dir} holds {earlier}; use --resume latest or another --output_dir.")
    if earlier:
        raise ValueError(
            f"{output_dir} holds {earlier} of a run that left no checkpoint; remove it to start anew, or use another "
            "--output_dir."
        )


def load_checkpoint(
    accelerator: Accelerator, output_dir: Path, resume: str, progress: Progress, stream: ClipStream | None = None
) -> Path:
    """Loads 'latest', or the path of a checkpoint, into what the accelerator prepared and registered.

    Where the latest is damaged it is set aside, under a name that ends in `.damaged`, for the one before.

    Raises:
        ValueError: there is nothing to resume from, a damaged checkpoint, or later checkpoints would be mixed up with
            the new ones.
    """
    path = _latest_whole(accelerator, output_dir) if resume == "latest" else Path(resume)
    states = sorted(path.glob("stream-*.json"))
    if not (states if stream is not None else path.is_dir()):
        raise ValueError(f"{path} is no checkpoint of this script.")
    if resume != "latest":
        check_files(path)
    _check_networks(accelerator, path)
    try:
        with patch_environment(torch_force_weights_only_load=1):  # also where accelerate asks for more
            accelerator.load_state(str(path))
        if stream is not None:
            stream.load_state_dict([read_json(state) for state in states])
    except ValueError:
        raise
    except (*MISFITS, OSError, RuntimeError) as error:
        reason = one_line(error)
        raise ValueError(f"{path} does not load ({reason}); resume with the settings it was made with.") from error
    later = [other.name for other in list_checkpoints(output_dir) if checkpoint_step(other) > progress.step]
    if later:  # the oldest are removed, which would be the new ones
        raise ValueError(
            f"{output_dir} holds {', '.join(later)}, later than {path}; move them away or use another --output_dir."
        )
    return path


def _latest_whole(accelerator: Accelerator, output_dir: Path) -> Path:
    """The latest checkpoint that is whole; later ones are set aside. Raises ValueError where there is none."""
    damaged: list[tuple[Path, ValueError]] = []
    for path in reversed(list_checkpoints(output_dir)):
        try:
            check_files(path)
        except ValueError as error:
            damaged.append((path, error))
            continue
        accelerator.wait_for_everyone()  # every process reads them all, and comes to the same
        for other, error in damaged:
            logger.warning("%s Going on from %s; %s is set aside.", error, path.name, other.name)
            aside = other
            while aside.exists():
                aside = aside.with_name(f"{aside.name}.damaged")
            if accelerator.is_main_process:
                other.rename(aside)
        accelerator.wait_for_everyone()
        return path
    if damaged:
        raise damaged[0][1]
    raise ValueError(f"there is no checkpoint in {output_dir} to resume from; leave --resume out to start.")


def _check_networks(accelerator: Accelerator, path: Path) -> None:
    """Raises ValueError unless the checkpoint holds the networks that the accelerator prepared."""
    sharded, whole = list(path.glob("pytorch_model_fsdp*.bin")), list(path.glob("model*.safetensors"))
    if sharded and not accelerator.is_fsdp2:
        raise ValueError(f"{path} was made under FSDP; resume with the launch configuration that it was made with.")
    if whole and accelerator.is_fsdp2:
        raise ValueError(f"{path} was made without FSDP; resume with the launch configuration that it was made with.")
    saved = [_tensor_names(file) for file in sorted(sharded or whole, key=lambda file: (len(file.name), file.name))]
    present = [set(accelerator.unwrap_model(model).state_dict()) for model in accelerator._models]
    if saved != present:
        raise ValueError(
            f"{path} holds other trained networks than this run has: {len(saved)} with {sum(map(len, saved))} tensors "
            f"against {len(present)} with {sum(map(len, present))}; resume with the settings it was made with "
            "(--adversarial and --alignment, for a tokenizer)."
        )


def _tensor_names(file: Path) -> set[str]:
    """Names of the tensors in a file of weights, without reading them."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            return set(opened.keys())
    return set(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
