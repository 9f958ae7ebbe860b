"""The demo as its visitors meet it: a server in a process of its own, and pages of a real browser."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

import evatok_hf

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 120_000  # ms; a busy machine is no failure


def _browser_path() -> str | None:
    spec = importlib.util.spec_from_file_location("install_browser", ROOT / "tools" / "install_browser.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_browser()


@dataclass
class Server:
    url: str
    process: psutil.Process

    def memory(self) -> int:
        """Bytes that the server and the processes that it started hold."""
        total = self.process.memory_info().rss
        for child in self.process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total


@dataclass
class Visitor:
    """A page, and everything that happened in it."""

    page: object
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    @property
    def panel(self):
        """What the chosen tab shows."""
        return self.page.locator("[role=tabpanel]:visible")

    def upload(self, path: Path, arrives: bool = True) -> None:
        """Replaces the video of the chosen tab, and waits until it is there unless it will be refused."""
        clear = self.panel.locator(".upload").get_by_role("button", name="Clear", exact=True)
        if clear.count():
            clear.first.click()
        self.panel.locator("input[type=file]").first.set_input_files(str(path))
        if arrives:
            clear.first.wait_for()

    def press(self, name: str) -> None:
        self.panel.get_by_role("button", name=name, exact=True).click()

    def headline(self, words: str) -> str:
        """Waits for a result with these words, and gives the whole summary."""
        found = self.panel.locator(".block.summary .headline").filter(has_text=words)
        found.wait_for(timeout=PATIENCE)
        return self.panel.locator(".block.summary").inner_text()

    def alert(self, words: str = "") -> str:
        """Waits for the message with these words of something that did not work, and gives it; closes all messages."""
        message = self.page.get_by_test_id("toast-text").filter(has_text=re.compile(re.escape(words), re.IGNORECASE))
        message.first.wait_for(timeout=PATIENCE)
        text = message.first.inner_text()
        self.close_alerts()
        return text

    def close_alerts(self) -> None:
        close = "document.querySelectorAll('[data-testid=toast-close]').forEach(button => button.click())"
        self.page.evaluate(close)
        self.page.wait_for_function("!document.querySelector('[data-testid=toast-close]')")


@contextmanager
def running_server(folder: Path, *options: str, before: str = "") -> Iterator[Server]:
    """`evatok demo` on a free port; `before` is Python that runs first."""
    source = str(Path(evatok_hf.__file__).parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # the browser needs a core, too
        "TMPDIR": str(folder),
    }
    code = f"{before}\nfrom evatok_hf.cli import main; main()"
    command = [sys.executable, "-c", code, "demo", "--port", "0", "--json", *options]
    with open(folder / "server.log", "w+b") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=folder, env=environment)
        try:
            line = server.stdout.readline()
            if not line:
                log.seek(0)
                raise RuntimeError(f"the demo did not start: {log.read().decode()[-2000:]}")
            yield Server(json.loads(line)["url"], psutil.Process(server.pid))
        finally:
            server.terminate()
            server.wait(timeout=60)


@contextmanager
def running_browser() -> Iterator[object]:
    path = _browser_path()
    if path is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium (`make test` does so as root)")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visiting(browser, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Visitor]:
    """A visitor of their own (cookies, storage) with the page open; leaves without errors or requests elsewhere."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    visitor = Visitor(page)
    page.on("request", lambda request: visitor.requests.append(request.url))
    page.on("console", lambda message: message.type == "error" and visitor.errors.append(message.text))
    page.on("pageerror", lambda error: visitor.errors.append(str(error)))
    try:
        page.goto(url)
        page.get_by_role("tab", name="Reconstruct").wait_for()
        yield visitor
        outside = [there for there in visitor.requests if not there.startswith((url, f"blob:{url}", "data:"))]
        assert outside == []
        assert visitor.errors == []
    finally:
        context.close()


def wait_until(condition, seconds: float = 30) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.5)
    return bool(condition())
