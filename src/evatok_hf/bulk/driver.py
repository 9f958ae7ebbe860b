"""Ray as the command of bulk tokenizing sees it: a process that is given a job and gives tables, and that may die."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cluster import Pool, Wanted
from .ray_data import Job

if TYPE_CHECKING:
    from .units import Chunk, Task

_MAIN = "from evatok_hf.bulk.ray_data import main; main()"


class RayLost(Exception):
    """Ray, or the process that drives it, is gone or does not answer; what it had under way can be done again."""


class RayProcess(AbstractContextManager):
    """A process with Ray, which starts at once and ends with the block; a context manager.

    Args:
        wanted: the workers.
        log: file that gets all that Ray says. It is appended to.
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
        return self._receive("ready")[1]

    def chunks(
        self, job: Job, tasks: Callable[[], Sequence[Task]], deadly: Callable[[list[tuple[int, str]]], None]
    ) -> Iterator[Chunk]:
        """The chunks that the workers make of tasks, in any order.

        Args:
            job: what they do.
            tasks: asked for the tasks that are left, again where videos are left out.
            deadly: told of these, by unit and key.

        Raises:
            ValueError: a worker that failed for another reason than being lost or than its videos.
            RayLost: what the tasks that are not complete gave is to be forgotten.
        """
        self._send(job)
        self._send([pickle.dumps(task) for task in tasks()])
        while True:
            word, more = self._receive("chunks", "again", "done")
            if word == "chunks":
                yield from (pickle.loads(chunk.as_buffer()) for chunk in more["chunk"])
            elif word == "done":
                return
            else:
                deadly(more)
                self._send([pickle.dumps(task) for task in tasks()])

    def _send(self, what: Any) -> None:
        try:
            self._link.send(what)
        except OSError as error:
            raise RayLost("its process ended") from error

    def _receive(self, *words: str) -> tuple[str, Any]:
        try:
            word, more = self._link.recv()
        except (EOFError, OSError) as error:
            raise RayLost("its process ended") from error
        if word == "lost":
            raise RayLost(more)
        if word == "refused":
            raise ValueError(more)
        assert word in words
        return word, more

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:  # with all that Ray started, which is in its group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._link.close()
