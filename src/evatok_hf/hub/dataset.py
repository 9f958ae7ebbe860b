"""From the folder of a finished data set to one data set repository of the Hub, in one commit.

There are three kinds, known by a file that their makers in `training/` write: tokens, proxy rewards, rendered clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .commit import commit, prepare_repository, visible_files
from .push import Pushed


@dataclass(frozen=True)
class DatasetKind:
    """The files that belong to a data set of one kind.

    Attributes:
        name: what reports call it.
        summary: the file that says that it is finished.
        maker: the script that makes it.
        beside: what else lies beside the card.
        data: the rows; older ones in the repository are taken away.
    """

    name: str
    summary: str
    maker: str
    beside: str
    data: tuple[str, ...]

    def is_data(self, path: str) -> bool:
        own = PurePosixPath(path)
        return any(len(own.parts) == pattern.count("/") + 1 and own.match(pattern) for pattern in self.data)


KINDS = (
    DatasetKind(
        "tokens", "tokens.json", "training/tokenize_dataset.py", "*.png", ("data/tokens-*.parquet", "skipped.jsonl")
    ),
    DatasetKind("proxy rewards", "curation.json", "training/curate.py", "*.png", ("data/curated-*.parquet",)),
    DatasetKind(
        "clips",
        "recipe.json",
        "training/make_vizdoom_dataset.py",
        "manifest.csv",
        ("train/*/*.mp4", "test/*/*.mp4"),
    ),
)


def dataset_kind(folder: str | Path) -> DatasetKind | None:
    """The kind of the data set in a folder, also of an unfinished one; None for anything else."""
    folder = Path(folder).expanduser()
    for kind in KINDS:
        if (folder / kind.summary).is_file() or any(folder.glob(kind.data[0])):
            return kind
    return None


def push_dataset(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Makes the data set repository if need be, and commits a finished data set to it.

    Interrupted pushes go on as those of checkpoints do. Shards and clips of an earlier push that the folder has not are
    taken away, as the card counts them no more.

    Args:
        folder: that `training/tokenize_dataset.py`, `curate.py` or `make_vizdoom_dataset.py` finished.
        repo_id, private, token, revision, message: as `push_checkpoint`.

    Raises:
        ValueError: a folder without a finished data set, too many files for a commit, and as `push_checkpoint`.
    """
    folder = Path(folder).expanduser().resolve()
    kind, files = collect_dataset(folder)
    api, repo_id, url = prepare_repository(repo_id, "dataset", private, token)
    oid = commit(api, repo_id, files, message or f"Push {kind.name}", "dataset", revision, kind.is_data)
    left_out = [own for own in visible_files(folder) if own not in files]
    size = sum(path.stat().st_size for path in files.values())
    return Pushed(repo_id, url, oid, [kind.name], sorted(files), size, left_out)


def collect_dataset(folder: Path) -> tuple[DatasetKind, dict[str, Path]]:
    """The kind of a finished data set, and path in the repository -> file. Raises ValueError as `push_dataset`."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name the folder of a data set.")
    kind = dataset_kind(folder)
    if kind is None:
        raise ValueError(f"{folder} holds no data set; make one with {', '.join(kind.maker for kind in KINDS)}.")
    data = [path for pattern in kind.data for path in sorted(folder.glob(pattern))]
    missing = [name for name in ("README.md", kind.summary) if not (folder / name).is_file()]
    if missing or not data:
        what = ", ".join(missing) or "its data"
        raise ValueError(f"the data set in {folder} is not finished, it lacks {what}; go on with {kind.maker}.")
    paths = [folder / "README.md", folder / kind.summary, *sorted(folder.glob(kind.beside)), *data]
    return kind, {path.relative_to(folder).as_posix(): path for path in paths if not path.name.startswith(".")}
