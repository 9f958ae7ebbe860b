"""The machine that a benchmark runs on: its name, what it reaches at best, and fair timing of alternatives on it."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def machine_name(device: torch.device) -> str:
    """What to write beside a number that was measured on that device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type}, {platform.machine()}"
    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.machine()}"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the runs that fit the time."""
    work()
    wait(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def copy_bandwidth(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes a second, read and written, of a copy that fits no cache."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, seconds)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device, seconds)


def interleaved(
    work: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Times alternatives in turn, so that what else the machine does falls on all of them.

    Returns:
        Seconds of the first run of each, which compiles and fills caches; seconds of each in every round.
    """
    first, times = {}, {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            wait(device)
            passed = time.perf_counter() - start
            if turn:
                times[name].append(passed)
            else:
                first[name] = passed
    return first, times


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over rounds."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
