"""Atomic writes, of files and folders that appear whole or not at all; pipes as files; JSON that is checked when read.

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
import inspect
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and so nothing is taken for left over
    fcntl = None

# Staging folders of this process: path -> process, since a forked child has a copy of this.
_live: dict[Path, int] = {}
# What file systems say that have no locks, or cannot be told to put a file on the disk now.
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
# In what safetensors says of a full disk, and in what torch does.
_UNWRITTEN = re.compile("I/O error|inline_container")


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
            self._through = is_special(path)
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
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


def write_json(path: str | os.PathLike[str], values: Any) -> None:
    """Writes a file of JSON, indented. Raises ValueError where that fails."""
    write_text(path, json.dumps(values, indent=2) + "\n")


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to write into, which at the end takes the place of `path` and of all that was in it.

    Raises:
        ValueError: a target that is a file, or that cannot be written.
    """
    with _told(path):
        target = follow(path)
        if is_special(path) or (target.exists() and not target.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, "is a file, no folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _Staging(target) as staging:
            new = staging.folder / target.name
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    staging.finish(file)
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
    """True for the names of standard output, such as "-" or "/dev/stdout"."""
    return path is not None and follow(path) == 1


def is_special(path: str | os.PathLike[str]) -> bool:
    """True for a target that is written through: a pipe, a device, an open descriptor."""
    target = follow(path)
    if isinstance(target, int):
        return True
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def follow(path: str | os.PathLike[str]) -> Path | int:
    """The end of a chain of symbolic links: the path to write, or the number of an open descriptor of this process.

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
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))


def is_partial(name: str) -> bool:
    """True for the name of a folder in which an output is being made, or was when a process was killed."""
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
            self.folder.mkdir(mode)
            _live[self.folder] = os.getpid()
            try:
                self._lock = _lock(self.folder)
            except (BlockingIOError, FileNotFoundError):  # another process has just taken it for left over
                _live.pop(self.folder)
                continue
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    self.remove()
                    raise
            # The file of the lock is one that nobody gave a mode: what it has is what new files shall have.
            self._mode = stat.S_IMODE((self.folder / "lock").stat().st_mode)
            return

    def finish(self, file: Path) -> None:
        """Gives a file the mode of new files, and has the disk hold it, so that a power cut leaves no empty one."""
        file.chmod(self._mode)
        with file.open("rb") as opened:
            try:
                os.fsync(opened.fileno())
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise

    def settle(self, made: Path, target: Path) -> None:
        """Moves a file to its target, with the mode and the owner that it shall have there."""
        self.finish(made)
        self._keep(made, target)
        os.replace(made, target)

    def exchange(self, made: Path, target: Path) -> None:
        """Moves a folder to its target, and what was there before into this one, where it goes away."""
        self._keep(made, target)
        before = self.folder / "before" / target.name
        before.parent.mkdir()
        try:
            if target.exists():
                os.rename(target, before)
            os.rename(made, target)
        except BaseException:
            _give_back(self.folder)
            raise

    @staticmethod
    def _keep(made: Path, target: Path) -> None:
        """Gives the mode and the owner of what it replaces, if there is anything."""
        if not target.exists():
            return
        before = target.stat()
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


def _opened(target: Path | int) -> BinaryIO:
    """A pipe, device or socket, open for writing. An open descriptor goes on where it is, as for `>>`."""
    if target == 1 and sys.stdout is not None:
        sys.stdout.flush()
    if isinstance(target, int):
        return os.fdopen(os.dup(target), "wb")
    return os.fdopen(os.open(target, os.O_WRONLY | getattr(os, "O_NOCTTY", 0)), "wb")


@contextmanager
def _told(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError, and what safetensors and torch make of one, into a ValueError of one line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if not isinstance(error, OSError) and not _UNWRITTEN.search(str(error)):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise ValueError(f"cannot write {path} ({reason}); choose another place.") from error


# --- what files may say -----------------------------------------------------------------------------------------------

# What files may say: every field has a rule, which is held against its value when a file is read.
#
# A kind of file is a dataclass under `checked`, huggingface_hub's `strict` with errors in one line; configurations of
# models are such dataclasses, too. Its fields are `ruled(rule)`, a rule being one of the functions below. `read_json`
# reads a file and holds it against its kind.

T = TypeVar("T")

# Of a text file that is read whole: the index of a very large checkpoint has some megabytes.
MAX_BYTES = 64 << 20
# What interpreting a value may fail with that is not what it should be, in code that does not check it.
MISFITS = (ArithmeticError, AttributeError, AssertionError, LookupError, RecursionError, TypeError, ValueError)


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A requirement of a value, in words and as a test."""

    words: str
    allows: Callable[[Any], bool]

    def hold(self, name: str, value: Any) -> None:
        """Raises ValueError, beginning with the name of the value, where it does not meet this."""
        try:
            met = self.allows(value)
        except ValueError as error:  # of a field of a record
            raise ValueError(f"{name} {error}") from error
        if not met:
            raise ValueError(f"{name} must be {self.words}, got {_shown(value)}.")


def whole(low: int, high: int) -> Rule:
    """A whole number from `low` to `high`."""
    return Rule(
        f"a whole number from {low:,} to {high:,}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def number(low: float, high: float, above: bool = False) -> Rule:
    """A finite number from `low` to `high`; with `above` not `low` itself."""
    return Rule(
        f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}",
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and low <= value <= high
            and not (above and value == low)
        ),
    )


def flag() -> Rule:
    """True or false."""
    return Rule("true or false", lambda value: isinstance(value, bool))


def text(most: int = 4096) -> Rule:
    """A text of at most so many characters."""
    return Rule(f"a text of at most {most:,} characters", lambda value: isinstance(value, str) and len(value) <= most)


def one_of(*choices: str) -> Rule:
    """One of some words."""
    return Rule(f"one of {choices}", lambda value: isinstance(value, str) and value in choices)


def optional(rule: Rule) -> Rule:
    """A value that meets a rule, or None."""
    return Rule(f"{rule.words}, or nothing", lambda value: value is None or rule.allows(value))


def list_of(rule: Rule, most: int, least: int = 0) -> Rule:
    """A list of such values."""
    count = f"{least:,} to {most:,}" if least else f"at most {most:,}"
    return Rule(
        f"a list of {count} values, each {rule.words}",
        lambda value: isinstance(value, list | tuple) and least <= len(value) <= most and all(map(rule.allows, value)),
    )


def table_of(rule: Rule) -> Rule:
    """A table from names to such values."""
    most = 1_000_000
    return Rule(
        f"a table of at most {most:,} entries, each {rule.words}",
        lambda value: (
            isinstance(value, Mapping)
            and len(value) <= most
            and all(isinstance(name, str) and rule.allows(entry) for name, entry in value.items())
        ),
    )


def plain(depth: int = 8) -> Rule:
    """Any value that JSON can say, nested at most `depth` deep."""
    return Rule(f"numbers, words, lists and tables nested at most {depth} deep", lambda value: _is_plain(value, depth))


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(entry, depth - 1) for entry in value)
    if isinstance(value, Mapping):
        return depth > 0 and all(isinstance(name, str) and _is_plain(value[name], depth - 1) for name in value)
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def record(kind: type) -> Rule:
    """A table with the fields of a class under `checked`."""

    def allows(value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        try:
            check(kind, value)
        except ValueError as error:
            raise ValueError(f"is wrong: {error}") from error
        return True

    return Rule(f"a table with {', '.join(one.name for one in fields(kind))}", allows)


def ruled(rule: Rule, default: Any = MISSING) -> Any:
    """A field with a rule; without a default it must be there."""
    return field(default=default, metadata={"rule": rule})


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except (RecursionError, ValueError):  # nested too deep; a number of too many digits
        return f"a {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:76]} .."


# --- kinds of files ---------------------------------------------------------------------------------------------------


def checked(kind: type[T]) -> type[T]:
    """`strict` of huggingface_hub for a dataclass, also for a configuration of transformers: every value is held
    against the rule and the type of its field, now and when it is set. What does not fit is a ValueError of one line
    that begins with the name of the field."""
    kind = strict(kind)
    set_value, initialize = kind.__setattr__, kind.__init__
    rules = {one.name: one.metadata["rule"] for one in fields(kind) if "rule" in one.metadata}

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name in rules:
            rules[name].hold(name, value)
        try:
            set_value(self, name, value)
        except StrictDataclassFieldValidationError as error:
            reason = " ".join(str(error.__cause__).split())[:200]
            raise ValueError(f"{name} does not fit ({reason}).") from error

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            initialize(self, *args, **kwargs)
        except StrictDataclassError as error:  # of fields that do not fit together
            raise ValueError(" ".join(str(error.__cause__ or error).split())) from error

    kind.__setattr__, kind.__init__ = __setattr__, __init__
    return kind


def check(kind: type[T], values: Any) -> T:
    """An object of a class under `checked`; fields that it does not know are left out.

    Raises:
        ValueError: no table, a field that is missing, or one that breaks its rule.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a table was expected, got {_shown(values)}.")
    for one in fields(kind):
        if one.name not in values and one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{one.name} is missing.")
    return kind(**{one.name: values[one.name] for one in fields(kind) if one.name in values})


# --- reading ----------------------------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike, most: int = MAX_BYTES) -> str:
    """A text file, whole.

    Raises:
        ValueError: more than so many bytes, or no UTF-8.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, too many for such a file; get another copy.")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged (byte {error.start} is no UTF-8); get another copy.") from error


def parse_json(content: str | bytes, where: object, kind: type | None = None) -> dict[str, Any]:
    """A JSON object, held against a class under `checked` if one is named -> all that it says.

    Raises:
        ValueError: no such object, or one that breaks a rule; it begins with `where`.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where} is damaged ({reason}); get another copy.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} is damaged (it holds a {type(values).__name__}, no table); get another copy.")
    if kind is not None:
        with named(where):
            check(kind, values)
    return values


def read_json(path: str | os.PathLike, kind: type | None = None) -> dict[str, Any]:
    """The object in a JSON file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(Path(path)), path, kind)


@contextmanager
def named(place: object) -> Iterator[None]:
    """Turns an error about a value inside into a ValueError of one line that begins with the file it is from."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{place} is damaged (it is nested too deep); get another copy.") from error
    except MISFITS as error:
        if isinstance(error, ValueError) and str(error).startswith(str(place)):
            raise
        raise ValueError(f"{place} is damaged: {_message(error)}; mend it, or get another copy.") from error


def _message(error: BaseException) -> str:
    message = " ".join(str(error).split())[:500].rstrip(".")
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"


def refuse_hidden(values: Collection[str], kind: type, known: Collection[str] = ()) -> None:
    """Raises ValueError where a name that a file gives would hide an attribute of a class.

    Args:
        values: the names.
        kind: the class.
        known: names that may.
    """
    for name in values:
        own = inspect.getattr_static(kind, name, None)
        settable = isinstance(own, property) and own.fset is not None
        if own is not None and not settable and name not in known:
            raise ValueError(f"{name} is no field; leave it out.")
