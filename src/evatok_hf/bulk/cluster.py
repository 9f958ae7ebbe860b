"""The machines of bulk tokenizing: Ray started here or joined, and what the workers are given of it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wanted:
    """The workers that are asked for; see `BulkOptions`."""

    device: str
    workers: int | None
    threads: int
    address: str | None


@dataclass(frozen=True)
class Pool:
    """The workers: actors that encode."""

    workers: int
    device: str  # of each; Ray shows it no GPU but its own
    threads: int  # of each, where that is a CPU
    machines: int
    accelerator: str  # name of the GPUs, "" where Ray does not know it

    @property
    def resources(self) -> dict[str, float]:
        """The resources that Ray keeps for an actor."""
        return {"num_gpus": 1} if self.device == "cuda" else {"num_cpus": self.threads}

    @property
    def decode_cpus(self) -> int:
        """CPUs that Ray keeps for a task that decodes; without a GPU those of an actor, so that both become one."""
        return 1 if self.device == "cuda" else self.threads

    @property
    def block_bytes(self) -> int:
        """Bytes that travel in one piece: clips to a GPU, else rows to the driver, about a thousand."""
        return 32 << 20 if self.device == "cuda" else 1 << 20

    def __str__(self) -> str:
        on = f"{self.machines} machines" if self.machines > 1 else "one machine"
        if self.device == "cuda":
            return f"{self.workers} x {self.accelerator or 'GPU'} of {on}"
        what = "mps" if self.device == "mps" else f"{platform.machine()} CPU"
        return f"{self.workers} worker(s) with {self.threads} thread(s) each on {on} ({what})"


def connect(wanted: Wanted) -> Pool:
    """Joins or starts Ray, for as long as this process lasts, and sets Ray Data up as it suits this. Raises ValueError
    where there is no such cluster, or less than is asked for."""
    import ray
    from ray.data import DataContext

    # Nothing is reported to anyone unless the user has turned it on.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = wanted.address
    given: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    if not address and wanted.workers is not None and not wanted.device.startswith("cuda"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given["num_cpus"] = max(wanted.workers * wanted.threads, cores)
    try:
        ray.init(**given, ignore_reinit_error=True)
    except Exception as error:  # Ray raises what it likes here
        reason = f"({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
        if address:
            raise ValueError(
                f"no Ray cluster answers at {address} {reason}; check the address, and that Ray and Python have the "
                "same versions there."
            ) from error
        raise ValueError(f"Ray does not start on this machine {reason}; what it said is in the log.") from error
    pool = choose_pool(wanted)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = pool.block_bytes
    context.execution_no_progress_timeout_s = -1  # none: a task of long whole videos may take hours
    return pool


def choose_pool(wanted: Wanted) -> Pool:
    """The workers that are asked for, of what Ray has. Raises ValueError where it has less."""
    import ray

    device, threads = wanted.device, wanted.threads
    found = ray.cluster_resources()
    gpus, cpus = int(found.get("GPU", 0)), int(found.get("CPU", 0))
    if device.startswith("cuda:"):
        raise ValueError(f"Ray gives each worker a GPU of its own, so {device} cannot be kept; give cuda.")
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise ValueError("device cuda is not available, Ray finds no GPU; choose cpu or auto.")
    if device not in ("cpu", "cuda"):
        from ..models.checkpoint_evatok import resolve_device  # with torch, which takes seconds

        resolve_device(device)
    most = {"cuda": gpus, "mps": 1}.get(device, cpus // threads)
    workers = most if wanted.workers is None else wanted.workers
    if not 1 <= workers <= most:
        have = {"cuda": f"{gpus} GPU(s)", "mps": "one GPU"}.get(device, f"{cpus} CPU(s)")
        raise ValueError(
            f"{max(workers, 1)} worker(s) with {threads} thread(s) each are more than the {have} that Ray has; ask for "
            "fewer."
        )
    machines = sum(1 for node in ray.nodes() if node["Alive"])
    names = [name.partition(":")[2] for name in found if name.startswith("accelerator_type:")]
    return Pool(workers, device, threads, machines, " and ".join(names))
