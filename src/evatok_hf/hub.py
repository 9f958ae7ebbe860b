"""From a checkpoint folder to one repository of the Hub, which loads with or without this package.

What goes there: weights as safetensors, configurations, cards and the files beside them, the code (`remote_code`), and
a card for the whole where the folder has none (`hub_card`). It is one commit: a repository has all of it or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from .bundled import default_checkpoint
from .hub_card import make_card
from .loading import find_parts
from .network import again, is_of_the_network, is_transient, one_line, status
from .remote_code import AUTO_MAPS, PROCESSOR_MAP, model_code, pipeline_files

T = TypeVar("T")
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_KINDS = (".csv", ".gif", ".jpg", ".json", ".md", ".mp4", ".png", ".safetensors", ".txt", ".yaml", ".yml")
_NAMES = ("LICENSE", "NOTICE")
_PROCESSOR = "video_preprocessor_config.json"


@dataclass
class Pushed:
    """What a push came to.

    Attributes:
        repo_id: owner/name.
        url: of the repository.
        commit: hash of the commit.
        parts: of tokenizer, router and generator, those that it has.
        files: paths in the repository.
        bytes: size of all files.
        left_out: files of the folder that are no part of a checkpoint.
    """

    repo_id: str
    url: str
    commit: str
    parts: list[str]
    files: list[str]
    bytes: int
    left_out: list[str]


@dataclass
class CheckpointFiles:
    """Path in the repository -> file, or content that is made; the folder of each part; what is left out."""

    files: dict[str, Path | bytes] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(len(own) if isinstance(own, bytes) else own.stat().st_size for own in self.files.values())


def push_checkpoint(
    folder: str | Path | None,
    repo_id: str,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Makes the repository if need be, and commits a checkpoint to it.

    An upload that is cut is taken up again; one that fails leaves the repository as it was, and can be repeated: what
    has arrived is not sent again.

    Args:
        folder: of the checkpoint; None for the bundled one.
        repo_id: owner/name.
        private: of a repository that is made; one that exists stays as it is.
        token: by default the one of the machine.
        revision: branch, made if need be; by default main.
        message: of the commit.

    Raises:
        ValueError: a folder without a tokenizer, with pickled or incomplete weights, and a Hub that refuses or does not
            answer.
    """
    name = Path(default_checkpoint() if folder is None else folder).expanduser()
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no name of a repository; give owner/name.")
    found = collect(name, repo_id)
    api = HfApi(token=token)
    url = _ask(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), repo_id)
    repo_id = url.repo_id
    if revision is not None and revision != "main":
        _ask(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)

    def commit() -> Any:
        return api.create_commit(
            repo_id,
            [
                CommitOperationAdd(path, own if isinstance(own, bytes) else str(own))
                for path, own in found.files.items()
            ],
            commit_message=message or f"Push {', '.join(found.folders)}",
            revision=revision,
        )

    oid = _ask(commit, repo_id).oid
    return Pushed(repo_id, str(url), oid, list(found.folders), sorted(found.files), found.size, found.left_out)


def collect(folder: Path, repo_id: str) -> CheckpointFiles:
    """All files of the repository of a checkpoint. Raises ValueError as `push_checkpoint`."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name the folder of a checkpoint.")
    folder = folder.resolve()
    found = CheckpointFiles(folders=find_parts(str(folder)))
    inside = {"", *found.folders.values()} | ({"processor"} if (folder / "processor" / _PROCESSOR).is_file() else set())
    for path in sorted(folder.rglob("*")):
        own = path.relative_to(folder)
        where, hidden = own.parent.as_posix().removeprefix("."), any(part.startswith(".") for part in own.parts)
        if hidden or not path.is_file() or "__pycache__" in own.parts:
            continue
        if where in inside and path.suffix in PICKLES:
            raise ValueError(f"{folder} holds a pickle, {own}, which may run code; save it as safetensors.")
        if where in inside and (path.suffix in _KINDS or path.name in _NAMES):
            found.files[own.as_posix()] = path
        elif path.suffix != ".py":  # code is written anew
            found.left_out.append(own.as_posix())
    for part, where in found.folders.items():
        _check_weights(folder / where, part)
        _add_code(found, folder, where)
    _add_processor(found, folder)
    if found.folders["tokenizer"] == "tokenizer":
        found.files["processor/" + _PROCESSOR] = found.files["tokenizer/" + _PROCESSOR]  # where diffusers looks for it
        found.files |= pipeline_files({"processor", *found.folders})
    if "README.md" not in found.files:  # a tokenizer by itself may have its own card there
        _add_card(found, folder, repo_id)
    return found


def _check_weights(folder: Path, part: str) -> None:
    names = {path.name for path in folder.glob("*.safetensors")}
    needed: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            needed |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is no readable index of weights; get a complete copy.") from error
    if missing := sorted(needed - names) or ([] if names else ["model.safetensors"]):
        raise ValueError(f"the {part} in {folder} lacks {', '.join(missing[:3])}; get a complete copy.")


def _add_code(found: CheckpointFiles, folder: Path, where: str) -> None:
    """Names the code in the configuration of a part, and adds it beside the part and to the root."""
    config = json.loads((folder / where / "config.json").read_text(encoding="utf-8"))
    auto_map = AUTO_MAPS[config["model_type"]]
    _add(found, where, "config.json", _json(config | {"auto_map": auto_map}))
    for name, source in model_code(auto_map).items():
        _add(found, where, name, source)
        found.files[name] = source  # transformers looks for the code of a model in a subfolder here


def _add_processor(found: CheckpointFiles, folder: Path) -> None:
    where = found.folders["tokenizer"]
    path = folder / where / _PROCESSOR
    if not path.is_file():
        raise ValueError(f"the tokenizer in {folder / where} lacks {_PROCESSOR}; save its processor beside it.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable configuration; get a complete copy.") from error
    _add(found, where, _PROCESSOR, _json(config | {"auto_map": PROCESSOR_MAP}))
    for name, source in model_code(PROCESSOR_MAP).items():
        _add(found, where, name, source)
        found.files[name] = source


def _add_card(found: CheckpointFiles, folder: Path, repo_id: str) -> None:
    cards: dict[str, str | None] = {}
    for part, where in found.folders.items():
        path = folder / where / "README.md"
        cards[part] = path.read_text(encoding="utf-8") if path.is_file() else None
    found.files["README.md"] = make_card(repo_id, cards, found.folders).encode()


def _add(found: CheckpointFiles, where: str, name: str, content: bytes) -> None:
    found.files[f"{where}/{name}" if where else name] = content


def _json(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


# --- talking to the Hub -----------------------------------------------------------------------------------------------


def _ask(action: Callable[[], T], repo_id: str) -> T:
    """The result of a request, which is made again where the Hub did not answer. Raises ValueError in one line."""
    try:
        return again(action, is_transient)
    except LocalTokenNotFoundError as error:
        raise ValueError("there is no token for the Hub; run `hf auth login`, or set HF_TOKEN.") from error
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository ({one_line(error)}).") from error
    except Exception as error:
        if not is_of_the_network(error):
            raise
        hint = "check the network and push again, what has arrived is kept"
        if status(error) in (401, 403, 404):
            hint = "check the name, and that your token may write there"
        raise ValueError(f"the push to {repo_id} failed ({one_line(error)}); {hint}.") from error
