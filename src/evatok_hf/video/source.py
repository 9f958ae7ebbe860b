"""Sources of videos: paths, URLs, bytes and binary file objects, and a check that a file is whole."""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
import weakref
from typing import BinaryIO

from ..models.files_evatok import pipe
from .source_files import printable

Source = str | os.PathLike[str] | bytes | BinaryIO

# ISO 14496-12: the kinds of box that an mp4 or mov file may begin with.
BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
EBML = b"\x1aE\xdf\xa3"  # Matroska and WebM


class VideoReadError(ValueError):
    """The error of a video that cannot be read; one line with the file, the cause and what to do."""


class SourceFile:
    """A source that is read: a path, or bytes that become a temporary file only where a reader needs a path.

    A pipe, standard input for "-", and what a URL names becomes a temporary file at once. decord's own way of reading
    bytes runs past their end in a truncated file and takes the process with it.
    """

    def __init__(self, source: Source) -> None:
        self._data: bytes | None = None
        self._path: str | None = None
        self._remove = lambda: None
        if isinstance(source, bytes | bytearray | memoryview):
            self._data, self.name = bytes(source), f"<{len(source)} bytes>"
        elif hasattr(source, "read"):
            self.name = f"<file object {getattr(source, 'name', '') or type(source).__name__}>"
            self._spool(source)
        elif is_url(source):
            self.name = printable(source)
            self._fetch(source)
        elif (stream := pipe(source)) is not None:
            self.name = printable(source)
            with stream:
                self._spool(stream)
        elif isinstance(source, str | os.PathLike):
            # From the root on, so that FFmpeg takes what stands before a colon for no protocol.
            self._path, self.name = os.path.join(os.getcwd(), source), printable(source)
            if not os.path.isfile(self._path):
                what = "is a folder" if os.path.isdir(self._path) else "no such file"
                raise VideoReadError(f"{self.name}: {what}: give the path of a video file")
        else:
            raise VideoReadError(f"cannot read a video from a {type(source).__name__}: give a path, bytes or a file")
        try:
            with self.open() as stream:
                self.size = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                self.head = stream.read(64)
                if self.size == 0:
                    raise VideoReadError(f"{self.name}: the file is empty (0 bytes): copy or record it again")
                self.cut = announced_size(stream, self.head, self.size) > self.size
        except OSError as error:
            raise VideoReadError(f"{self.name}: cannot be opened ({error.strerror}): check its permissions") from error

    def open(self) -> BinaryIO:
        return io.BytesIO(self._data) if self._path is None else open(self._path, "rb")

    def for_pyav(self) -> str | BinaryIO:
        return self.open() if self._path is None else self._path

    def path(self) -> str:
        """A path to the whole of it, made now if there is none."""
        if self._path is None:
            self._spool(io.BytesIO(self._data))
        return self._path

    def _fetch(self, url: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise VideoReadError(f"{self.name}: URLs are read through fsspec: install it, or download it") from error
        try:
            with fsspec.open(url, "rb") as stream:
                self._spool(stream)
        except ImportError as error:  # fsspec says what knows the protocol
            raise VideoReadError(f"{self.name}: cannot be fetched ({error}): install that, or download it") from error
        except Exception as error:  # of whatever library knows the protocol
            cause = " ".join(str(error).split()) or type(error).__name__
            raise VideoReadError(f"{self.name}: cannot be fetched ({cause}): check the address") from error

    def _spool(self, stream: BinaryIO) -> None:
        if isinstance(stream, io.TextIOBase):
            raise VideoReadError(f"{self.name}: is open as text: open it with mode 'rb'")
        handle, path = tempfile.mkstemp(prefix="evatok_", suffix=".video")
        self._remove = weakref.finalize(self, os.unlink, path)  # also when nobody calls close
        with os.fdopen(handle, "wb") as out:
            shutil.copyfileobj(stream, out)
        self._path = path

    def close(self) -> None:
        self._remove()


def is_url(source: object) -> bool:
    """True for what is fetched, by whatever protocol."""
    return isinstance(source, str) and _URL.match(source) is not None and not os.path.exists(source)


def announced_size(stream: BinaryIO, head: bytes, size: int) -> int:
    """The length in bytes that a container's own header gives the file, 0 where it gives none.

    A truncated file often decodes without complaint as a shorter video; its header is the only witness.
    """
    if head[4:8] in BOXES:  # each is its size, its type, its body
        offset = 0
        while offset + 8 <= size:
            stream.seek(offset)
            box = stream.read(16)
            length = int.from_bytes(box[:4], "big")
            if length == 1 and len(box) == 16:
                length = int.from_bytes(box[8:], "big")
            if length < 8:  # 0: "to the end of the file"; anything else is no box
                break
            offset += length
        return offset
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8
    if head[:4] == EBML:  # Matroska (RFC 8794): EBML header, then one Segment, sizes as variable integers
        length, used = _ebml_size(head, 4)
        start = 4 + used + length
        stream.seek(start)
        segment = stream.read(12)
        length, used = _ebml_size(segment, 4)
        unknown = used and length == (1 << 7 * used) - 1  # a live stream
        return 0 if unknown or segment[:4] != b"\x18S\x80g" else start + 4 + used + length
    return 0


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """EBML variable integer at `at` -> (value, bytes used); (0, 0) where there is none."""
    first = data[at] if at < len(data) else 0
    used = 9 - first.bit_length() if first else 0
    value = int.from_bytes(data[at : at + used], "big") & ((1 << 7 * used) - 1) if used else 0
    return value, used
