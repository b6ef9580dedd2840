"""Every way a request can fail, as one tree; the router turns each into an OpenAI-shaped body.

PenstockError                      code, HTTP status, OpenAI error type, and whether another try may help
├── BadRequest              400    the client's fault; nothing was computed
│   ├── PromptTooLong       400    says both numbers
│   ├── RequestTimeout      408    the rest of the request does not come
│   └── HeadTooLarge        431    URL and headers
├── Unauthorized            401
├── NotFound                404    unknown model or route
├── Overloaded              429    refused before any work, with a Retry-After
│   ├── QueueFull           429    too many wait, and this key's share of them is used up
│   ├── SloUnattainable     429    --slo-ttft or --slo-tpot would be missed
│   └── QueueTimeout        503    waited for room until its deadline
├── Unavailable             503    no worker can take it now
│   └── WorkerLost          503    the worker died and the tries are used up
├── Timeout                 504    no progress within the stated deadline
└── InternalError           500    our fault; the log has the cause

Configuration and start-up problems are `ConfigError` and `ModelError`: they never reach a client.
"""

from __future__ import annotations


class PenstockError(Exception):
    """A failure with a stable machine-readable `code`; the message is written for the client."""

    code = "internal_error"
    status = 500
    openai_type = "server_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(PenstockError):
    """The request itself is wrong: a field, its value, or a feature that is not supported yet."""

    code = "invalid_request"
    status = 400
    openai_type = "invalid_request_error"


class PromptTooLong(BadRequest):
    """Prompt (plus the tokens asked for) exceeds the model's context."""

    code = "context_length_exceeded"


class RequestTimeout(BadRequest):
    """Nothing more came of a request that had begun."""

    code = "request_timeout"
    status = 408


class HeadTooLarge(BadRequest):
    """URL and headers, or the trailers of a body, are longer than any request needs."""

    code = "head_too_large"
    status = 431


class Unauthorized(PenstockError):
    """No API key, or a wrong one, where keys are set."""

    code = "invalid_api_key"
    status = 401
    openai_type = "authentication_error"


class NotFound(PenstockError):
    """The model or route does not exist here."""

    code = "not_found"
    status = 404
    openai_type = "not_found_error"


class Overloaded(PenstockError):
    """Refused before any work was done, because a limit is reached.

    `retry_after_s`: when another try may be taken. `hopeless`: no later one will fare better.
    """

    code = "overloaded"
    status = 429
    openai_type = "rate_limit_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float = 1.0, hopeless: bool = False
    ) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s
        self.hopeless = hopeless


class QueueFull(Overloaded):
    """As many requests wait at the router as may, and those of this key are the most for its share."""

    code = "queue_full"


class SloUnattainable(Overloaded):
    """The request would miss the time to first token, or between tokens, that the operator promises."""

    code = "slo_unattainable"


class QueueTimeout(Overloaded):
    """The request waited for room until its deadline passed."""

    code = "queue_timeout"
    status = 503
    openai_type = "server_error"


class Unavailable(PenstockError):
    """No worker can serve this now."""

    code = "unavailable"
    status = 503
    openai_type = "server_error"


class WorkerLost(Unavailable):
    """The request's worker was lost as often as the router is willing to try."""

    code = "worker_lost"


class Timeout(PenstockError):
    """No progress within the stated deadline."""

    code = "timeout"
    status = 504
    openai_type = "server_error"


class InternalError(PenstockError):
    """Our own failure; details are in the log under the request id."""


class ConfigError(Exception):
    """A flag, environment variable or configuration file is wrong. Raised at start-up only."""


class ModelError(Exception):
    """The checkpoint is unsupported or broken; the message names what is missing."""


def _tree(cls: type[PenstockError]) -> dict[str, type[PenstockError]]:
    """The kinds of an error by code: a kind without a code of its own, which some part has for itself, is none."""
    found: dict[str, type[PenstockError]] = {}
    for child in cls.__subclasses__():
        found |= _tree(child) | {child.code: child}
    return found


def from_code(code: str, message: str) -> PenstockError:
    """Rebuild the error that a worker named on the wire; an unknown code becomes `InternalError`."""
    return _tree(PenstockError).get(code, InternalError)(message)
