"""Errors on the way to the Hub, and which of them may be gone at another try."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError

from ..models.checkpoint_evatok import causes, of_the_client


def is_of_the_network(error: BaseException) -> bool:
    """Tells whether an error comes from a request: no answer, or a refusal."""
    known = HfHubHTTPError | ConnectionError | TimeoutError
    return any(isinstance(cause, known) or of_the_client(cause) for cause in causes(error))


def is_transient(error: BaseException) -> bool:
    """Tells whether an error of the network may be gone at the next try."""
    code = status(error)
    return is_of_the_network(error) and (code is None or code >= 500 or code in (408, 429))


def status(error: BaseException) -> int | None:
    """The status code of the answer, None where there was no answer."""
    responses = (getattr(cause, "response", None) for cause in causes(error))
    return next((response.status_code for response in responses if response is not None), None)
