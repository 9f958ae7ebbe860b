"""The process of bulk tokenizing that is Ray's driver: it starts or joins Ray, and sends on what the workers make.

    tasks -> clips (tasks on CPUs) -> rows (a pool of actors that keep the model) -> the command, by `link`

Where the two steps in the middle ask for the same resources, as without a GPU, Ray Data makes one of them, and the
actors decode, too. A worker that is lost is replaced and its task done again; that is Ray's.

It is a process of its own because Ray takes over signals and the terminal, and ends what it was started in when its
server ends; the command then starts another (`bulk.driver`). Nothing of torch is imported here, so that Ray starts
while the command loads the model.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from .cluster import Pool, connect

if TYPE_CHECKING:
    import pyarrow as pa
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from .units import Chunk

# After so many deaths of a worker over the same video it is the video's fault.
DEATHS = 3


def main() -> None:
    """Entry point of the process. Its standard input ends when the command does."""
    link = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    serve(link)


def _end_with_the_command() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def serve(link: Connection) -> None:
    """Does one job. Receives what is `Wanted`, then what `RayProcess.chunks` is given, tasks pickled one by one; sends
    pairs of a word and more:

    "ready" and the `Pool`; "chunks" and a table of them, pickled; "done" and None. Or the end: "refused" and a reason,
    "lost" and what happened to Ray, "deadly" and the videos over which workers die.
    """
    try:
        pool = connect(link.recv())
    except ValueError as error:
        link.send(("refused", str(error)))
        return
    link.send(("ready", pool))
    encoder, decoder, tasks = link.recv()
    import ray

    ledger = ray.remote(Ledger).options(num_cpus=0).remote()
    rows = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    clips = rows.map_batches(
        decode,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"decoder": decoder, "ledger": ledger},
        num_cpus=pool.decode_cpus,
    )
    made = clips.map_batches(
        Encode,
        batch_size=1,
        batch_format="pyarrow",
        # By reference, so that the weights are sent once to a machine and need be nowhere but here.
        fn_constructor_kwargs={"encoder": [ray.put(encoder)], "pool": pool},
        compute=ray.data.ActorPoolStrategy(size=min(pool.workers, len(tasks))),
        **pool.resources,
    )
    try:
        for chunks in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            link.send(("chunks", chunks))
    except Exception as error:  # of Ray or of a worker
        traceback.print_exc()
        deadly = _deadly_videos(ledger)
        link.send(("deadly", deadly) if deadly else explain(error))
    else:
        link.send(("done", None))


def decode(tasks: pa.Table, decoder: bytes, ledger: ActorHandle) -> Iterator[pa.Table]:
    """The step of Ray Data from tasks to clips; tasks and chunks travel pickled, one a row."""
    import ray

    made = pickle.loads(decoder)
    for data in tasks["task"]:
        task = pickle.loads(data.as_buffer())
        name = (task.unit, task.number)
        # The task cannot go on without such a video, since Ray may have passed on clips of it already.
        if (key := ray.get(ledger.begin.remote(name))) is not None:
            raise RuntimeError(f"workers die over {key}")
        for chunk in made.run(task, lambda key, name=name: ray.get(ledger.at.remote(name, key))):
            yield _packed(chunk)


def _packed(chunk: Chunk) -> pa.Table:
    import pyarrow as pa

    return pa.table({"chunk": pa.array([pickle.dumps(chunk, protocol=5)], pa.large_binary())})


class Encode:
    """The step of Ray Data from clips to rows of a shard; an actor, which keeps the model."""

    def __init__(self, encoder: list[ObjectRef], pool: Pool):
        import ray

        self._encode = pickle.loads(ray.get(encoder[0]))(device=pool.device, threads=pool.threads)

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


def _deadly_videos(ledger: ActorHandle) -> set[tuple[int, str]]:
    import ray

    try:
        return ray.get(ledger.deadly.remote(), timeout=10)
    except ray.exceptions.RayError:  # it is gone with Ray
        return set()


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
