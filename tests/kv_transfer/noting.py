"""A mover and links that only take notes, a worker to speak to, and rates that are known."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.common.messages import MeasuredRates, Message, WorkerInfo
from penstock.common.rate_estimator import RateEstimator
from penstock.kv_transfer.jobs import Completion, ReadJob, SealJob
from penstock.kv_transfer.peer_links import LinkEvent
from tests.worker_info import worker_info


def nixl_worker(worker_id: str, incarnation: str) -> WorkerInfo:
    """A worker whose pages are read with NIXL."""
    return worker_info(worker_id, incarnation, role=worker_id.partition("-")[0], transports={"nixl": b""})


@dataclass
class NotingMover:
    """What it was asked; `done` is what it has to report."""

    jobs: dict[str, ReadJob] = field(default_factory=dict)
    seals: list[SealJob] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    done: list[Completion] = field(default_factory=list)
    moved_bytes: int = 0
    readers_expected: int = 0

    def connect(self, peer: str, transport: str, description: bytes) -> None: ...

    def disconnect(self, peer: str) -> None: ...

    def read(self, job: ReadJob) -> None:
        self.jobs[job.tag] = job

    def cancel(self, tag: str) -> None:
        self.cancelled.append(tag)

    def seal(self, job: SealJob) -> None:
        self.seals.append(job)

    def expect_readers(self) -> None:
        self.readers_expected += 1

    def poll_done(self) -> list[Completion]:
        done, self.done = self.done, []
        return done


@dataclass
class NotingLinks:
    """What was sent; `events` is what comes next; lenders keep their loans until `until`, and answer at once, but
    no more than `answered` of what they are `asked`."""

    sent: list[Message] = field(default_factory=list)
    events: list[tuple[str, LinkEvent]] = field(default_factory=list)
    until: float = 10.0
    asked: int = 0
    answered: int = 1000

    def __len__(self) -> int:
        return 0

    def send(self, worker: WorkerInfo, message: Message, now: float) -> None:
        self.sent.append(message)

    def send_if_linked(self, incarnation: str, message: Message) -> None:
        self.sent.append(message)

    def leased_until(self, incarnation: str) -> float:
        return self.until

    def ask(self, incarnation: str, now: float) -> int:
        self.asked += 1
        return self.asked

    def proven(self, incarnation: str) -> int:
        return self.answered

    def poll(self, now: float) -> list[tuple[str, LinkEvent]]:
        events, self.events = self.events, []
        return events


class KnownRates(RateEstimator):
    """Says what it is told to, whatever happens."""

    def __init__(self, **rates: float) -> None:
        super().__init__()
        self._known = MeasuredRates(**rates)

    def rates(self) -> MeasuredRates:
        return self._known
