"""The folder of what visitors upload and get: how much it may hold."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path


class Store:
    """A folder that is kept below a size, by removing what is oldest.

    Args:
        folder: may not exist yet.
        most: bytes.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._kept: set[Path] = set()
        self._one_at_a_time = threading.Lock()

    def keep(self) -> None:
        """Keeps for good what is there now: the examples."""
        self._kept = set(self._folder.rglob("*"))

    def make_room(self, size: int = 0) -> None:
        """Removes the oldest files until as many bytes are free."""
        with self._one_at_a_time:
            files = []
            for path in set(self._folder.rglob("*")) - self._kept:
                with contextlib.suppress(FileNotFoundError):  # gradio removes what is old, too
                    if path.is_file():
                        files.append((path.stat().st_mtime, path.stat().st_size, path))
            held = sum(size for _, size, _ in files)
            for _, freed, path in sorted(files):
                if held + size <= self._most:
                    return
                path.unlink(missing_ok=True)
                held -= freed
