"""What happens to every request choice, as a pure state machine: events in, commands out. Driven by the service.

            ┌────────── worker lost, retryable error, divergence: next attempt ───────────┐
            v                                                                             │
 Submitted PLACING ──Placed(workers)──> RUNNING ──tokens…──> finish / error / timeout / cancel: end
            │  ^
  Placed(None) └─ a worker joined      (a cancel or a deadline ends the other two states as well)
            v  │
           WAITING             PLACING ──Queued──> QUEUED ──Placed──> RUNNING; ──Refused──> error: end

Two halves: `handle` moves choices between states, `tokens` delivers what they say (in order: token_order.py). What a
choice remembers is in dispatch_state.py, which choices are where in whereabouts.py, what goes in and out in
dispatch_events.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from penstock.common.errors import (
    InternalError,
    PenstockError,
    QueueTimeout,
    Timeout,
    Unavailable,
    WorkerLost,
    from_code,
)
from penstock.common.messages import Abort, Finish, Move, Submit, TokenDelta
from penstock.router.dispatch_events import (
    Blame,
    Cancelled,
    Command,
    Deliver,
    Dequeue,
    Event,
    Fail,
    Place,
    Placed,
    PlaceFailed,
    Queued,
    Refused,
    SendAbort,
    SendMove,
    SendSubmit,
    Served,
    Shutdown,
    Submitted,
    Tick,
    WorkerAtWork,
    WorkerDown,
    WorkerLeaving,
    WorkerStalled,
    WorkerUp,
)
from penstock.router.dispatch_state import Choice, Expired, Key, Lost, Moved, State, not_begun
from penstock.router.token_order import MAX_EARLY, Diverged, TokenOrder
from penstock.router.whereabouts import Whereabouts

MAX_WAITING = 1000  # or what may wait for room
SHUTTING_DOWN = "this router is shutting down"
TOO_MANY_WAIT = "no worker is up, and too many requests wait for one"
MAX_PROMPT_TIMEOUTS = 30  # times `progress_timeout_s`: what an attempt's prompt may take, however busy its workers are


class InvalidTransition(RuntimeError):
    """An event that its choice's state does not know: a bug. The text tells what the choice went through."""


class Dispatcher:
    """All choices of one router that have not ended. `handle` and `tokens` return the commands to carry out."""

    def __init__(self, max_attempts: int, progress_timeout_s: float, max_waiting: int = MAX_WAITING) -> None:
        self.choices: dict[Key, Choice] = {}
        self.whereabouts = Whereabouts()
        self.retries = 0
        self.stale_deltas = 0  # of older attempts, ended choices, or repeated
        self.divergences = 0
        self.moves = 0  # attempts that went on at another worker, with their pages
        self._max_attempts = max_attempts
        self._progress_timeout_s = progress_timeout_s
        self._max_waiting = max_waiting
        self._live: set[str] = set()  # decode workers
        self._waiting: dict[Key, Choice] = {}  # for one: all that ran may come to wait at once
        self._commands: list[Command] = []

    def handle(self, event: Event, now: float) -> list[Command]:
        """Apply one event.

        Raises:
            ValueError: a request was submitted under the id of one that has not ended.
            InvalidTransition: see there.
        """
        _EVENTS[type(event)](self, event, now)
        return self._take()

    def tokens(self, deltas: Sequence[TokenDelta], now: float) -> list[Command]:
        """Apply a worker's new tokens: the hot path, one pass over a step of all choices."""
        commands = self._commands
        find, running, deadline = self.choices.get, State.RUNNING, now + self._progress_timeout_s
        for delta in deltas:
            choice = find((delta.request_id, delta.choice))
            if choice is None or delta.attempt != choice.attempt or choice.state is not running:
                self.stale_deltas += 1
                continue
            order = choice.order
            delivered = order.delivered
            if order.steady and delta.finish is None and delta.index == len(delivered):
                delivered += delta.token_ids
                choice.deadline = deadline
                commands.append(Deliver(choice.sink, delta))
            else:
                self._unusual(choice, delta, now)
        return self._take()

    def _take(self) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

    # ------------------------------------------------------------ events

    def _submitted(self, event: Submitted, now: float) -> None:
        request = event.request
        order = TokenOrder(list(request.output_token_ids))
        choice = Choice(request, event.sink, order, deadline=0.0, tenant=event.tenant, since=now)
        if choice.key in self.choices:
            raise ValueError(f"request {request.request_id!r} choice {request.choice} is under way already")
        self.choices[choice.key] = choice
        self._place(choice, now)

    def _worker_up(self, event: WorkerUp, now: float) -> None:
        self._live.add(event.incarnation)
        for choice in list(self._waiting.values()):
            self._apply(choice, event, now)

    def _worker_down(self, event: WorkerDown, now: float) -> None:
        self._live.discard(event.incarnation)
        for choice in self.whereabouts.at(event.incarnation):
            if choice.runs_at(event.incarnation):
                self._apply(choice, Lost("its worker was lost"), now)
            else:  # it is its prefill worker
                choice.prefill_cut = True
                self._commands += choice.prompt_computed()  # by the decode worker, if this one is dead
                self._check_gap(choice, now)

    def _worker_leaving(self, event: WorkerLeaving, now: float) -> None:
        """Where it would wait for room its stream would stand still: until there is some it goes on where it is."""
        for choice in self.whereabouts.to_move(event):
            request_id, number = choice.key
            move = Move(request_id=request_id, choice=number, attempt=choice.attempt)
            self._commands.append(SendMove(event.incarnation, move))

    def _worker_at_work(self, event: WorkerAtWork, now: float) -> None:
        """A prompt takes as long as it takes to compute, and its pages to move: a slow link is not a dead one."""
        for choice in self.whereabouts.at(event.incarnation):
            if choice.awaits_prompt:
                # Not for ever: it might be the one that a busy worker has forgotten.
                latest = choice.placed_at + MAX_PROMPT_TIMEOUTS * self._progress_timeout_s
                choice.deadline = max(choice.deadline, min(now + self._progress_timeout_s, latest))

    def _worker_stalled(self, event: WorkerStalled, now: float) -> None:
        stalled, reason = event.incarnation, event.reason
        for choice in self.whereabouts.at(stalled):
            if choice.runs_at(stalled):
                self._apply(choice, Lost(f"its worker stalled: {reason}", abort=True), now)
            elif choice.prompt_reserved is not None and choice.prompt_reserved.incarnation == stalled:
                lost = Lost(f"its prefill worker stalled: {reason}", abort=True, blameless=True)
                self._apply(choice, lost, now)

    def _place_answered(self, event: Placed | PlaceFailed, now: float) -> None:
        choice = self.choices.get((event.request_id, event.choice))
        if choice is not None and choice.attempt == event.attempt:
            self._apply(choice, event, now)
        elif isinstance(event, Placed) and event.placement is not None:  # it was cancelled meanwhile
            self._commands += not_begun(event.placement)

    def _admission_answered(self, event: Queued | Refused, now: float) -> None:
        choice = self.choices.get((event.request_id, event.choice))
        if choice is not None:
            self._apply(choice, event, now)
        elif isinstance(event, Queued):  # it was cancelled meanwhile
            self._commands.append(Dequeue(event.request_id, event.choice))

    def _cancelled_event(self, event: Cancelled, now: float) -> None:
        choice = self.choices.get((event.request_id, event.choice))
        if choice is not None:  # else its last token and the cancel crossed
            self._apply(choice, event, now)

    def _ticked(self, event: Tick, now: float) -> None:
        late = []
        for choice in self.choices.values():  # ten times a second, all of them
            if now > choice.deadline:
                late.append(choice)
            elif len(choice.order.delivered) > choice.outgrown_at:
                self._commands.append(choice.expect_more())
        for choice in late:
            self._apply(choice, Expired(), now)

    def _shut_down(self, event: Shutdown, now: float) -> None:
        for choice in list(self.choices.values()):
            self._apply(choice, event, now)

    # ------------------------------------------------------------ one choice

    def _apply(self, choice: Choice, event: object, now: float) -> None:
        choice.history.append((now, choice.state, choice.attempt, event))
        action = _TABLE.get((choice.state, type(event)))
        if action is None:
            raise InvalidTransition(f"{choice.key}: {choice.story()}")
        action(self, choice, event, now)

    def _place(self, choice: Choice, now: float, lost: Lost | None = None) -> None:
        self._waiting.pop(choice.key, None)
        choice.state = State.PLACING
        choice.deadline = now + choice.request.queue_timeout_s + self._progress_timeout_s
        request, avoid = choice.as_it_stands(), frozenset(choice.failed)
        why = (lost.reason, lost.leaves) if lost is not None else ("", False)
        self._commands.append(Place(request, avoid, choice.moving, choice.tenant, choice.since, *why))

    def _placed(self, choice: Choice, event: Placed, now: float) -> None:
        placement = event.placement
        if placement is None:
            self._wait(choice, now)
            return
        choice.state = State.RUNNING
        choice.placed_at = now
        choice.deadline = now + choice.request.queue_timeout_s + self._progress_timeout_s
        self._commands += self.whereabouts.begin(choice, placement)
        submit = Submit(request=choice.as_it_stands(), prefill=placement.prefill, source=placement.source)
        self._commands.append(SendSubmit(placement.decode.incarnation, submit))

    def _queue(self, choice: Choice, event: Queued, now: float) -> None:
        choice.state = State.QUEUED
        choice.deadline = now + choice.request.queue_timeout_s

    def _refuse(self, choice: Choice, event: Refused, now: float) -> None:
        self._fail(choice, event.error)

    def _not_its_turn(self, choice: Choice, event: Expired, now: float) -> None:
        self._fail(choice, QueueTimeout(f"the fleet had no room within {choice.request.queue_timeout_s:.0f} s"))

    def _not_placed(self, choice: Choice, event: PlaceFailed, now: float) -> None:
        self._fail(choice, InternalError("the request could not be routed"))

    def _wait(self, choice: Choice, now: float) -> None:
        if len(self._waiting) >= self._max_waiting:
            self._fail(choice, Unavailable(TOO_MANY_WAIT))
            return
        self._waiting[choice.key] = choice
        choice.state = State.WAITING
        choice.deadline = now + choice.patience_s

    def _again(self, choice: Choice, event: WorkerUp, now: float) -> None:
        self._place(choice, now)

    def _lost(self, choice: Choice, event: Lost, now: float) -> None:
        assert choice.placement is not None
        if event.abort:
            self._abort(choice)
        if not event.blameless:
            choice.failed.add(choice.placement.decode.incarnation)
        got_on = len(choice.order.delivered) > choice.begun_at
        choice.moves += event.leaves and got_on
        # Refused where it was to move, since that worker leaves now, too: its pages are still where they were.
        choice.moving = choice.moving.to_anybody() if choice.moving and event.leaves and not got_on else None
        self._commands += self.whereabouts.let_go(choice)
        limit = choice.request.sampling.max_tokens
        if limit is not None and len(choice.order.delivered) >= limit:  # all tokens came, only the finish was lost
            self._finish(choice, Finish(reason="length"))
        elif choice.attempt - choice.moves + 1 < self._max_attempts:
            self.retries += 1
            choice.attempt += 1
            self._place(choice, now, event)
        elif self._live:
            lost = WorkerLost(f"gave up after {self._max_attempts} attempts: {event.reason}")
            self._fail(choice, event.error or lost)
        else:
            self._fail(choice, Unavailable(f"no worker is up: {event.reason}"))

    def _move(self, choice: Choice, event: Moved, now: float) -> None:
        self._commands += self.whereabouts.give_up(choice, event.kept_tokens)
        self.moves += 1
        choice.moves += 1
        choice.attempt += 1
        self._place(choice, now)

    def _cancel(self, choice: Choice, event: Cancelled, now: float) -> None:
        self._abort(choice)
        self._end(choice)

    def _time_out(self, choice: Choice, event: Expired, now: float) -> None:
        if choice.placement is not None:
            self._commands.append(Blame(choice.placement.decode.incarnation, "a request made no progress"))
        self._abort(choice)
        self._fail(choice, Timeout("no progress within the deadline"))

    def _no_worker(self, choice: Choice, event: Expired, now: float) -> None:
        self._fail(choice, Unavailable(f"no worker came up within {choice.patience_s:.0f} s"))

    def _leave(self, choice: Choice, event: Shutdown, now: float) -> None:
        self._abort(choice)
        self._fail(choice, Unavailable(SHUTTING_DOWN))

    # ------------------------------------------------------------ tokens that are not simply the next ones

    def _unusual(self, choice: Choice, delta: TokenDelta, now: float) -> None:
        """First, last, early, repeated or diverging tokens, and errors."""
        finish = delta.finish
        if finish is not None and finish.reason in ("error", "abort"):
            self._worker_error(choice, finish, now)
            return
        order = choice.order
        order.put(delta)
        try:
            for following in order.due():
                if self._deliver(choice, following, now):
                    return
        except Diverged:
            self.divergences += 1
            self._apply(choice, Lost("an attempt diverged from what was delivered", abort=True), now)
            return
        self._check_gap(choice, now)

    def _check_gap(self, choice: Choice, now: float) -> None:
        """A decode worker sends in order, so a gap is the prefill worker's token: it may be late, or lost in a cut."""
        early = choice.order.early
        if len(early) > MAX_EARLY or (early and choice.prefill_cut):
            self._apply(choice, Lost("tokens are missing", abort=True), now)

    def _deliver(self, choice: Choice, delta: TokenDelta, now: float) -> bool:
        """Deliver what comes next; True: that was the end."""
        if not delta.token_ids and delta.finish is None:
            self.stale_deltas += 1
            return False
        if delta.finish is not None and delta.finish.reason == "moved":
            self._apply(choice, Moved(delta.finish.kept_tokens), now)
            return True
        choice.deadline = now + self._progress_timeout_s
        choice.order.delivered += delta.token_ids
        self._commands += choice.prompt_computed()
        self._commands.append(Deliver(choice.sink, delta))
        if delta.finish is None:
            return False
        self._served(choice, delta)
        self._end(choice)
        return True

    def _served(self, choice: Choice, delta: TokenDelta) -> None:
        assert choice.placement is not None
        decode, prefill, spans = choice.placement.decode, choice.placement.prefill, delta.spans
        handed_off = None
        if prefill is not None and spans is not None and spans.worker == decode.worker_id:
            handed_off = False if spans.local_prefill else True if spans.transfer_pages else None
        self._commands.append(Served(decode.incarnation, prefill.incarnation if prefill else None, handed_off))

    def _worker_error(self, choice: Choice, finish: Finish, now: float) -> None:
        error = from_code(finish.code, finish.message) if finish.code else None
        if choice.placement is not None and isinstance(error, InternalError):
            self._commands.append(Blame(choice.placement.decode.incarnation, finish.message or "a request failed"))
        if finish.retryable or finish.reason == "abort":
            reason, leaves = finish.message or "its worker aborted it", finish.code == Unavailable.code
            self._apply(choice, Lost(reason, leaves=leaves, error=error), now)
        else:
            self._fail(choice, error or InternalError("a worker failed without saying why"))

    # ------------------------------------------------------------ ends

    def _finish(self, choice: Choice, finish: Finish) -> None:
        request = choice.request
        delta = TokenDelta(request.request_id, choice.attempt, request.choice, len(choice.order.delivered), [], finish)
        self._commands.append(Deliver(choice.sink, delta))
        self._end(choice)

    def _fail(self, choice: Choice, error: PenstockError) -> None:
        self._commands.append(Fail(choice.sink, error))
        self._end(choice)

    def _end(self, choice: Choice) -> None:
        if choice.state is State.QUEUED:
            self._commands.append(Dequeue(*choice.key))
        self._commands += self.whereabouts.end(choice)
        self._waiting.pop(choice.key, None)
        del self.choices[choice.key]

    def _abort(self, choice: Choice) -> None:
        if choice.placement is not None:
            request_id, number = choice.key
            message = Abort(request_id=request_id, choice=number, attempt=choice.attempt)
            self._commands.append(SendAbort(choice.placement.decode.incarnation, message))


_EVENTS: dict[type, Callable[[Dispatcher, Any, float], None]] = {
    Submitted: Dispatcher._submitted,
    Placed: Dispatcher._place_answered,
    PlaceFailed: Dispatcher._place_answered,
    Queued: Dispatcher._admission_answered,
    Refused: Dispatcher._admission_answered,
    WorkerUp: Dispatcher._worker_up,
    WorkerDown: Dispatcher._worker_down,
    WorkerLeaving: Dispatcher._worker_leaving,
    WorkerAtWork: Dispatcher._worker_at_work,
    WorkerStalled: Dispatcher._worker_stalled,
    Cancelled: Dispatcher._cancelled_event,
    Tick: Dispatcher._ticked,
    Shutdown: Dispatcher._shut_down,
}

_TABLE: dict[tuple[State, type], Callable[[Dispatcher, Choice, Any, float], None]] = {
    (State.PLACING, Placed): Dispatcher._placed,
    (State.PLACING, PlaceFailed): Dispatcher._not_placed,
    (State.PLACING, Cancelled): Dispatcher._cancel,
    (State.PLACING, Expired): Dispatcher._time_out,
    (State.PLACING, Shutdown): Dispatcher._leave,
    (State.PLACING, Queued): Dispatcher._queue,
    (State.PLACING, Refused): Dispatcher._refuse,
    (State.QUEUED, Placed): Dispatcher._placed,
    (State.QUEUED, PlaceFailed): Dispatcher._not_placed,
    (State.QUEUED, Refused): Dispatcher._refuse,
    (State.QUEUED, Cancelled): Dispatcher._cancel,
    (State.QUEUED, Expired): Dispatcher._not_its_turn,
    (State.QUEUED, Shutdown): Dispatcher._leave,
    (State.WAITING, WorkerUp): Dispatcher._again,
    (State.WAITING, Cancelled): Dispatcher._cancel,
    (State.WAITING, Expired): Dispatcher._no_worker,
    (State.WAITING, Shutdown): Dispatcher._leave,
    (State.RUNNING, Lost): Dispatcher._lost,
    (State.RUNNING, Moved): Dispatcher._move,
    (State.RUNNING, Cancelled): Dispatcher._cancel,
    (State.RUNNING, Expired): Dispatcher._time_out,
    (State.RUNNING, Shutdown): Dispatcher._leave,
}
