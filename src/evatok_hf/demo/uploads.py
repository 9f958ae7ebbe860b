"""Uploaded videos, read through a process of their own that has little memory and little time."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import evatok_hf

from ..video.read import VideoReader
from .limits import Limits, UploadError
from .reader_process import MESSAGE

# What the process needs of the environment; tokens and keys of the server are none of its business.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "SYSTEMROOT", "VIRTUAL_ENV")
_OUT_OF_TIME = -getattr(signal, "SIGXCPU", 0)  # exit code of a process that used up its processor time
_NOT_OURS = "it could not be decoded: convert it, for example ffmpeg -i FILE -c:v libx264 out.mp4"


class UploadedVideo(VideoReader):
    """An upload as a video that can be run through once; a context manager.

    The file is checked against the limits first, its header next, and then decoded, frame by frame as they are asked
    for, in another process, which is ended when it takes too long.

    Args:
        path: of the upload; its last part is the name that the visitor knows.
        limits: what is taken.
        on_frame: called after each frame; what it raises ends the reading.

    Raises:
        UploadError: a file that is refused or cannot be read; also on the way, where decoding fails. One line that
            begins with the name of the file.
    """

    def __init__(
        self, path: str | os.PathLike[str], limits: Limits, on_frame: Callable[[], object] = lambda: None
    ) -> None:
        name = Path(path).name
        try:
            limits.check_file(path)
            self._backend = _Reader(Path(path), limits, on_frame)
        except UploadError as error:
            raise UploadError(f"{name}: {error}") from error
        self._jumper = None
        self._file = SimpleNamespace(name=name, close=self._backend.close)
        self.backend = "process"
        header = self._backend.header
        self.fps, self.height, self.width = header["fps"], header["height"], header["width"]


class _Reader:
    """The decoder of a `VideoReader`, at the other end of a pipe."""

    def __init__(self, path: Path, limits: Limits, on_frame: Callable[[], object]) -> None:
        self._path, self._limits, self._on_frame = path, limits, on_frame
        self._waited, self._waits_since, self._late = 0.0, None, False
        self._folder = tempfile.TemporaryDirectory(prefix="evatok_upload_")
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        package = str(Path(evatok_hf.__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
        environment |= {"TMPDIR": self._folder.name, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        told = json.dumps(dataclasses.asdict(limits))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evatok_hf.demo.reader_process", str(path.absolute()), told],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env=environment,
        )
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            kind, body = self._receive()
            if kind != b"H":
                raise UploadError(_NOT_OURS)
            self.header = json.loads(body)
        except BaseException:
            self.close()
            raise

    def num_frames(self) -> int:
        return self.header["num_frames"]

    def times(self) -> np.ndarray | None:
        times = self.header["times"]
        return None if times is None else np.array(times)

    def frames(self) -> Iterator[np.ndarray]:
        shape = (self.header["height"], self.header["width"], 3)
        try:
            while True:
                kind, body = self._receive()
                if kind != b"F":
                    return
                yield np.frombuffer(body, dtype=np.uint8).reshape(shape)  # (H, W, 3)
                self._on_frame()
        except UploadError as error:
            raise UploadError(f"{self._path.name}: {error}") from error

    def image(self, frame: np.ndarray) -> np.ndarray:
        return frame

    def close(self) -> None:
        self._closed.set()
        if self._process.poll() is None:
            self._process.kill()
        self._process.stdout.close()
        self._process.wait()
        self._folder.cleanup()

    def _receive(self) -> tuple[bytes, bytes]:
        """The next message; only the time that passes in here counts against the process."""
        self._waits_since = time.monotonic()
        try:
            return self._read_message()
        finally:
            self._waited += time.monotonic() - self._waits_since
            self._waits_since = None

    def _read_message(self) -> tuple[bytes, bytes]:
        head = self._process.stdout.read(MESSAGE.size)
        if len(head) == MESSAGE.size:
            kind, size = MESSAGE.unpack(head)
            body = self._process.stdout.read(size)
            if len(body) == size:
                if kind == b"E":
                    # the reader names the file by its path, which is the server's own affair
                    message = body.decode(errors="replace")
                    raise UploadError(message.removeprefix(f"{self._path.absolute()}: "))
                return kind, body
        code = self._process.wait()
        if self._late or code == _OUT_OF_TIME != 0:
            raise UploadError(f"reading it took longer than {self._limits.patience:g} seconds: upload a smaller video")
        raise UploadError(_NOT_OURS)

    def _watch(self) -> None:
        while not self._closed.wait(0.2):
            since = self._waits_since
            if since is not None and self._waited + time.monotonic() - since > self._limits.patience:
                self._late = True
                self._process.kill()
                return
