"""What goes into the dispatcher (events) and what comes out (commands). Plain data; see dispatch.py."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.common.errors import PenstockError
from penstock.common.messages import Abort, GenerateRequest, Move, Submit, TokenDelta
from penstock.router.policy import Moving, Placement

# ---------------------------------------------------------------- events


class Submitted(msgspec.Struct, frozen=True):
    """A new choice; `sink` is opaque and comes back in `Deliver` and `Fail`."""

    request: GenerateRequest
    sink: Any
    tenant: str = ""  # whose share of the fleet it uses


class Placed(msgspec.Struct, frozen=True):
    """The answer to `Place`; None: no worker takes it now."""

    request_id: str
    choice: int
    attempt: int
    placement: Placement | None


class PlaceFailed(msgspec.Struct, frozen=True):
    """`Place` met a bug of ours; the log has it."""

    request_id: str
    choice: int
    attempt: int


class Queued(msgspec.Struct, frozen=True):
    """The answer to `Place`: the fleet is full, it waits its turn; another answer follows."""

    request_id: str
    choice: int


class Refused(msgspec.Struct, frozen=True):
    """The answer to `Place`: it cannot be served as it has to be."""

    request_id: str
    choice: int
    error: PenstockError


class WorkerUp(msgspec.Struct, frozen=True):
    """A decode worker can be used from now on."""

    incarnation: str


class WorkerDown(msgspec.Struct, frozen=True):
    """The link to a worker (of either role) is lost, with everything that ran there."""

    incarnation: str


class Room(msgspec.Struct, frozen=True):
    """What a decode worker can still take; `context`: tokens of the longest request."""

    pages: int
    page_size: int
    sequences: int
    context: int
    routers: int = 1  # that share it

    def pages_for(self, tokens: int) -> int:
        """What a request with so many tokens, and the next one, takes."""
        return tokens // self.page_size + 1


class WorkerLeaving(msgspec.Struct, frozen=True):
    """A decode worker drains: what runs there is to move, as far as another one, which has just told, has room."""

    incarnation: str
    destination: str
    room: Room
    others: frozenset[str] = frozenset()  # that might take requests, too


class WorkerAtWork(msgspec.Struct, frozen=True):
    """A worker (of either role) has got on with prompts since it was last heard of: computed, with more to compute, or
    read pages of them."""

    incarnation: str


class WorkerStalled(msgspec.Struct, frozen=True):
    """A worker (of either role) makes no progress, though it may be alive: what runs there goes on elsewhere."""

    incarnation: str
    reason: str


class Cancelled(msgspec.Struct, frozen=True):
    """The client does not want it any more."""

    request_id: str
    choice: int


class Tick(msgspec.Struct, frozen=True):
    """Time passes: look at the deadlines."""


class Shutdown(msgspec.Struct, frozen=True):
    """The router leaves: end everything with an error."""


Answer = Placed | PlaceFailed | Queued | Refused  # to `Place`
Fate = WorkerUp | WorkerDown | WorkerLeaving | WorkerAtWork | WorkerStalled
Event = Submitted | Answer | Fate | Cancelled | Tick | Shutdown

# ---------------------------------------------------------------- commands


class Place(msgspec.Struct, frozen=True):
    """Find workers for `request` (its output tokens included) and answer with `Placed`, or one of the others."""

    request: GenerateRequest
    avoid: frozenset[str]
    moving: Moving | None = None  # it was given up by a worker that drains
    tenant: str = ""
    since: float = 0.0  # when the request came
    lost: str = ""  # why it needs workers again
    worker_leaves: bool = False  # which is why, and no fault


class Dequeue(msgspec.Struct, frozen=True):
    """It waits no longer for its turn."""

    request_id: str
    choice: int


class SendSubmit(msgspec.Struct, frozen=True):
    """Send to a decode worker."""

    incarnation: str
    message: Submit


class SendAbort(msgspec.Struct, frozen=True):
    """Send to a decode worker."""

    incarnation: str
    message: Abort


class SendMove(msgspec.Struct, frozen=True):
    """Send to a decode worker."""

    incarnation: str
    message: Move


class Deliver(msgspec.Struct, frozen=True):
    """Hand the next tokens to the client; the last ones have `finish`."""

    sink: Any
    delta: TokenDelta


class Fail(msgspec.Struct, frozen=True):
    """End the choice with an error."""

    sink: Any
    error: PenstockError


class Served(msgspec.Struct, frozen=True):
    """A request has ended as it should. `handed_off`: how its hand-off fared; None: there was none."""

    decode: str
    prefill: str | None
    handed_off: bool | None


class Blame(msgspec.Struct, frozen=True):
    """An attempt failed by its decode worker's fault."""

    incarnation: str
    reason: str


class Reserve(msgspec.Struct, frozen=True):
    """Count `tokens` as load of a worker. `prompt`: they are to be computed; else they stand for a running sequence."""

    incarnation: str
    tokens: int
    prompt: bool = False


class Release(msgspec.Struct, frozen=True):
    """Undo one `Reserve`."""

    incarnation: str
    tokens: int
    prompt: bool = False


class Give(msgspec.Struct, frozen=True):
    """Count more work as given to a worker, or less: an output is longer, or shorter, than was expected."""

    incarnation: str
    work_ms: float


Sent = SendSubmit | SendAbort | SendMove
Command = Place | Dequeue | Sent | Deliver | Fail | Served | Blame | Reserve | Release | Give
