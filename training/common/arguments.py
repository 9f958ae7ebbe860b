"""Arguments that the training scripts share: values from a YAML file and the command line, sources, the launch."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from transformers import HfArgumentParser, PreTrainedConfig

from evatok_hf.models.files_evatok import Rule, plain, read_text

logger = logging.getLogger(__name__)
# Of a YAML file; a date is a word there.
_OPTION = Rule(
    "a number, a word, or a list or table of such",
    lambda value: isinstance(value, datetime.date) or plain(4).allows(value),
)
_Arguments = TypeVar("_Arguments")


def parse_arguments(
    kind: type[_Arguments], description: str, argv: Sequence[str] | None = None
) -> tuple[_Arguments, dict]:
    """Reads `--config FILE.yaml` (optional) and then the options, which win.

    Returns:
        The filled dataclass, and all of its fields as a dict for logging and for the model card.

    Raises:
        SystemExit: code 2 with a one-line message for unknown options, unknown YAML fields or wrong values.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(kind, description=description, conflict_handler="resolve")
    parser.add_argument("--config", type=Path, help="YAML file of options; the command line overrides it.")
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path)
    chosen = before.parse_known_args(argv)[0].config
    from_file: list[str] = []
    if chosen is not None:
        try:
            from_file = _read_options(chosen, {field.name for field in dataclasses.fields(kind)})
        except (OSError, ValueError) as error:
            parser.error(f"cannot read --config {chosen}: {' '.join(str(error).split())}")
        fail = parser.error
        parser.error = lambda message: fail(f"{message} (given in {chosen}, or on the command line)")
    # The later of two equal options wins.
    namespace = parser.parse_args([*from_file, *argv])
    del namespace.config
    try:
        arguments = kind(**vars(namespace))
    except ValueError as error:
        parser.error(str(error))
    return arguments, dataclasses.asdict(arguments)


def read_yaml(path: Path) -> object:
    """The contents of a YAML file of options.

    Raises:
        ValueError: no YAML, or aliases, with which a short file may say as much as it likes.
        OSError: it cannot be read.
    """
    content = read_text(path, 1 << 20)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, yaml.SafeLoader)):
            raise ValueError("it has an alias (*name); write its value out")
        return yaml.safe_load(content) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error) or "it is nested too deep") from error


def _read_options(path: Path, known: Set[str]) -> list[str]:
    """The fields of a YAML file as they would be written on the command line, so that both are read in one way."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError("it is no mapping of options.")
    if unknown := sorted(map(str, values.keys() - known)):
        raise ValueError(f"unknown fields: {unknown}; known are {sorted(known)}.")
    words = []
    for name, value in values.items():
        if not _OPTION.allows(value):
            raise ValueError(f"{name} must be {_OPTION.words}.")
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            if isinstance(value, bool):  # YAML also reads a bare `no` as one
                value = "yes" if value else "no"
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def parse_overrides(text: str, kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """--model_overrides: fields of a configuration and their values. Raises ValueError for what is none."""
    try:
        overrides = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--model_overrides is no JSON: {error}") from error
    known = kind().to_dict()
    unknown = [name for name in overrides if name not in known] if isinstance(overrides, dict) else [overrides]
    if unknown:
        raise ValueError(f"--model_overrides must map fields of {kind.__name__} to values; it has no {unknown}.")
    return overrides


def parse_sources(entries: Sequence[str]) -> list[tuple[str, float]]:
    """SOURCE or SOURCE=WEIGHT, as given on the command line -> (source, weight), 1 where none is given."""
    mix = []
    for entry in entries:
        name, equals, weight = entry.rpartition("=")
        if os.path.exists(entry):  # whose own name has a "=" in it
            equals = ""
        try:
            mix.append((name, float(weight)) if equals else (entry, 1.0))
        except ValueError:
            mix.append((entry, 1.0))
    return mix


def source_names(entries: Sequence[str]) -> list[str]:
    """The sources of `parse_sources` without their weights."""
    return [name for name, _ in parse_sources(entries)]


def choose_precision(name: str, cpu: bool, choices: Sequence[str] = ("no", "fp16", "bf16")) -> str:
    """`--mixed_precision` as accelerate takes it: "auto" is bf16 where the device computes in it, and no elsewhere.

    Processors without bf16 instructions imitate it, about a hundred times slower than they compute in float32; who asks
    for it there by name is warned.

    Raises:
        ValueError: a name that is neither auto nor in `choices`.
    """
    if name not in ("auto", *choices):
        raise ValueError(f"--mixed_precision must be auto, {', '.join(choices[:-1])} or {choices[-1]}, got {name!r}.")
    if torch.cuda.is_available() and not cpu:
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if name == "auto":
        return "bf16" if supported else "no"
    if name == "bf16" and not supported:
        logger.warning("bf16 is very slow on this machine, which has no instructions for it; --mixed_precision auto")
    return name


def check_launch(accelerator: Accelerator, shards: bool = False) -> None:
    """Raises ValueError for processes that would not train together.

    That is, if they did not find each other, so that each would work alone, into the same folder, or if they were
    launched with FSDP for a script that does not shard.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not shards:
        raise ValueError(
            "this script does not work under FSDP; launch it with training/accelerate/ddp_8gpu.yaml or another without."
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched but accelerate runs {accelerator.num_processes}; "
            "give --cpu on a machine without a GPU."
        )


def without_plans() -> None:
    """Turns off cuDNN's attention, which makes a plan for each new shape; the blocks of batches have hundreds.

    Others report up to half a second for each on recent GPUs; it has not been measured with this model.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def patient_accelerator(cpu: bool) -> Accelerator:
    """For processes that meet only at the end, when one may be hours behind another. Raises as `check_launch`."""
    without_plans()
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))])
    check_launch(accelerator)
    return accelerator


def describe_machine(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores, {platform.machine()} CPU, {accelerator.num_processes} process(es)"
