"""Signals end a command with one word, the right exit code and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WRITING = """
import sys, time
from evatok_hf.interrupts import stop_on_signals
from evatok_hf.models.files_evatok import Replacement

stop_on_signals()
with Replacement(sys.argv[1]) as partial:
    partial.write_text("half")
    print("ready", flush=True)
    {wait}
"""
DEAF = """while True:
        try:
            print("busy", flush=True)
            time.sleep(60)
        except BaseException:
            print("not now", flush=True)
"""


def start(target: Path, wait: str = "time.sleep(60)", **options) -> subprocess.Popen:
    script = WRITING.format(wait=wait)
    process = subprocess.Popen(
        [sys.executable, "-c", script, target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "word"),
    [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Terminated"), (signal.SIGHUP, "Hangup")],
)
def test_a_signal_leaves_nothing_and_says_one_word(tmp_path, number, word):
    # a shell that puts the tests into the background has SIGINT ignored
    process = start(tmp_path / "out.txt", preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    process.send_signal(number)
    assert process.communicate(timeout=20)[1] == f"{word}\n"
    assert process.returncode == 128 + number
    assert os.listdir(tmp_path) == []


def test_the_same_signal_again_ends_what_does_not_listen(tmp_path):
    process = start(tmp_path / "out.txt", DEAF)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "not now\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "Terminated\n"
    assert process.returncode == 143
    assert os.listdir(tmp_path) == []


def test_an_ignored_hangup_stays_ignored(tmp_path):
    def as_nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = start(tmp_path / "out.txt", "input()", stdin=subprocess.PIPE, preexec_fn=as_nohup)
    process.send_signal(signal.SIGHUP)
    assert process.communicate("\n", timeout=20)[1] == ""
    assert process.returncode == 0 and (tmp_path / "out.txt").read_text() == "half"


def test_what_a_killed_process_left_is_removed_but_not_what_is_being_written(tmp_path):
    killed, alive = start(tmp_path / "out.txt"), start(tmp_path / "out.txt", "input()", stdin=subprocess.PIPE)
    other = start(tmp_path / "other.txt")
    for process in (killed, other):
        process.kill()
        process.communicate(timeout=20)
    assert len(os.listdir(tmp_path)) == 3
    next_one = start(tmp_path / "out.txt", "pass")
    next_one.communicate(timeout=20)
    left = sorted(os.listdir(tmp_path))
    assert [name.startswith((".other.txt.", ".out.txt.")) for name in left] == [True, True, False]
    assert (tmp_path / left[1] / "out.txt").read_text() == "half"
    assert alive.communicate("\n", timeout=20)[1] == ""
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".other")] == ["out.txt"]


def test_a_signal_is_heard_while_the_commands_are_imported(tmp_path):
    (tmp_path / "typer.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from evatok_hf.cli import main; main()",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "Terminated\n" and process.returncode == 143
