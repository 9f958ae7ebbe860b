"""The process of bulk tokenizing that is Ray's driver: it starts or joins Ray, and sends on what the workers make.

    tasks -> clips (tasks on CPUs) -> rows (a pool of actors that keep the model) -> the command, by `link`

Where the two steps in the middle ask for the same resources, as without a GPU, Ray Data makes one of them, and the
actors decode, too. A worker that is lost is replaced and its task done again; that is Ray's.

Why a process of its own. One that Ray was started in ends when Ray's server does, whatever it was about; signals call
Ray's handlers in it, and Ray's lines come out on its terminal. Here Ray may do all that, and the command starts another
(`bulk.driver`). Nothing of torch is imported here, so that Ray starts while the command loads the model.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from .cluster import Pool, connected

if TYPE_CHECKING:
    import pyarrow as pa
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.data import Dataset

    from .units import Chunk

# After so many deaths of a worker over the same video it is the video's fault.
DEATHS = 3


@dataclass(frozen=True)
class Job:
    """The work of the workers, pickled, since nothing of it is needed here.

    Attributes:
        tokenizer: a `VideoTokenizer`, on the CPU.
        encoder: the other arguments of `Encoder` but for device and threads.
        decoder: a `Decoder`.
    """

    tokenizer: bytes
    encoder: bytes
    decoder: bytes


def main() -> None:
    """Entry point of the process. Its standard input ends when the command does."""
    link = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    serve(link)


def _end_with_the_command() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def serve(link: Connection) -> None:
    """Does one job. Receives what is `Wanted`, then a `Job`, then tasks, pickled; sends pairs of a word and more:

    "ready" and the `Pool`; "chunks" and a table of them, pickled; "again" and videos over which workers die, after
    which it receives tasks again; "done" and None. Or the end: "refused" and a reason, "lost" and what happened to Ray.
    """
    try:
        with connected(link.recv()) as pool:
            link.send(("ready", pool))
            _work(link, pool, link.recv())
    except ValueError as error:
        link.send(("refused", str(error)))


def _work(link: Connection, pool: Pool, job: Job) -> None:
    import ray

    # By reference, so that the weights are sent once to a machine and need be nowhere but here.
    tokenizer = ray.put(job.tokenizer)
    deadly: frozenset[tuple[int, str]] = frozenset()
    while True:
        tasks = link.recv()
        ledger = ray.remote(Ledger).options(num_cpus=0).remote()
        try:
            made = _dataset(tasks, job, tokenizer, pool, ledger, deadly)
            for chunks in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
                link.send(("chunks", chunks))
        except Exception as error:  # of Ray or of a worker
            traceback.print_exc()
            found = _deadly_videos(ledger)
            if found <= deadly:
                link.send(explain(error))
                return
            link.send(("again", sorted(found - deadly)))
            deadly |= found
        else:
            link.send(("done", None))
            return
        ray.kill(ledger)


def _dataset(
    tasks: list[bytes],
    job: Job,
    tokenizer: ObjectRef,
    pool: Pool,
    ledger: ActorHandle,
    deadly: frozenset[tuple[int, str]],
) -> Dataset:
    import ray

    rows = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    clips = rows.map_batches(
        decode,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"decoder": job.decoder, "ledger": ledger, "deadly": deadly},
        num_cpus=pool.decode_cpus,
    )
    return clips.map_batches(
        Encode,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_kwargs={"tokenizer": [tokenizer], "encoder": job.encoder, "pool": pool},
        compute=ray.data.ActorPoolStrategy(size=min(pool.workers, len(tasks))),
        **pool.resources,
    )


def decode(
    tasks: pa.Table, decoder: bytes, ledger: ActorHandle, deadly: frozenset[tuple[int, str]]
) -> Iterator[pa.Table]:
    """The step of Ray Data from tasks to clips; tasks and chunks travel pickled, one a row."""
    import ray

    made = pickle.loads(decoder)
    left_out = dict.fromkeys(deadly, f"the worker process died {DEATHS} times while it read this video")
    for data in tasks["task"]:
        task = pickle.loads(data.as_buffer())
        name = (task.unit, task.number)
        if (key := ray.get(ledger.begin.remote(name))) is not None:
            raise DeadlyVideo(key)
        for chunk in made.run(task, left_out, lambda key, name=name: ray.get(ledger.at.remote(name, key))):
            yield _packed(chunk)


def _packed(chunk: Chunk) -> pa.Table:
    import pyarrow as pa

    return pa.table({"chunk": pa.array([pickle.dumps(chunk, protocol=5)], pa.large_binary())})


class Encode:
    """The step of Ray Data from clips to rows of a shard; an actor, which keeps the model."""

    def __init__(self, tokenizer: list[ObjectRef], encoder: bytes, pool: Pool):
        import ray

        from .workers import Encoder

        (made,) = ray.get(tokenizer)
        given: dict[str, Any] = pickle.loads(encoder)
        self._encode = Encoder(pickle.loads(made), **given, device=pool.device, threads=pool.threads)

    def __call__(self, chunks: pa.Table) -> pa.Table:
        (chunk,) = chunks["chunk"]
        return _packed(self._encode(pickle.loads(chunk.as_buffer())))


class Ledger:
    """A list of the videos that tasks are at, so that one that takes its worker down with it is found out; an actor."""

    def __init__(self) -> None:
        self._at: dict[tuple[int, int], str] = {}
        self._deaths: Counter[tuple[int, str]] = Counter()

    def begin(self, task: tuple[int, int]) -> str | None:
        """A task begins, or begins again where a worker died -> its video that they died over too often."""
        if task in self._at:
            video = (task[0], self._at.pop(task))
            self._deaths[video] += 1
            if self._deaths[video] >= DEATHS:
                return video[1]
        return None

    def at(self, task: tuple[int, int], key: str | None) -> None:
        """The task comes to a video, or (None) to its end."""
        if key is None:
            self._at.pop(task, None)
        else:
            self._at[task] = key

    def deadly(self) -> set[tuple[int, str]]:
        """Unit and key of the videos that workers died over too often."""
        return {video for video, deaths in self._deaths.items() if deaths >= DEATHS}


class DeadlyVideo(Exception):
    """Workers die over a video. Its task cannot go on without it, since Ray may have passed on clips of it already; it
    has to be begun anew."""


def _deadly_videos(ledger: ActorHandle) -> frozenset[tuple[int, str]]:
    import ray

    try:
        return frozenset(ray.get(ledger.deadly.remote(), timeout=10))
    except ray.exceptions.RayError:  # it is gone with Ray
        return frozenset()


def explain(error: BaseException) -> tuple[str, str]:
    """The word for an error, "lost" (Ray) or "refused" (a worker failed), and its reason in a line."""
    from ray.data.exceptions import SystemException
    from ray.exceptions import RayError, RayTaskError, UserCodeException

    chain = [error]
    while (cause := getattr(chain[-1], "cause", None) or chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    chain = [one for one in chain if not isinstance(one, SystemException)]  # a mark of Ray Data without a message
    of_a_worker = [one for one in chain if isinstance(one, RayTaskError | UserCodeException)]
    in_ray = isinstance(chain[-1], RayError) and chain[-1] not in of_a_worker
    failed = (of_a_worker and not in_ray) or any(getattr(one, "actor_init_failed", False) for one in chain)
    lines = str(chain[-1]).strip().splitlines() or ["no reason given"]
    reason = f"{type(chain[-1]).__name__}: {lines[-1 if failed else 0].strip()}"
    if not failed:
        return "lost", reason
    return "refused", f"a worker failed ({reason}); what is done is kept, repeat the command to go on."
