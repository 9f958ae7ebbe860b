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

    backend = "process"

    def __init__(
        self, path: str | os.PathLike[str], limits: Limits, on_frame: Callable[[], object] = lambda: None
    ) -> None:
        path = Path(path).absolute()
        try:
            limits.check_file(path)
        except UploadError as error:
            raise UploadError(f"{path.name}: {error}") from error
        self._path, self._limits, self._on_frame, self._patience = path, limits, on_frame, limits.patience
        self._folder = tempfile.TemporaryDirectory(prefix="evatok_upload_")
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        package = str(Path(evatok_hf.__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
        environment |= {"TMPDIR": self._folder.name, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        told = json.dumps(dataclasses.asdict(limits))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evatok_hf.demo.reader_process", str(path), told],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env=environment,
        )
        self._backend, self._jumper = self, None
        self._file = SimpleNamespace(name=path.name, close=self._end)
        try:
            _, header = self._receive()
            self._header = json.loads(header)
        except BaseException:
            self.close()
            raise
        self.fps, self.height, self.width = (self._header[name] for name in ("fps", "height", "width"))

    @property
    def num_frames(self) -> int:
        return self._header["num_frames"]

    def times(self) -> np.ndarray | None:
        times = self._header["times"]
        return None if times is None else np.array(times)

    def frames(self) -> Iterator[np.ndarray]:
        while True:
            kind, body = self._receive()
            if kind != b"F":
                return
            yield np.frombuffer(body, dtype=np.uint8).reshape(self.height, self.width, 3)
            self._on_frame()

    def image(self, frame: np.ndarray) -> np.ndarray:
        return frame

    def _receive(self) -> tuple[bytes, bytes]:
        """The next message; only the time that passes in here counts against the process."""
        started = time.monotonic()
        alarm = threading.Timer(self._patience, self._process.kill)
        alarm.start()
        try:
            head = self._process.stdout.read(MESSAGE.size)
            kind, size = MESSAGE.unpack(head) if len(head) == MESSAGE.size else (b"", 0)
            body = self._process.stdout.read(size)
        finally:
            alarm.cancel()
            self._patience -= time.monotonic() - started
        if kind == b"E":
            # the reader names the file by its path, which is the server's own affair
            reason = body.decode(errors="replace").removeprefix(f"{self._path}: ")
        elif kind and len(body) == size:
            return kind, body
        elif self._patience <= 0 or self._process.wait() == _OUT_OF_TIME != 0:
            reason = f"reading it took longer than {self._limits.patience:g} seconds: upload a smaller video"
        else:
            reason = "it could not be decoded: convert it, for example ffmpeg -i FILE -c:v libx264 out.mp4"
        raise UploadError(f"{self._path.name}: {reason}")

    def _end(self) -> None:
        self._process.kill()  # which does nothing to one that has ended
        self._process.stdout.close()
        self._process.wait()
        self._folder.cleanup()
