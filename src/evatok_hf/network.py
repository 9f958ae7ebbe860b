"""What went wrong on the way to the Hub, and whether asking again may help."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
WAITS = (1.0, 4.0)  # seconds before a second and a third try


def again(
    action: Callable[[], T], worth_it: Callable[[BaseException], bool], waits: Sequence[float] | None = None
) -> T:
    """The result of `action`, which is done again after each of the waits where its error is `worth_it`."""
    for wait in WAITS if waits is None else waits:
        try:
            return action()
        except Exception as error:
            if not worth_it(error):
                raise
            time.sleep(wait)
    return action()


def is_of_the_network(error: BaseException) -> bool:
    """Whether an error comes from a request: no answer, or one that refuses."""
    return any(isinstance(cause, HfHubHTTPError | ConnectionError | TimeoutError) for cause in causes(error)) or any(
        _of_the_client(cause) for cause in causes(error)
    )


def is_transient(error: BaseException) -> bool:
    """Whether it is an error of the network that may be gone at the next try."""
    code = status(error)
    return is_of_the_network(error) and (code is None or code >= 500 or code in (408, 429))


def is_cut(error: BaseException) -> bool:
    """Whether a connection ended that had been there; an unreachable Hub is no such error."""
    return any(
        isinstance(cause, ConnectionResetError | ConnectionAbortedError | BrokenPipeError)
        or (_of_the_client(cause) and type(cause).__name__ in ("ReadError", "WriteError", "RemoteProtocolError"))
        for cause in causes(error)
    )


def status(error: BaseException) -> int | None:
    """The status code of the answer, None where there was no answer."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if response is not None:
            return response.status_code
    return None


def causes(error: BaseException) -> list[BaseException]:
    """The error, and those that it was raised from."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain


def one_line(error: BaseException) -> str:
    """The first line of its message, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _of_the_client(error: BaseException) -> bool:
    # huggingface_hub lets errors of its HTTP client through; of which library depends on its version
    return type(error).__module__.partition(".")[0].rstrip("2") in ("httpx", "httpcore")
