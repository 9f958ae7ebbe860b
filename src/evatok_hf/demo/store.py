"""The folder of what visitors upload and get: how much it may hold."""

from __future__ import annotations

import threading
from pathlib import Path


class Store:
    """A folder that is kept below a size, by removing what is oldest.

    Args:
        folder: may not exist yet.
        most: bytes.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder = folder
        self._most, self._kept = most, set()
        self._one_at_a_time = threading.Lock()

    def keep(self) -> None:
        """Keeps for good what is there now: the examples."""
        self._kept = {path for path in self.folder.rglob("*") if path.is_file()}

    def make_room(self, size: int = 0) -> None:
        """Removes the oldest files until as many bytes are free."""
        with self._one_at_a_time:
            files = []
            for path in self.folder.rglob("*"):
                try:
                    status = path.stat()
                except FileNotFoundError:  # gradio removes what is old, too
                    continue
                if path.is_file() and path not in self._kept:
                    files.append((status.st_mtime, status.st_size, path))
            held = sum(bytes_ for _, bytes_, _ in files)
            for _, bytes_, path in sorted(files):
                if held + size <= self._most:
                    return
                path.unlink(missing_ok=True)
                held -= bytes_
