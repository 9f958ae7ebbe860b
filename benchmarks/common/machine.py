"""Description and peak speed of the machine, interleaved timing, launches, and peak memory."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from training.common.flops import matmul_peak, rate, synchronize
from training.common.reporting import peak_memory_gib


def machine_name() -> str:
    """The CPU in a few words, for tables."""
    return f"{os.cpu_count()} cores, {platform.machine()}"


def cpu_model() -> str:
    about = Path("/proc/cpuinfo")  # of Linux
    found = re.search(r"^model name\s*: (.*)", about.read_text() if about.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The facts about a machine that timings depend on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


@dataclass
class Peak:
    """Speeds reached in the same run: `flops` of a matrix product, `bandwidth` of a copy (read and write)."""

    flops: float
    bandwidth: float

    def shortest(self, flops: float, size: float) -> tuple[float, str]:
        """Roofline: the least seconds for so many operations and bytes, and which of the two it is that takes them."""
        compute, memory = flops / self.flops, size / self.bandwidth
        return (compute, "compute") if compute >= memory else (memory, "memory")


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> Peak:
    """Of a matrix product, and of copying more than caches hold."""
    source = torch.zeros((2**30 if device.type == "cuda" else 2**27) // 4, device=device)
    target = torch.ones_like(source)
    copied = rate(lambda: target.copy_(source), 2 * source.nbytes, device, seconds)
    return Peak(matmul_peak(device, dtype, seconds), copied)


def interleaved(
    functions: Mapping[Hashable, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    warmups: int = 1,
    budget: float = float("inf"),
) -> dict[Hashable, list[float]]:
    """Seconds of functions on a device that take turns, A B C A B C .., so that what else the machine does meanwhile
    hits all alike.

    The rounds that warm up are left out, but where they use up the budget: seconds by the wall after which no round is
    begun any more. There is at least one.
    """
    rounds: list[dict[Hashable, float]] = []
    begun = time.perf_counter()
    while len(rounds) < warmups + repeats and (not rounds or time.perf_counter() - begun < budget):
        rounds.append({})
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            rounds[-1][name] = time.perf_counter() - started
    return {name: [seconds[name] for seconds in rounds[warmups:] or rounds] for name in functions}


def launches(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels that a call launches on a GPU; on a CPU the operators of torch that it calls."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        call()
        synchronize(device)
    if device.type == "cuda":
        return sum("LaunchKernel" in event.name for event in found.events())
    return sum(event.cpu_parent is None and event.name.startswith("aten::") for event in found.events())


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function of a module, called in a new process, so that nothing lies in its memory yet. ValueError
    where that was killed, which is what happens where memory ends."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise ValueError(f"{function.__name__}{args} was killed; there is too little memory for it.") from error


def resident_bytes() -> int:
    """Of this process, now."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most bytes in use while a function runs, weights and all: of the GPU, or resident in this process.

    On the CPU that is the high-water mark since the process began where the system cannot set the mark back: call it in
    a process that did nothing larger.
    """
    marks = Path("/proc/self")  # of Linux
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or not allowed
        (marks / "clear_refs").write_text("5")  # sets the mark back to what is resident now
    function()
    synchronize(device)
    if device.type == "cpu" and marks.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", (marks / "status").read_text())[1])
    return round(peak_memory_gib(device) * 2**30)
