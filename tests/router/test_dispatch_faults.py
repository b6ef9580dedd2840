"""The dispatcher under random faults, against a model of what each client must get."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.common.errors import Overloaded
from penstock.common.messages import Finish, Move, TokenDelta
from penstock.router.dispatch import Dispatcher, State
from penstock.router.dispatch_events import (
    Cancelled,
    Command,
    Deliver,
    Dequeue,
    Fail,
    Give,
    Place,
    Placed,
    Queued,
    Refused,
    Release,
    Reserve,
    Room,
    SendMove,
    SendSubmit,
    Submitted,
    Tick,
    WorkerAtWork,
    WorkerDown,
    WorkerLeaving,
    WorkerUp,
)
from penstock.router.dispatch_state import Choice
from penstock.router.rates import H200_LLAMA8B
from tests.router.dispatching import STOP, placement, request

GUESS_MS, PROMPT_TOKENS = 50.0, len(request().prompt_token_ids)


def names(choices: list[Choice]) -> list[str]:
    """Sorted, each as often as it is there."""
    return sorted(choice.key[0] for choice in choices)


class Faults(RuleBasedStateMachine):
    """Random workers that repeat, reorder, fail and die. What each client gets must be the oracle's tokens, once.

    Every attempt would go on in its own way, so a token of an older attempt is a wrong token.
    """

    WORKERS = ("d1", "d2", "d3")

    def __init__(self) -> None:
        super().__init__()
        self.core = Dispatcher(max_attempts=4, progress_timeout_s=30.0)
        self.now = 0.0
        self.up = {"d1", "d2"}
        self.names = 0
        self.oracle: dict[str, list[int]] = {}
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.to_place: list[Place] = []
        self.queued: set[str] = set()
        self.queued_before: set[str] = set()
        self.sent: dict[str, tuple[str, int, int]] = {}  # request -> worker, attempt, first index: what runs now
        self.network: list[TokenDelta] = []
        self.to_move: list[Move] = []
        self.reserved: Counter[str] = Counter()
        self.given_ms: dict[str, float] = defaultdict(float)  # of decoding, by worker
        self.begun: dict[tuple[str, int], tuple[str, int]] = {}  # request and attempt -> worker, first index
        self.made: Counter[tuple[str, int]] = Counter()  # tokens of each attempt
        for one in self.up:
            self.core.handle(WorkerUp(one), self.now)

    def apply(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Place):
                self.to_place.append(command)
            elif isinstance(command, Dequeue):
                self.queued.discard(command.request_id)
            elif isinstance(command, SendSubmit):
                self.queued.discard(command.message.request.request_id)
                assert command.incarnation in self.up
                request = command.message.request
                assert request.output_token_ids == self.got[request.request_id]
                self.sent[request.request_id] = command.incarnation, request.attempt, len(request.output_token_ids)
                self.begun[request.request_id, request.attempt] = command.incarnation, len(request.output_token_ids)
                self.compute(request.request_id)
            elif isinstance(command, Deliver):
                name = command.sink
                assert name not in self.ended, "nothing comes after the end"
                assert command.delta.index == len(self.got[name])
                self.got[name] += command.delta.token_ids
                self.made[name, command.delta.attempt] += len(command.delta.token_ids)
                assert self.got[name] == self.oracle[name][: len(self.got[name])]
                if command.delta.finish is not None:
                    assert self.got[name] == self.oracle[name]
                    self.ended[name] = "finished"
            elif isinstance(command, SendMove):
                name = command.message.request_id
                assert self.sent[name][:2] == (command.incarnation, command.message.attempt)
                self.to_move.append(command.message)
            elif isinstance(command, Fail):
                assert command.sink not in self.ended
                self.ended[command.sink] = command.error.code
            elif isinstance(command, Reserve):
                self.reserved[command.incarnation] += command.tokens
            elif isinstance(command, Release):
                self.reserved[command.incarnation] -= command.tokens
                assert self.reserved[command.incarnation] >= 0
            elif isinstance(command, Give):
                self.given_ms[command.incarnation] += command.work_ms

    def compute(self, name: str) -> None:
        """All that this attempt will say goes on the network; rules decide in what order it comes, and how often."""
        _, attempt, first = self.sent[name]
        tokens = self.oracle[name]
        tokens[first:] = [1000 * (attempt + 1) + i for i in range(first, len(tokens))]
        for i in range(first, len(tokens)):
            finish = STOP if i == len(tokens) - 1 else None
            self.network.append(TokenDelta(name, attempt, 0, i, [tokens[i]], finish))
            if i + 2 < len(tokens):
                self.network.append(TokenDelta(name, attempt, 0, i, tokens[i : i + 2], None))

    @rule(length=st.integers(1, 8))
    def submit(self, length: int) -> None:
        name = f"r{self.names}"
        self.names += 1
        self.oracle[name], self.got[name] = [0] * length, []
        self.apply(self.core.handle(Submitted(request(name, max_tokens=50), name), self.now))

    @precondition(lambda self: self.to_place)
    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        waiting, self.to_place = self.to_place, []
        for command in waiting:
            if command.request.attempt == 0 and data.draw(st.booleans()):
                self.admission(command, data)
                continue
            where = data.draw(st.sampled_from(sorted(self.up))) if self.up else None
            prefill = data.draw(st.sampled_from([None, "p1"]))
            self.placed(command, where, prefill)

    def placed(self, command: Place, where: str | None, prefill: str | None = None) -> None:
        """The answer; what the policy expects of the output counts from then on."""
        name, found = command.request.request_id, None
        self.queued.discard(name)
        if where:
            found = replace(placement(where, prefill), decode_ms=GUESS_MS)
            self.given_ms[where] += GUESS_MS
        self.apply(self.core.handle(Placed(name, 0, command.request.attempt, found), self.now))

    def admission(self, command: Place, data: st.DataObject) -> None:
        """It waits its turn, which comes later or never, or is refused; it may have been cancelled since it asked."""
        name = command.request.request_id
        if data.draw(st.booleans()):
            self.apply(self.core.handle(Refused(name, 0, Overloaded("full")), self.now))
        else:
            self.to_place.append(command)
            if name not in self.queued_before:
                self.queued_before.add(name)
                self.queued.add(name)
                self.apply(self.core.handle(Queued(name, 0), self.now))

    @precondition(lambda self: self.network)
    @rule(picks=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=8))
    def arrive(self, picks: list[tuple[int, bool]]) -> None:
        """Some tokens arrive, near their order, some of them not for the last time."""
        burst = []
        for pick, again in picks:
            if self.network:
                burst.append(self.network[pick % len(self.network)])
                if not again:
                    self.network.remove(burst[-1])
        self.apply(self.core.tokens(burst, self.now))

    @precondition(lambda self: self.network)
    @rule()
    def one_arrives_in_order(self) -> None:
        self.apply(self.core.tokens([self.network.pop(0)], self.now))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def diverge(self, data: st.DataObject) -> None:
        """A worker repeats a delivered token with another id."""
        name = data.draw(st.sampled_from(sorted(self.sent)))
        if self.got[name]:
            _, attempt, _ = self.sent[name]
            wrong = self.got[name][-1] + 1
            self.apply(self.core.tokens([TokenDelta(name, attempt, 0, len(self.got[name]) - 1, [wrong])], self.now))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), retryable=st.booleans())
    def worker_error(self, data: st.DataObject, retryable: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.sent)))
        finish = Finish(reason="error", code="timeout", message="", retryable=retryable)
        self.apply(self.core.tokens([TokenDelta(name, self.sent[name][1], 0, 0, [], finish)], self.now))

    @rule(
        incarnation=st.sampled_from(WORKERS),
        to=st.sampled_from(WORKERS),
        room=st.integers(0, 20),
        routers=st.integers(1, 2),
    )
    def worker_leaving(self, incarnation: str, to: str, room: int, routers: int) -> None:
        if to != incarnation:
            self.apply(self.core.handle(WorkerLeaving(incarnation, to, Room(room, 4, 3, 1000, routers)), self.now))

    @precondition(lambda self: self.to_move)
    @rule(data=st.data())
    def worker_gives_up(self, data: st.DataObject) -> None:
        """Behind some token that has not been delivered; what it would have said after that is never said."""
        move = self.to_move.pop(0)
        name, attempt = move.request_id, move.attempt
        if self.sent[name][1] != attempt or len(self.got[name]) == len(self.oracle[name]):
            return
        first = max(len(self.got[name]), self.sent[name][2])
        end = data.draw(st.integers(first, len(self.oracle[name]) - 1))
        self.network = [
            delta
            for delta in self.network
            if (delta.request_id, delta.attempt) != (name, attempt) or delta.index + len(delta.token_ids) <= end
        ]
        self.network.append(TokenDelta(name, attempt, 0, end, [], Finish(reason="moved")))

    @rule(incarnation=st.sampled_from(WORKERS))
    def worker_up(self, incarnation: str) -> None:
        if incarnation not in self.up:
            self.up.add(incarnation)
            self.apply(self.core.handle(WorkerUp(incarnation), self.now))

    @rule(incarnation=st.sampled_from((*WORKERS, "p1")))
    def worker_at_work(self, incarnation: str) -> None:
        self.apply(self.core.handle(WorkerAtWork(incarnation), self.now))

    @rule(incarnation=st.sampled_from((*WORKERS, "p1")))
    def worker_down(self, incarnation: str) -> None:
        self.up.discard(incarnation)
        self.apply(self.core.handle(WorkerDown(incarnation), self.now))

    @precondition(lambda self: self.oracle)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.oracle)))
        self.apply(self.core.handle(Cancelled(name, 0), self.now))
        self.ended.setdefault(name, "cancelled")

    @rule(seconds=st.sampled_from([1.0, 11.0, 31.0, 91.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.apply(self.core.handle(Tick(), self.now))

    @invariant()
    def ledger(self) -> None:
        assert {name for name, _ in self.core.choices} == set(self.oracle) - set(self.ended)
        queued = {name for (name, _), choice in self.core.choices.items() if choice.state is State.QUEUED}
        assert queued == self.queued, "who waits no longer is taken out of the queue"
        held = Counter[str]()
        for choice in self.core.choices.values():
            for release in (choice.reserved, choice.prompt_reserved):
                if release is not None:
                    held[release.incarnation] += release.tokens
        assert +held == +self.reserved

    @invariant()
    def whereabouts(self) -> None:
        """What is kept by worker is what the choices themselves say."""
        at = defaultdict[str, set[str]](set)
        for (name, _), choice in self.core.choices.items():
            if choice.placement is not None:
                workers = (choice.placement.decode, choice.placement.prefill)
                for one in filter(None, workers):
                    at[one.incarnation].add(name)
        for incarnation in (*self.WORKERS, "p1"):
            assert names(self.core.whereabouts.at(incarnation)) == sorted(at[incarnation])
        waiting = {key for key, choice in self.core.choices.items() if choice.state is State.WAITING}
        assert self.core._waiting.keys() == waiting

    @rule(to=st.sampled_from(WORKERS))
    def look_who_is_on_the_way(self, to: str) -> None:
        """No invariant, since it changes what is kept."""
        choices = self.core.choices.values()
        expected = names([choice for choice in choices if choice.is_moving and choice.heads_for == to])
        assert names(self.core.whereabouts.on_the_way(to)) == expected

    def teardown(self) -> None:
        self.up.add("d1")
        self.apply(self.core.handle(WorkerUp("d1"), self.now))
        for _ in range(40):  # from here on nothing fails: everything that is left must end
            while self.to_place:
                self.placed(self.to_place.pop(0), "d1")
            network, self.network = self.network, []
            for one in network:
                self.apply(self.core.tokens([one], self.now))
        assert set(self.ended) == set(self.oracle) and not self.core.choices, "nothing hangs once all tokens came"
        assert not any(vars(self.core.whereabouts).values())
        assert +self.reserved == Counter()
        work_ms = dict.fromkeys(self.given_ms, 0.0)
        for attempt, (incarnation, first) in self.begun.items():
            work_ms[incarnation] += H200_LLAMA8B.output_ms(PROMPT_TOKENS + first, self.made[attempt])
        assert self.given_ms == pytest.approx(work_ms), "what each worker was given is what it has done"


TestFaults = Faults.TestCase
TestFaults.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
