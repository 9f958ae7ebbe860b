"""Repositories of the Hub that are written to: made, checked, and filled by one commit at a time.

Of the ways that huggingface_hub has, `create_commit` alone puts everything into one commit: `upload_folder` may split
a folder into several. It is as resumable: large files go ahead of the commit, each is kept by the Hub as soon as it has
arrived, also if the commit never comes, and is not sent again by whoever repeats the push. So no state is kept here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..models.checkpoint_evatok import again, one_line
from .network import is_of_the_network, is_transient, status

T = TypeVar("T")
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MAX_FILES = 25_000  # of one commit, says the Hub


def visible_files(folder: Path) -> dict[str, Path]:
    """Path in a folder -> file, for all below it but what is hidden, sorted."""
    found = ((path.relative_to(folder), path) for path in sorted(folder.rglob("*")) if path.is_file())
    return {own.as_posix(): path for own, path in found if not any(part.startswith(".") for part in own.parts)}


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError for what is no name of a repository, owner/name."""
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is no name of a repository; give owner/name.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository ({one_line(error)}).") from error


def prepare_repository(
    repo_id: str, kind: str = "model", private: bool = False, token: str | bool | None = None
) -> tuple[HfApi, str, str]:
    """Makes a repository (a model or dataset) if need be, and finds out whether the token may write to it; arguments as
    those of `push_checkpoint`.

    Returns:
        The client, owner/name as the Hub writes it, and the address.

    Raises:
        ValueError: no name of a repository, no token, or one that may not write there; no answer.
    """
    check_repo_id(repo_id)
    if not isinstance(token, str) and get_token() is None:
        raise ValueError("there is no token for the Hub; run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token)
    url = ask(lambda: api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True), repo_id)
    repo_id = url.repo_id
    # One that exists is no error above, whoever owns it.
    ask(lambda: api.auth_check(repo_id, repo_type=kind, write=True), repo_id)
    return api, repo_id, str(url)


def commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    message: str,
    kind: str,
    revision: str | None,
    is_stale: Callable[[str], bool],
) -> str:
    """Commits files, and takes those away that an earlier push left -> hash of the commit.

    Args:
        files: path in the repository -> file, or content.
        revision: branch, made if need be; by default main.
        is_stale: whether a path of the repository that is not among the files is to go.

    Raises:
        ValueError: too many files for a commit, a Hub that refuses or does not answer.
    """
    if len(files) > MAX_FILES:
        raise ValueError(
            f"{len(files)} files are more than the {MAX_FILES} of one commit; push them in parts, with "
            f"`hf upload {repo_id} FOLDER --repo-type {kind}`."
        )
    if revision not in (None, "main"):
        ask(lambda: api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True), repo_id)
    there = ask(lambda: api.list_repo_files(repo_id, repo_type=kind, revision=revision), repo_id)
    stale = sorted(path for path in there if path not in files and is_stale(path))

    def send() -> Any:
        # Operations are used up by a commit, also by one that fails.
        operations = [CommitOperationDelete(path) for path in stale]
        operations += [CommitOperationAdd(path, own) for path, own in files.items()]
        return api.create_commit(repo_id, operations, commit_message=message, repo_type=kind, revision=revision)

    return ask(send, repo_id).oid


def ask(action: Callable[[], T], repo_id: str) -> T:
    """The result of a request, which is made again where the Hub did not answer. Raises ValueError in one line."""
    try:
        return again(action, is_transient)
    except Exception as error:
        if not is_of_the_network(error):
            raise
        hint = "check the network and push again, what has arrived is kept"
        if status(error) in (401, 403, 404):
            hint = "check the name, and that your token may write there"
        raise ValueError(f"the push to {repo_id} failed ({one_line(error)}); {hint}.") from error
