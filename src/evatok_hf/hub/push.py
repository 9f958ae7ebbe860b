"""From a checkpoint folder to one repository of the Hub, which loads with or without this package.

What goes there: weights as safetensors, configurations, cards and the files beside them, the code (`remote_code`), and
a card for the whole where the folder has none (`hub.card`). It is one commit: a repository has all of it or nothing.
A router or a generator by itself makes a repository, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundled import find_checkpoint
from ..models.base_evatok import read_index
from ..models.checkpoint_evatok import code_files, find_parts, pipeline_files
from ..models.files_evatok import read_json
from .card import make_card
from .commit import ask, commit, prepare_repository, visible_files
from .remote_code import AUTO_MAPS, PROCESSOR_MAP, part_in

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_KINDS = (".csv", ".gif", ".jpg", ".json", ".md", ".mp4", ".png", ".safetensors", ".txt", ".yaml", ".yml")
_NAMES = ("LICENSE", "NOTICE")
_CONFIG = "config.json"
_PROCESSOR = "video_preprocessor_config.json"
STATE = "last-checkpoint"  # as transformers' Trainer calls it


@dataclass
class Pushed:
    """The result of a push.

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

    def add_state(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.files[f"{STATE}/{path.relative_to(folder).as_posix()}"] = path

    def replaces(self, path: str) -> bool:
        """Tells whether a file of an earlier push has to go: weights in more files, or an older state."""
        where, _, name = path.rpartition("/")
        if path.startswith(f"{STATE}/"):
            return any(own.startswith(f"{STATE}/") for own in self.files)
        return where in self.folders.values() and name.endswith((".safetensors", ".safetensors.index.json"))


def push_checkpoint(
    folder: str | Path | None,
    repo_id: str,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    state: str | Path | None = None,
) -> Pushed:
    """Makes the repository if need be, and commits a checkpoint to it.

    An upload that is cut is taken up again; one that fails leaves the repository as it was, and can be repeated: what
    has arrived is not sent again.

    Args:
        folder: of the checkpoint, or of a tokenizer, router or generator by itself, or a bundled name; None for the
            default checkpoint.
        repo_id: owner/name.
        private: of a repository that is made; one that exists stays as it is.
        token: by default the one of the machine.
        revision: branch, made if need be; by default main.
        message: of the commit.
        state: folder of a run's state, which goes to `last-checkpoint/` of the repository.

    Raises:
        ValueError: a folder without a model, with pickled or incomplete weights, a repository that holds another kind
            of model where this one would lie, and a Hub that refuses or does not answer.
    """
    name = Path(find_checkpoint(folder)).expanduser()
    found = collect(name, repo_id)
    if state is not None:
        found.add_state(Path(state))
    api, repo_id, url = prepare_repository(repo_id, private=private, token=token)
    _check_kind(api, repo_id, found, revision)
    message = message or f"Push {', '.join(found.folders)}"
    oid = commit(api, repo_id, found.files, message, "model", revision, found.replaces)
    return Pushed(repo_id, url, oid, list(found.folders), sorted(found.files), found.size, found.left_out)


def collect(folder: Path, repo_id: str) -> CheckpointFiles:
    """All files of the repository of a checkpoint. Raises ValueError as `push_checkpoint`."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name the folder of a checkpoint.")
    folder = folder.resolve()
    part = part_in(folder)
    found = CheckpointFiles(folders={part: ""} if part in ("router", "generator") else find_parts(folder))
    inside = {"", *found.folders.values()} | ({"processor"} if (folder / "processor" / _PROCESSOR).is_file() else set())
    for own, path in visible_files(folder).items():
        belongs = own.rpartition("/")[0] in inside
        if belongs and path.suffix in PICKLES:
            raise ValueError(f"{folder} holds a pickle, {own}, which may run code; save it as safetensors.")
        if belongs and (path.suffix in _KINDS or path.name in _NAMES):
            found.files[own] = path
        elif path.suffix not in (".py", ".pyc"):  # code is written anew
            found.left_out.append(own)
    for part, where in found.folders.items():
        _check_weights(folder / where, part)
        _add_code(found, folder, where, _CONFIG)
    if "tokenizer" in found.folders:
        _add_code(found, folder, found.folders["tokenizer"], _PROCESSOR)
    if found.folders.get("tokenizer") == "tokenizer":
        found.files["processor/" + _PROCESSOR] = found.files["tokenizer/" + _PROCESSOR]  # where diffusers looks for it
        found.files |= pipeline_files({"processor", *found.folders})
    if "README.md" not in found.files:  # a tokenizer by itself may have its own card there
        _add_card(found, folder, repo_id)
    return found


def _check_kind(api: HfApi, repo_id: str, found: CheckpointFiles, revision: str | None) -> None:
    """Raises ValueError where a model by itself would come over one of another kind."""

    def there() -> dict[str, Any] | None:
        if not api.file_exists(repo_id, _CONFIG, revision=revision):
            return None
        return read_json(api.hf_hub_download(repo_id, _CONFIG, revision=revision))

    if _CONFIG in found.files and (theirs := ask(there, repo_id)) is not None:
        own, other = json.loads(found.files[_CONFIG])["model_type"], theirs.get("model_type")
        if own != other:
            raise ValueError(f"{repo_id} holds a model of type {other!r}, which {own!r} would replace; choose another.")


def _check_weights(folder: Path, part: str) -> None:
    names = {path.name for path in folder.glob("*.safetensors")}
    needed = {name for index in folder.glob("*.safetensors.index.json") for name in read_index(index).values()}
    if missing := sorted(needed - names) or ([] if names else ["model.safetensors"]):
        raise ValueError(f"the {part} in {folder} lacks {', '.join(missing[:3])}; get a complete copy.")


def _add_code(found: CheckpointFiles, folder: Path, where: str, name: str) -> None:
    """Names the code in a configuration of a part, and adds it beside the part and to the root."""
    path = folder / where / name
    if not path.is_file():  # a configuration was found already
        raise ValueError(f"the tokenizer in {path.parent} lacks {name}; save its processor beside it.")
    config = read_json(path)
    auto_map = PROCESSOR_MAP if name == _PROCESSOR else AUTO_MAPS[config["model_type"]]
    content = json.dumps(config | {"auto_map": auto_map}, indent=2, sort_keys=True) + "\n"
    modules = [reference.partition(".")[0] for reference in auto_map.values()]
    made = {name: content.encode(), **code_files(modules)}
    found.files |= {f"{where}/{own}" if where else own: source for own, source in made.items()}
    # transformers looks for the code of a model in a subfolder in the root
    found.files |= {own: source for own, source in made.items() if own != name}


def _add_card(found: CheckpointFiles, folder: Path, repo_id: str) -> None:
    cards: dict[str, str | None] = {}
    runs: dict[str, dict[str, Any]] = {}
    for part, where in found.folders.items():
        path, run = folder / where / "README.md", folder / where / "training.json"
        cards[part] = path.read_text(encoding="utf-8") if path.is_file() else None
        if run.is_file():
            runs[part] = read_json(run)
    found.files["README.md"] = make_card(repo_id, cards, found.folders, runs).encode()
