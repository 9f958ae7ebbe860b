"""Scripts as processes of their own, which talk to a Hub on the loopback interface.

    with ScriptRunner(hub, folder) as scripts:
        run = scripts.start(TRAINING / "train_router.py", ["--steps=1"])
        code, log = run.wait()

One process imports what all scripts need, once, with the settings of that Hub, which are read at import; every run is a
child of it. So runs start at once, can be killed, and know nothing of each other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


@dataclass
class Run:
    """A script under way."""

    runner: ScriptRunner
    pid: int
    log: Path

    def wait(self) -> tuple[int, str]:
        """Its exit code, minus the signal if it was killed, and all that it said."""
        code = self.runner.ask({"wait": self.pid})["code"]
        self.runner.running.discard(self.pid)
        return code, self.log.read_text()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait()[0] == -signal.SIGKILL


class ScriptRunner:
    """Starts scripts with the token and the address of a Hub."""

    def __init__(self, hub, folder: Path):
        self.hub, self.folder, self.count = hub, folder, 0
        self.running: set[int] = set()

    def __enter__(self) -> ScriptRunner:
        kept = {
            name: own for name, own in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS_"))
        }
        self.environment = kept | {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(SOURCE), str(Path(__file__).parents[2])]),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.folder,
        )
        return self

    def __exit__(self, *error) -> None:
        for pid in self.running:  # of a test that failed
            os.kill(pid, signal.SIGKILL)
            self.ask({"wait": pid})
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: dict) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, script: Path | str, argv: list, token: str | None = "") -> Run:
        """Starts a script, or a line of Python, with the token of the Hub, another one, or none."""
        self.count += 1
        log = self.folder / f"run-{self.count}.log"
        request = {"script": str(script), "argv": list(map(str, argv)), "log": str(log)}
        request["token"] = self.hub.token if token == "" else token
        run = Run(self, self.ask(request)["pid"], log)
        self.running.add(run.pid)
        return run

    def start_apart(self, script: Path, argv: list) -> subprocess.Popen[str]:
        """A script that starts processes itself, which look for its classes in the main module."""
        command = [sys.executable, str(script), *map(str, argv)]
        environment = self.environment | {"HF_TOKEN": self.hub.token}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=self.folder)

    def run(self, script: Path | str, argv: list, token: str | None = "") -> tuple[int, str]:
        return self.start(script, argv, token).wait()


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def _child(request: dict) -> None:
    import runpy
    import traceback

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if request["token"] is not None:
        os.environ["HF_TOKEN"] = request["token"]
    sys.argv = [request["script"], *request["argv"]]
    code = 0
    try:
        if request["script"].endswith(".py"):
            runpy.run_path(request["script"], run_name="__main__")
        else:
            exec(request["script"], {"argv": request["argv"]})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch
    from diffusers import DiffusionPipeline  # noqa: F401

    import evatok_hf.cli.commands
    import evatok_hf.data.streaming  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitpid(request["wait"], 0)[1]
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                _child(request)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
