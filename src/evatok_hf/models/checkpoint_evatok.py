"""Loading and saving of checkpoints: from a folder or a Hub id to the models in it, and back to a folder.

A checkpoint holds the tokenizer (its model and its video processor) in `tokenizer/` or by itself, and may hold a router
in `router/` and a generator in `generator/`. The generator is the largest, so it is loaded only where it is wanted.
Beside the weights of a whole pipeline lies its code, so that it works where this package is not installed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError

from .configuration_evatok import EvatokConfig, EvatokGeneratorConfig, EvatokRouterConfig
from .files_evatok import adding_to, read_json
from .modeling_evatok import EvatokEncoderModel, EvatokModel
from .modeling_evatok_router import EvatokRouter
from .video_processing_evatok import EvatokVideoProcessor

if TYPE_CHECKING:
    from .modeling_evatok_generator import EvatokForCausalLM


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

T = TypeVar("T")
WAITS = (1.0, 4.0)  # seconds before a second and a third try

HERE = Path(__file__).parent
_RELATIVE = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
_PIPELINE = '''"""The pipeline of this checkpoint, of the package evatok_hf if it is installed, else of these files."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # diffusers copies the files that are named here
{files}

try:
    EvatokPipeline = import_module("evatok_hf").EvatokPipeline
except ModuleNotFoundError as error:
    if error.name != "evatok_hf":
        raise
    EvatokPipeline = import_module(".pipeline_evatok", __package__).EvatokPipeline
'''
_PARTS = '''"""The classes of this checkpoint's parts, for `pipeline.py` of its root."""

from importlib import import_module

try:
    _code = import_module("evatok_hf")
except ModuleNotFoundError as error:
    if error.name != "evatok_hf":
        raise
    _code = import_module(".pipeline_evatok", __package__)  # diffusers puts it beside this

'''
_PART_CLASSES = {
    "tokenizer": "EvatokModel",
    "processor": "EvatokVideoProcessor",
    "router": "EvatokRouter",
    "generator": "EvatokForCausalLM",
}


def local_copy(name: str | Path, parts: Sequence[str] = (), weights: bool = True, **hub: Any) -> Path:
    """The folder of a checkpoint, into which a repository of the Hub is downloaded if that is what the name means.

    Args:
        name: a folder, or a Hub id.
        parts: those to download beside what is in the root, of tokenizer, router and generator.
        weights: whether to download them, too.
        hub: `revision`, `token` and other arguments of `snapshot_download` of huggingface_hub.

    Raises:
        ValueError: no such folder or repository, a Hub that does not answer, or a download that was cut.
    """
    name, folder = str(name), Path(name).expanduser().absolute()
    if folder.is_dir():
        return folder
    if folder.exists() or Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ValueError(f"there is no folder {name}; give a folder, or a Hub id owner/name.")
    files = ["config.json", "generation_config.json", "video_preprocessor_config.json"]
    files += ["model*.safetensors", "model*.safetensors.index.json"] if weights else []
    patterns = [f"{where}{file}" for where in ("", *(f"{part}/" for part in parts)) for file in files]
    return download(name, patterns, **hub)


def download(name: str, patterns: Sequence[str], what: str = "repository", **hub: Any) -> Path:
    """The folder into which those files of a repository of the Hub are downloaded that match; `what` messages call it.

    Raises:
        ValueError: no such repository, a Hub that does not answer, or a download that was cut.
    """
    try:
        return Path(again(lambda: snapshot_download(name, allow_patterns=patterns, **hub), is_cut))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name}, and the Hub is not reachable to look for it there; check the name and the "
            "network."
        ) from error
    except Exception as error:
        if is_cut(error):
            raise ValueError(f"the download of {name} was cut; load it again, what has arrived is kept.") from error
        if not isinstance(error, HfHubHTTPError | HFValidationError | OSError):
            raise
        raise ValueError(
            f"there is no folder {name}, and no such {what} could be read from the Hub ({one_line(error)}); check the "
            "name, the revision and, for a private one, the token."
        ) from error


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Turns what a damaged part of a checkpoint fails with, or an argument of another library, into a ValueError of one
    line."""
    try:
        yield
    except NotImplementedError as error:  # also a RuntimeError
        raise ValueError(f"the {what} in {name} cannot load so: {one_line(error)}; change that argument.") from error
    except (OSError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"the {what} in {name} does not load ({one_line(error)}); get a complete copy.") from error


def checkpoint_name(name: str | Path) -> str:
    """The name of a checkpoint in messages and token files: its Hub id, or the whole path of its folder."""
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        return str(name)
    return str(folder.parent if folder.name == "tokenizer" else folder)


def load_checkpoint(
    name: str, device: torch.device, dtype: torch.dtype, decoder: bool = True, **hub: Any
) -> tuple[EvatokEncoderModel, EvatokVideoProcessor, EvatokRouter | None]:
    """Tokenizer, without its decoder as `EvatokEncoderModel`, processor, and the router where there is one.

    Raises:
        ValueError: as `local_copy`; a checkpoint that holds no complete tokenizer, or an incomplete router.
    """
    folder = local_copy(name, ("tokenizer", "router"), **hub)
    parts, router = find_parts(folder, name, ["router"]), None
    with loading("tokenizer", name):
        kind = EvatokModel if decoder else EvatokEncoderModel
        model = kind.from_pretrained(folder / parts["tokenizer"], dtype=dtype)
        processor = EvatokVideoProcessor.from_pretrained(folder / parts["tokenizer"])
    if "router" in parts:
        with loading("router", name):
            router = EvatokRouter.from_pretrained(folder / "router", dtype=dtype).to(device)
    model.config._name_or_path = checkpoint_name(name)
    return model.to(device), processor, router


def load_generator(name: str, device: torch.device, dtype: torch.dtype, **hub: Any) -> EvatokForCausalLM | None:
    """The generator of a checkpoint, None where there is none.

    Raises:
        ValueError: as `local_copy`; a generator that is incomplete, or something else in its place.
    """
    from .modeling_evatok_generator import EvatokForCausalLM

    folder = local_copy(name, ("generator",), **hub)
    if not _has_part(folder, "generator", name):
        return None
    with loading("generator", name):
        return EvatokForCausalLM.from_pretrained(folder / "generator", dtype=dtype).to(device).eval()


def load_generator_config(name: str, **hub: Any) -> EvatokGeneratorConfig | None:
    """The configuration of a checkpoint's generator alone, None where there is none. Raises as `load_generator`."""
    folder = local_copy(name, ("generator",), weights=False, **hub)
    if not _has_part(folder, "generator", name):
        return None
    with loading("generator", name):
        return EvatokGeneratorConfig.from_pretrained(folder / "generator")


def check_generator(model: EvatokModel, config: EvatokGeneratorConfig) -> None:
    """Raises ValueError unless a generator of that configuration speaks of the tokens of this tokenizer."""
    tokenizer, generator = (part._name_or_path or "unnamed" for part in (model.config, config))
    mine = {
        "codebook_size": model.config.codebook_size,
        "block_lengths": list(model.config.block_lengths),
        "num_blocks": model.config.num_blocks,
        "tokenizer_fingerprint": model.fingerprint(),
    }
    for field, own in mine.items():
        other = getattr(config, field)
        if field == "tokenizer_fingerprint" and (other is None or model.reads(other)):
            continue
        if own != other:
            raise ValueError(
                f"tokenizer {tokenizer} and generator {generator} do not belong together: {field} is {own} for the "
                f"tokenizer and {other} for the generator; use the generator that was trained on its tokens."
            )


def save_checkpoint(
    folder: str | Path,
    model: EvatokModel,
    processor: EvatokVideoProcessor,
    router: EvatokRouter | None,
    generator: EvatokForCausalLM | None = None,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Writes what `load_checkpoint` and `load_generator` read; files appear only when all of them are complete. `extra`
    writes more files into the folder that it is given.

    Raises:
        ValueError: a folder that cannot be written to, or that already has a router, or a generator of another
            tokenizer, where none is to be written.
    """
    model.check_decoder("be saved as a checkpoint")
    folder = Path(folder).expanduser()
    if router is None and (folder / "router" / "config.json").exists():
        raise ValueError(f"{folder} has a router of another checkpoint; choose another folder, or remove router/.")
    if generator is None and (folder / "generator" / "config.json").exists():
        if not model.reads(load_generator_config(str(folder)).tokenizer_fingerprint):
            raise ValueError(
                f"{folder} has a generator of another checkpoint; choose another folder, or remove generator/."
            )
    with adding_to(folder) as partial:
        model.save_pretrained(partial / "tokenizer")
        processor.save_pretrained(partial / "tokenizer")
        if router is not None:
            router.save_pretrained(partial / "router")
        if generator is not None:
            generator.save_pretrained(partial / "generator")
        if extra is not None:
            extra(partial)


def find_parts(
    folder: Path, name: str | Path | None = None, others: Sequence[str] = ("router", "generator")
) -> dict[str, str]:
    """Part -> its folder in a checkpoint ("" for the checkpoint itself): the tokenizer, and those of `others` that it
    has. Messages call the checkpoint by `name`, if not by its folder.

    Raises:
        ValueError: a folder that holds no tokenizer, or another model where a part should be.
    """
    name = name or str(folder)
    found = {where: _model_type(folder / where / "config.json") for where in ("", "tokenizer")}
    where = next((where for where, kind in found.items() if kind == EvatokConfig.model_type), None)
    if where is None:
        kind = found["tokenizer"] or found[""]
        what = "no config.json" if kind is None else f"a model of type {kind!r}"
        raise ValueError(f"{name} holds {what}, not an EVATok tokenizer; name a checkpoint or its tokenizer/ folder.")
    return {"tokenizer": where} | {part: part for part in others if _has_part(folder, part, name)}


def _has_part(folder: Path, part: str, name: str | Path) -> bool:
    """True if a checkpoint has that part, a router or a generator. Raises ValueError for another model in its place."""
    kind = _model_type(folder / part / "config.json")
    if kind not in (None, {"router": EvatokRouterConfig, "generator": EvatokGeneratorConfig}[part].model_type):
        raise ValueError(f"{part}/ in {name} holds a model of type {kind!r}, not an EVATok {part}; get another copy.")
    return kind is not None


def _model_type(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return str(read_json(path).get("model_type"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable configuration ({one_line(error)}); get a complete copy.") from error


# --- devices ----------------------------------------------------------------------------------------------------------


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


def find_dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype of that name, or the dtype itself. Raises ValueError for one that models do not run in."""
    kind = DTYPES.get(name) if isinstance(name, str) else name
    if kind not in DTYPES.values():
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}.")
    return kind


# --- the code beside the weights --------------------------------------------------------------------------------------


# transformers reads `auto_map` of a configuration and fetches the named file from the root of the repository, also for
# a model in a subfolder, and with it whatever the file imports relatively. diffusers does the same with `pipeline.py`,
# but wants a file beside the weights of every part, and takes only what the files name themselves.


def code_files(modules: Iterable[str]) -> dict[str, bytes]:
    """File name -> source of these modules of the package and of what they import of it."""
    waiting, found = list(modules), {}
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in found:
            found[name] = (HERE / name).read_bytes()
            waiting.extend(_RELATIVE.findall(found[name].decode()))
    return dict(sorted(found.items()))


def pipeline_index(kind: str | list[str], module: str, parts: Collection[str]) -> dict[str, Any]:
    """The content of `model_index.json` of a pipeline, by its class (or module and class), the module of the classes
    of its parts, and the parts that there are."""
    import diffusers

    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": diffusers.__version__}
    return index | {part: [module, name] if part in parts else [None, None] for part, name in _PART_CLASSES.items()}


def pipeline_files(parts: Iterable[str]) -> dict[str, bytes]:
    """The files that `DiffusionPipeline.from_pretrained(.., trust_remote_code=True)` needs besides the parts that there
    are, of tokenizer, processor, router and generator: path in the checkpoint -> content."""
    parts = set(parts)
    index = pipeline_index(["pipeline", "EvatokPipeline"], "parts_evatok", parts)
    files = code_files(["pipeline_evatok"])
    names = "\n".join(f"    from .{Path(name).stem} import __name__ as _" for name in files)
    classes = "".join(f"{name} = _code.{name}\n" for name in _PART_CLASSES.values())
    files["pipeline.py"] = _PIPELINE.replace("{files}", names).encode()
    files["model_index.json"] = (json.dumps(index, indent=2) + "\n").encode()
    return files | {f"{part}/parts_evatok.py": (_PARTS + classes).encode() for part in _PART_CLASSES if part in parts}


# --- what goes wrong --------------------------------------------------------------------------------------------------


def again(action: Callable[[], T], worth_it: Callable[[BaseException], bool]) -> T:
    """The result of `action`, which is done again after each of `WAITS` where its error is `worth_it`."""
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if not worth_it(error):
                raise
            time.sleep(wait)
    return action()


def is_cut(error: BaseException) -> bool:
    """Tells whether a connection ended that had been there; an unreachable Hub is no such error."""
    return any(
        isinstance(cause, ConnectionResetError | ConnectionAbortedError | BrokenPipeError)
        or (of_the_client(cause) and type(cause).__name__ in ("ReadError", "WriteError", "RemoteProtocolError"))
        for cause in causes(error)
    )


def causes(error: BaseException) -> list[BaseException]:
    """The error, and those that it was raised from."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain


def one_line(error: BaseException) -> str:
    """The first line of its message, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def of_the_client(error: BaseException) -> bool:
    # huggingface_hub lets errors of its HTTP client through; of which library depends on its version
    return type(error).__module__.partition(".")[0].rstrip("2") in ("httpx", "httpcore")
