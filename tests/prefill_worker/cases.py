"""A prefill worker's role: a real scheduler with an executor that counts, a mover and a bus that take notes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from penstock.common.messages import (
    GenerateRequest,
    Message,
    PagesLanded,
    Prefill,
    WorkerInfo,
)
from penstock.common.sampling import SamplingParams
from penstock.engine.core import Engine
from penstock.engine.policy import PrefillPolicy
from penstock.engine.replies import Replies
from penstock.kv_transfer.exchange import PageExchange
from penstock.kv_transfer.leases import Landings
from penstock.kv_transfer.lender import Lender
from penstock.kv_transfer.mover import ReadDone, ReadJob, Sealed
from penstock.kv_transfer.peer_transports import PeerTransports
from penstock.kv_transfer.reader import Reader
from penstock.prefill_worker.handoff import HandOffOut
from tests.engine.test_scheduler import Submitting, make_scheduler
from tests.kv_transfer.noting import NotingLinks, NotingMover

DECODE, ROUTER = b"decode/1", b"router/1"
PROMPT = [1] * 10  # pages of 4, 4 and 2


class Case:
    """A prefill worker with a budget of 4 tokens a step: one page a step."""

    def __init__(self, checksum: str = "all", router: bytes | None = ROUTER, run_ahead: int = 0) -> None:
        self.sent: list[tuple[bytes, Message]] = []
        self.now = 0.0
        scheduler = make_scheduler(16, 4, policy=PrefillPolicy())
        self.executor = Submitting(16, run_ahead)
        self.engine = Engine(scheduler, self.executor, lambda: self.now)
        peers = SimpleNamespace(draining=False, identity_of=lambda name: router)
        bus = SimpleNamespace(send=lambda identity, message: self.sent.append((identity, message)))
        info = SimpleNamespace(worker_id="prefill-0", page_bytes=16 << 20)
        self.loop: Any = SimpleNamespace(info=info, engine=self.engine, peers=peers, bus=bus, replies=Replies(bus.send))
        self.mover = NotingMover()
        self.links = NotingLinks()
        mover: Any = self.mover
        links: Any = self.links
        pages = self.engine.pages
        lender = Lender(pages, mover, bus.send, page_bytes=16 << 20, checksum=checksum)
        reader = Reader(pages, mover, links, Landings(), PeerTransports(["nixl"], "auto"))
        self.role = HandOffOut(self.loop, PageExchange(lender, reader, mover, links), lambda: self.now)

    def prefill(
        self,
        held_tokens: int = 0,
        name: str = "r",
        source: WorkerInfo | None = None,
        choice: int = 0,
        link_bytes_per_s: float = 0.0,
        output: tuple[int, ...] = (),
        **sampling: Any,
    ) -> None:
        params = SamplingParams(**{"max_tokens": 5, **sampling})
        request = GenerateRequest(
            request_id=name, choice=choice, prompt_token_ids=PROMPT, output_token_ids=list(output), sampling=params
        )
        message = Prefill(
            request=request,
            router_id="router",
            held_tokens=held_tokens,
            source=source,
            link_bytes_per_s=link_bytes_per_s,
        )
        self.role.handle(DECODE, message, self.now)

    def step(self) -> None:
        self.role.tick(self.now)
        if self.engine.has_work() and (output := self.engine.step_if_done()) is not None:
            self.role.stepped(output, self.now)
        self.loop.replies.flush()

    def seal_all(self) -> None:
        self.mover.done += [Sealed(job.tag, [7] * len(job.pages)) for job in self.mover.seals]
        self.mover.seals.clear()
        self.role.tick(self.now)

    def arrive(self) -> list[ReadJob]:
        """What was to be read has landed: pages from the prompt's first one on."""
        jobs = list(self.mover.jobs.values())
        slots = self.executor.fake.slots
        slots |= {
            (page, slot): (4 * index + slot, PROMPT[slot])
            for job in jobs
            for index, page in enumerate(job.dst_pages)
            for slot in range(4)
        }
        self.mover.done += [ReadDone(job.tag, 64 * len(job.dst_pages), 0.1, 0.5) for job in jobs]
        return jobs

    def of(self, kind: type) -> list[Any]:
        return [message for _, message in self.sent if isinstance(message, kind)]

    def land(self, name: str = "r", choice: int = 0) -> None:
        self.role.handle(DECODE, PagesLanded(request_id=name, attempt=0, choice=choice), self.now)

    def finish(self) -> None:
        self.engine.pages.check()
        assert self.engine.pages.num_held == 0
        assert not self.role.busy()
        assert not any(held for name, held in self.role.ledger().items() if name != "transports")
