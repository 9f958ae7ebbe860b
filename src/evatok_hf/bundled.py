"""The checkpoints that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from .models.files_evatok import read_json

_FOLDER = Path(__file__).parent / "checkpoints"
_NAMES = ("evatok-small", "evatok-tiny")  # the default first


def bundled_checkpoints() -> dict[str, str]:
    """Folders of the checkpoints that come with the package, by their names: `tokenizer/`, and `router/` and
    `generator/` where they have them."""
    return {name: str(_FOLDER / name) for name in _NAMES}


def default_checkpoint(part: str = "tokenizer") -> str:
    """Folder of the bundled checkpoint that is used where none is named.

    Args:
        part: tokenizer, router or generator; the first bundled checkpoint that has it is the default.

    Raises:
        ValueError: another part.
    """
    for folder in bundled_checkpoints().values():
        if Path(folder, part, "config.json").is_file():
            return folder
    raise ValueError(f"no checkpoint that comes with the package has a {part}; ask for tokenizer, router or generator.")


def checkpoint_of(fingerprint: str | None) -> str:
    """Folder of the bundled checkpoint that reads tokens of this fingerprint; that of the default one where none does,
    whose refusal then says what they need."""
    for folder in bundled_checkpoints().values():
        config = read_json(Path(folder, "tokenizer", "config.json"))
        if fingerprint in (config["fingerprint"], *config.get("same_ids_as", ())):
            return folder
    return default_checkpoint()


def find_checkpoint(name: str | Path | None, part: str = "tokenizer") -> str:
    """The folder of a bundled checkpoint that is named, or not named at all; any other name as it is, a folder here of
    a bundled checkpoint's name too.

    Args:
        name: None is `default_checkpoint(part)`.
        part: that is wanted of it.
    """
    if name is None:
        return default_checkpoint(part)
    return str(name) if Path(name).exists() else bundled_checkpoints().get(str(name), str(name))
