"""Files and folders that are written whole or not at all, and pipes that are read as files.

An output is made in a staging folder beside its target, `.NAME.XXXXXXXX.partial`, and takes the target's place at the
end. Symbolic links are followed and stay; mode and owner of what is replaced are kept, and what is new obeys the umask.
What is no regular file (a pipe, a device, "-" for standard output) cannot be replaced: it is written through, once the
output is complete.

A process holds a lock on its staging folders. Those that nobody holds were left by a process that was killed; the next
writer of the same target removes them.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and so nothing is taken for left over
    fcntl = None

# Staging folders of this process: path -> process, since a forked child has a copy of this.
_live: dict[Path, int] = {}
# What file systems say that have no locks, or cannot be told to put a file on the disk now.
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class Replacement:
    """A file under way; a context manager that gives the path to write to.

    Its block ends in `commit`, or, with an exception, in `discard`.

    Args:
        path: the target; "-" is standard output.

    Attributes:
        partial: the path to write to. Its name is the target's, so that libraries find the extension that they go by.

    Raises:
        ValueError: a target that cannot be written. An OSError in the block becomes one, too, except that a pipe which
            nobody reads any more stays a BrokenPipeError.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path
        with _told(path):
            self._target = follow(path)
            self._through = _is_special(self._target)
            if self._target == 1 and os.isatty(1):
                raise ValueError("standard output is a terminal; send it into a file or to a program.")
            if self._through:
                self._staging = _Staging(Path(tempfile.gettempdir(), "evatok-output"), mode=0o700)
            else:
                if self._target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "is a folder")
                self._staging = _Staging(self._target)
            self.partial = self._staging.folder / ("output" if self._through else self._target.name)

    def commit(self) -> None:
        """Puts the file in place. Raises ValueError where that fails; the target is then as it was."""
        with _told(self.path), self._staging:
            if self._through:
                with self.partial.open("rb") as made, _opened(self._target) as out:
                    shutil.copyfileobj(made, out, 1 << 20)
            else:
                self._staging.settle(self.partial, self._target)

    def discard(self) -> None:
        """Removes what was written; the target is as it was. There is nothing left to do after a `commit`."""
        self._staging.remove()

    def __enter__(self) -> Path:
        return self.partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
            return
        self.discard()
        with _told(self.path):
            if isinstance(error, OSError):
                raise error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file of UTF-8 text. Raises ValueError where that fails."""
    with Replacement(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to write into, which at the end takes the place of `path` and of all that was in it.

    Raises:
        ValueError: a target that is a file, or that cannot be written.
    """
    with _told(path):
        target = follow(path)
        if _is_special(target) or (target.exists() and not target.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, "is a file, no folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _Staging(target) as staging:
            new = staging.folder / target.name
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    file.chmod(staging.mode)
                    _sync(file)
            staging.exchange(new, target)


@contextmanager
def adding_to(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to write into, whose files at the end are put into `folder`, beside others or in their place.

    Raises:
        ValueError: a folder that cannot be made or written.
    """
    with _told(folder):
        target = follow(folder)
        target.mkdir(parents=True, exist_ok=True)
        with _Staging(target / "files") as staging:
            new = staging.folder / "files"
            new.mkdir()
            yield new
            for path in sorted(new.rglob("*")):
                place = target / path.relative_to(new)
                if path.is_dir():
                    place.mkdir(exist_ok=True)
                else:
                    staging.settle(path, follow(place))


@contextmanager
def scratch_in(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder inside another for what is needed meanwhile. Raises ValueError where it cannot be made."""
    with _told(folder), _Staging(Path(folder, "scratch")) as staging:
        yield staging.folder


def prepare(path: str | os.PathLike[str]) -> None:
    """Makes the folder of a file to be written. Raises ValueError where a file cannot be written there."""
    with _told(path):
        target = follow(path)
        if not is_special(path):
            target.parent.mkdir(parents=True, exist_ok=True)
        Replacement(path).discard()


def pipe(path: object) -> BinaryIO | None:
    """The pipe, open for reading, that is at a path, or standard input for "-"; None where there is something else.

    Raises:
        ValueError: standard input that is a terminal or closed.
        OSError: a pipe that cannot be opened.
    """
    if not isinstance(path, str | os.PathLike):
        return None
    path = os.fspath(path)
    if path == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("standard input is a terminal or closed; pipe a file into it, or name a file.")
        try:
            return os.fdopen(os.dup(sys.stdin.fileno()), "rb")  # which can be closed without closing standard input
        except OSError:  # something else was put in its place
            return sys.stdin.buffer
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return open(path, "rb") if stat.S_ISFIFO(mode) else None


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[str]:
    """A path that can be read from any place and more than once: a temporary copy of a pipe or of "-", else the path.

    Raises:
        ValueError: standard input that is a terminal or closed.
        OSError: a pipe that cannot be read, or a disk that is full.
    """
    stream = pipe(path)
    if stream is None:
        yield os.fspath(path)
        return
    with stream, tempfile.NamedTemporaryFile(prefix="evatok_") as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        yield copy.name


def is_stdout(path: str | os.PathLike[str] | None) -> bool:
    """Whether this is another name of standard output, such as "-" or "/dev/stdout"."""
    return path is not None and follow(path) == 1


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether what is there is written through: a pipe, a device, an open descriptor."""
    return _is_special(follow(path))


def follow(path: str | os.PathLike[str]) -> Path | int:
    """Where symbolic links lead: the path that is to be written, or the number of an open descriptor of this process.

    Raises:
        OSError: links in a circle.
    """
    if os.fspath(path) == "-":
        return 1
    path = Path(path)
    if path.name in ("", ".."):
        return path.resolve()
    for _ in range(40):
        parent = Path(os.path.realpath(path.parent))
        if str(parent) in ("/dev/fd", "/proc/self/fd", f"/proc/{os.getpid()}/fd") and path.name.isdigit():
            return int(path.name)
        path = parent / path.name
        if not path.is_symlink():
            return path
        path = parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def is_partial(name: str) -> bool:
    """Whether a folder of this name is one in which an output is being made, or was when a process was killed."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.partial", name, re.DOTALL) is not None


def remove_left_over(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left of the outputs of a folder, of one name or of all."""
    try:
        found = [entry for entry in os.listdir(folder) if is_partial(entry)]
    except OSError:
        return
    if name is not None:
        found = [entry for entry in found if entry[: -len(".01234567.partial")] == f".{_shortened(name)}"]
    for entry in found:
        try:
            lock = _lock(folder / entry)
        except OSError:  # it is being written, or not ours to judge
            continue
        _remove(folder / entry)
        os.close(lock)


def remove_unfinished() -> None:
    """Removes what this process has under way, as it does when it exits."""
    for folder, process in list(_live.items()):
        if process == os.getpid():
            _remove(folder)
            _live.pop(folder, None)


atexit.register(remove_unfinished)


# --- inside -----------------------------------------------------------------------------------------------------------


class _Staging:
    """A folder beside a target, locked while it is in use; at the end of its block it is removed."""

    def __init__(self, target: Path, mode: int = 0o777):
        remove_left_over(target.parent, target.name)
        self._lock: int | None = None
        while True:
            self.folder = target.with_name(f".{_shortened(target.name)}.{uuid.uuid4().hex[:8]}.partial")
            _live[self.folder] = os.getpid()
            try:
                self.folder.mkdir(mode)
                self._lock = _lock(self.folder)
            except (BlockingIOError, FileNotFoundError):  # another process has just taken it for left over
                _live.pop(self.folder)
                if target.parent.is_dir():
                    continue
                raise
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    self.remove()
                    raise
            except BaseException:
                self.remove()
                raise
            # The file of the lock is one that nobody gave a mode: what it has is what new files shall have.
            self.mode = stat.S_IMODE((self.folder / "lock").stat().st_mode)
            return

    def settle(self, made: Path, target: Path) -> None:
        """Moves a file to its target, with the mode and the owner that it shall have there."""
        self._keep(made, target, self.mode)
        _sync(made)
        os.replace(made, target)

    def exchange(self, made: Path, target: Path) -> None:
        """Moves a folder to its target, and what was there before into this one, where it goes away."""
        self._keep(made, target, None)
        before = self.folder / "before" / target.name
        before.parent.mkdir()
        try:
            if target.exists():
                os.rename(target, before)
            os.rename(made, target)
        except BaseException:
            _give_back(self.folder)
            raise

    def _keep(self, made: Path, target: Path, mode: int | None) -> None:
        try:
            before = target.stat()
        except FileNotFoundError:
            if mode is not None:
                made.chmod(mode)
            return
        if hasattr(os, "chown"):
            try:
                os.chown(made, before.st_uid, before.st_gid)
            except PermissionError:  # only root gives files to others
                pass
        made.chmod(stat.S_IMODE(before.st_mode))

    def remove(self) -> None:
        if self.folder in _live:
            _remove(self.folder)
            _live.pop(self.folder, None)
            if self._lock is not None:
                os.close(self._lock)

    def __enter__(self) -> _Staging:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:200])  # a file system takes 255 bytes with what is put around it


def _lock(folder: Path) -> int:
    """A descriptor that holds the lock of a staging folder.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: another process has removed the folder.
        OSError: of `_UNSUPPORTED`, where there are no locks; of others, where the file of the lock cannot be opened.
    """
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(folder / "lock")):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except BaseException:
        os.close(lock)
        raise
    return lock


def _remove(folder: Path) -> None:
    """Removes a staging folder, after what it took the place of is where it was, if nothing else is there."""
    try:
        _give_back(folder)
    except OSError:
        return  # that is worth more than a tidy folder
    shutil.rmtree(folder, ignore_errors=True)


def _give_back(folder: Path) -> None:
    for before in (folder / "before").glob("*"):
        if not (folder.parent / before.name).exists():
            os.rename(before, folder.parent / before.name)


def _is_special(target: Path | int) -> bool:
    if isinstance(target, int):
        return True
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def _opened(target: Path | int):
    """What is no regular file, open for writing. An open descriptor goes on where it is, as for `>>`."""
    if target == 1 and sys.stdout is not None:
        sys.stdout.flush()
    descriptor = (
        os.dup(target) if isinstance(target, int) else os.open(target, os.O_WRONLY | getattr(os, "O_NOCTTY", 0))
    )
    with os.fdopen(descriptor, "wb") as out:
        yield out


def _sync(path: Path) -> None:
    """Has the disk hold a file, so that a power cut leaves no empty one under a name that promises a whole one."""
    with path.open("rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise


@contextmanager
def _told(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError into a ValueError of one line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror or error}); choose another place.") from error
