"""benchmarks/common/machine.py: turns, peaks, processes of their own, devices."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from benchmarks.common import machine

CPU = torch.device("cpu")


def rise_of_peak(mebibytes: int) -> int:
    before = machine.resident_bytes()
    return machine.peak_bytes(lambda: torch.ones(mebibytes * 2**18), CPU) - before


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_least_time_is_that_of_the_slower_part():
    peak = machine.Peak(flops=100.0, bandwidth=10.0)
    assert peak.shortest(500, 10) == (5.0, "compute")
    assert peak.shortest(500, 100) == (10.0, "memory")


def test_functions_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = machine.interleaved(functions, CPU, repeats=3, warmups=1)
    assert "".join(calls) == "abababab"
    assert list(timings) == ["a", "b"] and all(len(seconds) == 3 for seconds in timings.values())


def test_where_the_budget_is_used_up_the_first_round_counts():
    calls = []
    timings = machine.interleaved({"a": lambda: calls.append("a")}, CPU, repeats=3, budget=0.0)
    assert calls == ["a"] and len(timings["a"]) == 1


def test_peak_memory_counts_what_is_freed_again():
    assert 200 * 2**20 <= machine.in_fresh_process(rise_of_peak, 200) < 300 * 2**20


def test_a_killed_process_is_told():
    with pytest.raises(ValueError, match="too little memory"):
        machine.in_fresh_process(be_killed)
