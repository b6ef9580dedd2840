"""A request choice in the dispatcher: its states, and what is remembered of it. Plain data; see dispatch.py."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from penstock.common.errors import PenstockError
from penstock.common.messages import GenerateRequest
from penstock.router.dispatch_events import Give, Release, Reserve
from penstock.router.policy import EXPECTED_OUTPUT_TOKENS, Moving, Placement
from penstock.router.token_order import TokenOrder

Key = tuple[str, int]  # request id and choice
WAIT_FOR_WORKER_S = 30.0  # the last one may just be restarting, and load its model
Happened = tuple[float, "State", int, object]  # when, in which state and attempt, the event


class State(Enum):
    """Where a choice is; see the picture above."""

    PLACING = "placing"  # the service asks Redis and the policy
    QUEUED = "queued"  # the fleet is full: it waits its turn (admission.py)
    WAITING = "waiting"  # no worker is up
    RUNNING = "running"  # submitted to a decode worker


@dataclass(frozen=True)
class Lost:
    """This attempt is lost or useless; another worker may succeed. `abort`: its worker may still work on it."""

    reason: str
    abort: bool = False
    blameless: bool = False  # the decode worker is not why
    leaves: bool = False  # its worker is about to leave: nothing is wrong
    error: PenstockError | None = None  # what the client hears when the attempts are used up


@dataclass(frozen=True)
class Moved:
    """Its worker is leaving, and keeps the pages of so many tokens for the next attempt."""

    kept_tokens: int


@dataclass(frozen=True)
class Expired:
    """A deadline has passed."""


@dataclass(slots=True)
class Choice:
    """One choice of a request that has not ended."""

    request: GenerateRequest
    sink: Any
    order: TokenOrder
    deadline: float  # moves with progress
    state: State = State.PLACING
    tenant: str = ""
    since: float = 0.0  # when it came
    placed_at: float = 0.0  # when this attempt began
    attempt: int = 0
    moves: int = 0  # attempts that were not lost, but moved to another worker, or got on until their worker left
    destination: str = ""  # this attempt's worker was asked to give it up, since that one has room
    moving: Moving | None = None  # that has happened: the next attempt, or this one, comes from there
    placement: Placement | None = None
    begun_at: int = 0  # tokens that were delivered before this attempt
    outgrown_at: int = sys.maxsize  # with more tokens than that it is longer than this attempt was expected to get
    given_ms: float = 0.0  # its decoding, as it counts at its worker
    prefill_cut: bool = False  # this attempt's link to its prefill worker was cut: what it sent may be lost
    reserved: Release | None = None  # at the decode worker, until the attempt is over
    prompt_reserved: Release | None = None  # at the worker that computes the prompt, until a token comes
    failed: set[str] = field(default_factory=set)  # incarnations that lost this choice
    history: deque[Happened] = field(default_factory=lambda: deque(maxlen=32))

    @property
    def key(self) -> Key:
        return self.request.request_id, self.request.choice

    @property
    def patience_s(self) -> float:
        """How long it waits for a worker to come up."""
        return patience(self.request.queue_timeout_s)

    @property
    def awaits_prompt(self) -> bool:
        """The decode worker of this attempt has said nothing yet: the prompt is computed, or its pages move."""
        if self.placement is None or self.order.early:
            return False
        return len(self.order.delivered) - self.begun_at <= (self.placement.prefill is not None)

    def runs_at(self, incarnation: str) -> bool:
        """Its decode worker is this one."""
        return self.placement is not None and self.placement.decode.incarnation == incarnation

    @property
    def is_moving(self) -> bool:
        """It is to move, or has, and has not been heard of at its next worker."""
        return bool(self.destination) or (self.moving is not None and (self.placement is None or self.awaits_prompt))

    @property
    def heads_for(self) -> str:
        """The worker that it is to move to, as far as that is known; of one that `is_moving`."""
        if self.destination or self.moving is None:
            return self.destination
        return self.moving.destination if self.placement is None else self.placement.decode.incarnation

    @property
    def context_tokens(self) -> int:
        """What a worker has, or needs, pages for."""
        return len(self.request.prompt_token_ids) + len(self.order.delivered)

    @property
    def most_tokens(self) -> int:
        """What it may come to, as far as that is limited."""
        return most_tokens(self.request)

    def as_it_stands(self) -> GenerateRequest:
        """The request for this attempt: it goes on behind what the client has."""
        return msgspec.structs.replace(self.request, attempt=self.attempt, output_token_ids=list(self.order.delivered))

    def run_at(self, placement: Placement) -> list[Reserve]:
        """This attempt begins; what it weighs, and at which workers."""
        self.placement, self.begun_at = placement, len(self.order.delivered)
        self.outgrown_at, self.given_ms = self.begun_at + EXPECTED_OUTPUT_TOKENS, placement.decode_ms
        sequence = Reserve(placement.decode.incarnation, placement.decode_tokens)
        computing = placement.prefill or placement.decode
        prompt = Reserve(computing.incarnation, placement.prefill_tokens, prompt=True)
        self.reserved, self.prompt_reserved = _undoing(sequence), _undoing(prompt)
        return [weight for weight in (sequence, prompt) if weight.tokens]

    def prompt_computed(self) -> list[Release]:
        """A token has come: what the prompt has weighed until now."""
        released, self.prompt_reserved = self.prompt_reserved, None
        return [] if released is None else [released]

    def expect_more(self) -> Give:
        """It is longer than expected: it is expected to get twice as long."""
        expected = self.outgrown_at - self.begun_at
        while self.begun_at + expected < len(self.order.delivered):
            expected *= 2
        self.outgrown_at = self.begun_at + expected
        return self._decodes(expected)

    def _decodes(self, tokens: int) -> Give:
        """This attempt's output counts as so many tokens from now on."""
        assert self.placement is not None
        work_ms = self.placement.rates.output_ms(len(self.request.prompt_token_ids) + self.begun_at, tokens)
        before_ms, self.given_ms = self.given_ms, work_ms
        return Give(self.placement.decode.incarnation, work_ms - before_ms)

    def let_go(self) -> list[Release | Give]:
        """The attempt is over: forget its workers and early tokens; what it still weighed, and what it came to."""
        over: list[Release | Give] = [] if self.reserved is None else [self.reserved]
        if self.placement is not None:
            if self.prompt_reserved is not None:  # no token has come: the prompt is not computed
                over.append(Give(self.prompt_reserved.incarnation, -self.placement.prefill_ms))
            over.append(self._decodes(len(self.order.delivered) - self.begun_at))
        over += self.prompt_computed()
        self.reserved = self.placement = None
        self.outgrown_at = sys.maxsize
        self.order.begin_attempt()
        self.destination, self.prefill_cut = "", False
        return over

    def story(self) -> str:
        """What it went through, for people."""
        return "; ".join(
            f"{at:.3f} {state.value} #{attempt}: {event!r:.200}" for at, state, attempt, event in self.history
        )


def _undoing(weight: Reserve) -> Release | None:
    return Release(weight.incarnation, weight.tokens, weight.prompt) if weight.tokens else None


def not_begun(placement: Placement) -> list[Give]:
    """Work that counts as given to its workers, and is none."""
    computing = placement.prefill or placement.decode
    return [
        Give(computing.incarnation, -placement.prefill_ms),
        Give(placement.decode.incarnation, -placement.decode_ms),
    ]


def most_tokens(request: GenerateRequest) -> int:
    """A request's prompt with its longest output, if that is limited."""
    return len(request.prompt_token_ids) + (request.sampling.max_tokens or 0)


def patience(queue_timeout_s: float) -> float:
    """Seconds that a request waits for a worker to come up: no longer than for room."""
    return min(WAIT_FOR_WORKER_S, queue_timeout_s)
