"""The process that reads one upload: python -m evatok_hf.demo.reader_process VIDEO LIMITS

A decoder that is fed by strangers may crash, hang or ask for more memory than there is; here that ends this process
only. It writes messages to its standard output, each a letter, a length of four bytes and so many bytes: H the header
as JSON, F a frame (height x width x 3 bytes), E one line that says why the video is refused, Z the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from typing import BinaryIO

from .limits import Limits

MESSAGE = struct.Struct(">cI")


def main() -> None:
    path, limits = sys.argv[1], Limits(**json.loads(sys.argv[2]))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no message
    try:
        _restrict(limits)
        _read(path, limits, out)
        _send(out, b"Z")
    except ValueError as error:
        _send(out, b"E", str(error).encode())
    except MemoryError:
        _send(out, b"E", b"it takes more memory to decode than an upload may have: make the video smaller")


def _read(path: str, limits: Limits, out: BinaryIO) -> None:
    from ..video.read import open_video, probe_video

    limits.check_header(probe_video(path))
    with open_video(path) as video:
        limits.check_size(video.height, video.width)
        times = video.times()
        header = {name: getattr(video, name) for name in ("fps", "num_frames", "height", "width")}
        header["times"] = None if times is None else times.tolist()
        _send(out, b"H", json.dumps(header).encode())
        for count, frame in enumerate(video.iter_chunks(1), start=1):
            limits.check_count(count)
            _send(out, b"F", frame.data)


def _send(out: BinaryIO, kind: bytes, body: bytes | memoryview = b"") -> None:
    out.write(MESSAGE.pack(kind, memoryview(body).nbytes))
    out.write(body)
    out.flush()


def _restrict(limits: Limits) -> None:
    """Memory and processor time, where the system has such limits; the clock is the caller's."""
    try:
        import resource
    except ImportError:  # Windows
        return
    seconds = int(limits.patience) + 1
    for kind, most in (
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        # Fails where less is allowed already, and on macOS, which does not limit memory. The soft limit of time sends
        # a signal that tells what happened.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most + 1))


if __name__ == "__main__":
    main()
