"""Ray as the command of bulk tokenizing sees it: a process that is given a job and gives tables, and that may die."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cluster import Pool, Wanted

if TYPE_CHECKING:
    from .units import Chunk, Task

_MAIN = "from evatok_hf.bulk.ray_data import main; main()"


class RayLost(Exception):
    """Ray, or the process that drives it, is gone or does not answer; what it had under way can be done again."""


class DeadlyVideos(Exception):
    """Workers die over `videos`, a set of units and keys; the rest can be done again without them."""

    def __init__(self, videos: frozenset[tuple[int, str]]):
        super().__init__(videos)
        self.videos = videos


class RayProcess(AbstractContextManager):
    """A process with Ray, which starts at once, does one job and ends with the block; a context manager.

    All that Ray says is appended to `log`.
    """

    def __init__(self, wanted: Wanted, log: Path):
        self._link, theirs = Pipe()
        # The same modules as here, in Ray's workers, too.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs, log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is the command's
            )
        with suppress(RayLost):  # which the first answer tells
            self._send(wanted)

    def pool(self) -> Pool:
        """The workers that there are, once Ray runs. Raises ValueError where it cannot; RayLost."""
        return self._receive()[1]

    def chunks(self, encoder: bytes, decoder: bytes, tasks: Sequence[Task]) -> Iterator[Chunk]:
        """The chunks that the workers make of tasks, in any order.

        Args:
            encoder: a function of a device and a number of threads that gives an `Encoder`, pickled.
            decoder: a `Decoder`, pickled.
            tasks: of the decoder.

        Raises:
            ValueError: a worker that failed for another reason than being lost or than its videos.
            RayLost, DeadlyVideos: what the tasks that are not complete gave is to be forgotten.
        """
        self._send((encoder, decoder, [pickle.dumps(task) for task in tasks]))
        while (received := self._receive())[0] != "done":
            yield from (pickle.loads(chunk.as_buffer()) for chunk in received[1]["chunk"])

    def _send(self, what: Any) -> None:
        try:
            self._link.send(what)
        except OSError as error:
            raise RayLost("its process ended") from error

    def _receive(self) -> tuple[str, Any]:
        try:
            word, more = self._link.recv()
        except (EOFError, OSError) as error:
            raise RayLost("its process ended") from error
        if failure := {"lost": RayLost, "deadly": DeadlyVideos, "refused": ValueError}.get(word):
            raise failure(more)
        return word, more

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:  # with all that Ray started, which is in its group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._link.close()
