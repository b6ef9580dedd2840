"""What tests of the dispatcher share: its events in few words, and one whose commands are kept."""

from __future__ import annotations

from collections import Counter
from typing import Any

from penstock.common.messages import Finish, GenerateRequest, TokenDelta, WorkerInfo
from penstock.common.sampling import SamplingParams
from penstock.router.dispatch import MAX_WAITING, Dispatcher
from penstock.router.dispatch_events import (
    Command,
    Deliver,
    Placed,
    Release,
    Reserve,
    Submitted,
    WorkerUp,
)
from penstock.router.policy import Placement
from tests.worker_info import worker_info

STOP = Finish(reason="stop")


def worker(incarnation: str, role: str = "decode") -> WorkerInfo:
    return worker_info(incarnation, incarnation, role, address=f"tcp://127.0.0.1/{incarnation}")


def request(
    request_id: str = "a", choice: int = 0, max_tokens: int = 100, queue_timeout_s: float = 60.0
) -> GenerateRequest:
    sampling = SamplingParams(seed=7, max_tokens=max_tokens)
    return GenerateRequest(
        request_id=request_id,
        choice=choice,
        prompt_token_ids=[1, 2, 3],
        sampling=sampling,
        queue_timeout_s=queue_timeout_s,
    )


def delta(index: int, *token_ids: int, attempt: int = 0, finish: Finish | None = None, of: str = "a") -> TokenDelta:
    return TokenDelta(of, attempt, 0, index, list(token_ids), finish)


def placement(decode: str, prefill: str | None = None) -> Placement:
    return Placement(worker(decode), worker(prefill, "prefill") if prefill else None, 10, 20 if prefill else 0)


class Harness:
    """A dispatcher with one choice "a" whose commands are kept by kind."""

    def __init__(self, max_attempts: int = 3, max_waiting: int = MAX_WAITING) -> None:
        self.core = Dispatcher(max_attempts, progress_timeout_s=30.0, max_waiting=max_waiting)
        self.all: list[Command] = []
        self.now = 100.0

    def do(self, *events: Any) -> list[Command]:
        commands = [c for event in events for c in self.core.handle(event, self.now)]
        self.all += commands
        return commands

    def tokens(self, *deltas: TokenDelta) -> list[Command]:
        commands = self.core.tokens(deltas, self.now)
        self.all += commands
        return commands

    def run(self, prefill: str | None = None, max_tokens: int = 100) -> None:
        self.do(WorkerUp("d1"), Submitted(request(max_tokens=max_tokens), "sink"))
        self.do(Placed("a", 0, 0, placement("d1", prefill)))

    def delivered(self) -> list[int]:
        return [t for c in self.all if isinstance(c, Deliver) for t in c.delta.token_ids]

    def reserved(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for command in self.all:
            if isinstance(command, Reserve):
                total[command.incarnation] += command.tokens
            elif isinstance(command, Release):
                total[command.incarnation] -= command.tokens
        return {k: v for k, v in total.items() if v}


def the(kind: type[Any], commands: list[Command]) -> Any:
    found = [c for c in commands if isinstance(c, kind)]
    assert len(found) == 1, commands
    return found[0]
