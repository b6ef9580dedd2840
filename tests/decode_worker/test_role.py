"""The decode worker's role, with a real scheduler, an executor that counts, and a reader that takes notes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from penstock.common.messages import (
    Abort,
    Finish,
    GenerateRequest,
    Message,
    Move,
    PagesReady,
    Prefill,
    PrefillDone,
    Submit,
    TokenBatch,
    TokenDelta,
    WorkerInfo,
)
from penstock.common.sampling import SamplingParams
from penstock.decode_worker import role
from penstock.decode_worker.role import DecodeRole
from penstock.engine.core import Engine
from penstock.engine.replies import Replies, prompt_scores_bytes
from penstock.engine.request import Request
from penstock.kv_transfer.exchange import PageExchange
from penstock.kv_transfer.jobs import ReadDone
from penstock.kv_transfer.leases import Landings
from penstock.kv_transfer.lender import Lender
from penstock.kv_transfer.peer_links import LinkEvent, PeerFound, PeerLost
from penstock.kv_transfer.peer_transports import PeerTransports
from penstock.kv_transfer.reader import Reader
from tests.engine.test_scheduler import Submitting, make_scheduler, oracle
from tests.kv_transfer.noting import KnownRates, NotingLinks, NotingMover, nixl_worker

ROUTER = b"router/1"
PREFILL = nixl_worker("prefill-0", "p1")
PROMPT = [1, 2, 0, 1, 2, 2, 1, 0]  # two full pages


class Case:
    """A decode worker with 16 pages of 4 tokens."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Message]] = []
        self.executor = Submitting(16, 0)
        self.engine = Engine(make_scheduler(16, 16), self.executor, lambda: 0.0)
        peers = SimpleNamespace(draining=False, lease_s=10.0)
        bus = SimpleNamespace(send=lambda identity, message: self.sent.append((identity, message)))
        loop: Any = SimpleNamespace(
            info=SimpleNamespace(worker_id="decode-0", vocab_size=100),
            engine=self.engine,
            peers=peers,
            bus=bus,
            replies=Replies(bus.send),
        )
        self.replies = loop.replies
        self.mover, self.links = NotingMover(), NotingLinks()
        mover: Any = self.mover
        links: Any = self.links
        pages = self.engine.pages
        lender = Lender(pages, mover, bus.send, page_bytes=64, checksum="off")
        reader = Reader(pages, mover, links, Landings(), PeerTransports(["nixl"], "auto"))
        self.role = DecodeRole(loop, PageExchange(lender, reader, mover, links))

    def submit(
        self,
        name: str,
        prompt: list[int],
        *,
        remote: bool = False,
        max_tokens: int = 5,
        choice: int = 0,
        source: WorkerInfo | None = None,
    ) -> None:
        params = SamplingParams(max_tokens=max_tokens)
        request = GenerateRequest(request_id=name, choice=choice, prompt_token_ids=prompt, sampling=params)
        self.role.handle(ROUTER, Submit(request=request, prefill=PREFILL if remote else None, source=source), 0.0)
        self.role.tick(0.0)

    def hear(self, *events: LinkEvent) -> None:
        self.links.events += [("p1", event) for event in events]
        self.role.tick(0.0)

    def arrive(self, prompt: list[int]) -> None:
        """What is to be read has landed."""
        for job in self.mover.jobs.values():
            for index, page in enumerate(job.dst_pages):
                for slot in range(4):
                    position = 4 * index + slot
                    self.executor.fake.slots[page, slot] = position, prompt[position]
            self.mover.done.append(ReadDone(job.tag, 64 * len(job.dst_pages), 0.1, 0.0))
        self.mover.jobs.clear()
        self.role.tick(0.0)

    def step(self) -> None:
        self.role.tick(0.0)
        if self.engine.has_work():
            self.role.stepped(self.engine.step(), 0.0)
        self.replies.flush()

    def deltas(self, name: str) -> list[TokenDelta]:
        batches = [message for _, message in self.sent if isinstance(message, TokenBatch)]
        return [delta for batch in batches for delta in batch.deltas if delta.request_id == name]

    def tokens(self, name: str) -> list[int]:
        return [token for delta in self.deltas(name) for token in delta.token_ids]

    def finish(self) -> None:
        for _ in range(30):
            self.step()
        self.engine.pages.check()
        assert self.engine.pages.num_held == self.engine.pages.num_promised == 0
        assert not self.role.busy()


def _all_pages_here(case: Case) -> None:
    case.submit("r", PROMPT, remote=True)
    case.hear(PeerFound(PREFILL), PagesReady(request_id="r", attempt=0, first_page=0, pages=[[40, 41]], num_tokens=8))
    case.arrive(PROMPT)


def test_a_handed_off_prompt_goes_on_behind_its_first_token() -> None:
    case = Case()
    _all_pages_here(case)
    first, *more = oracle(PROMPT, 5)
    case.hear(PrefillDone(request_id="r", attempt=0, token_ids=[first]))
    case.finish()
    assert case.tokens("r") == more


def test_a_first_token_that_fills_the_context_was_the_last() -> None:
    """The router may not have known this worker's context, nor the prefill worker."""
    case = Case()
    case.engine.scheduler.max_model_len = len(PROMPT) + 1
    _all_pages_here(case)
    case.hear(PrefillDone(request_id="r", attempt=0, token_ids=[7]))
    case.finish()
    (delta,) = case.deltas("r")
    assert (delta.index, delta.token_ids, delta.finish) == (1, [], Finish(reason="length"))


def move(case: Case, name: str) -> TokenDelta:
    """How a request ends that is to go on elsewhere."""
    case.role.handle(ROUTER, Move(request_id=name, attempt=0), 0.0)
    case.step()
    return case.deltas(name)[-1]


def test_what_moves_says_how_much_of_it_is_kept() -> None:
    case = Case()
    case.submit("r", [*PROMPT, 1, 2], max_tokens=20)
    for _ in range(4):
        case.step()
    delta = move(case, "r")  # ten tokens and what came behind them
    known = 10 + len(case.tokens("r"))
    assert delta.finish == Finish(reason="moved", kept_tokens=known - 1) and delta.index == known - 10
    assert case.role.busy(), "kept for a lease"
    again = GenerateRequest(
        request_id="again",
        prompt_token_ids=[*PROMPT, 1, 2],
        output_token_ids=case.tokens("r"),
        sampling=SamplingParams(),
    )
    request, scope = Request(again, 0.0), case.engine.scheduler.hash_scope
    hashes = [*request.extend_hashes(scope, 4, known - 1), request.tail_hash(scope, 4, known - 1)]
    assert hashes[-1] and len(case.engine.pages.match(hashes)) == len(hashes), "what its last page holds, too"
    case.role.tick(11.0)
    case.finish()


def test_of_what_waits_for_room_nothing_is_kept() -> None:
    case = Case()
    case.submit("first", [1, 2, 0] * 20, max_tokens=3)
    case.submit("r", PROMPT, remote=True)
    assert case.role.ledger()["admission"] == 1
    assert move(case, "r").finish == Finish(reason="moved", kept_tokens=0)
    case.finish()


def test_a_stream_that_has_begun_and_finds_no_room_may_try_elsewhere() -> None:
    case = Case()
    case.submit("first", [1, 2, 0] * 20, max_tokens=3)
    for name, output in (("new", []), ("moved", [7])):
        request = GenerateRequest(
            request_id=name,
            prompt_token_ids=PROMPT,
            output_token_ids=output,
            sampling=SamplingParams(max_tokens=5),
            queue_timeout_s=9.0,
        )
        case.role.handle(ROUTER, Submit(request=request), 0.0)
    case.role.tick(0.0)
    assert case.role.load()["held_up"] == case.role.load()["waiting"] == 2
    case.role.tick(9.1)
    case.replies.flush()
    ends = {name: case.deltas(name)[-1].finish for name in ("new", "moved")}
    assert {name: (end.code, end.retryable) for name, end in ends.items() if end} == {
        "new": ("queue_timeout", False),
        "moved": ("queue_timeout", True),
    }
    case.finish()


def test_what_is_scored_keeps_nothing() -> None:
    case = Case()
    params = SamplingParams(max_tokens=20, prompt_logprobs=1)
    case.role.handle(
        ROUTER, Submit(request=GenerateRequest(request_id="r", prompt_token_ids=[1] * 40, sampling=params)), 0.0
    )
    case.step()
    assert case.engine.pages.num_held > 0 and not case.deltas("r")
    assert move(case, "r").finish == Finish(reason="moved", kept_tokens=0)
    case.finish()


def test_what_no_message_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    request = GenerateRequest(
        request_id="r", prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=5, prompt_logprobs=500)
    )
    limit = prompt_scores_bytes(request, 100)
    for most, finish in ((limit, "length"), (limit - 1, "error")):
        monkeypatch.setattr(role, "MAX_PROMPT_SCORES_BYTES", most)
        case.role.handle(ROUTER, Submit(request=request, prefill=None), 0.0)
        case.finish()
        last = case.deltas("r")[-1].finish
        assert last is not None and last.reason == finish
    assert last.code == "invalid_request" and not last.retryable and last.message.startswith("prompt_logprobs")


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    case = Case()
    case.engine.pages.caching = False
    case.submit("r", PROMPT, max_tokens=20)
    case.step()
    case.step()
    assert move(case, "r").finish == Finish(reason="moved", kept_tokens=0)
    case.finish()


def test_who_computes_is_told_how_fast_the_pages_will_be_read() -> None:
    case = Case()
    case.role._reader.rates = KnownRates(link_bytes_per_s=7e9)
    case.submit("r", PROMPT, remote=True)
    (prefill,) = [message for message in case.links.sent if isinstance(message, Prefill)]
    assert prefill.link_bytes_per_s == 7e9
    case.role.handle(ROUTER, Abort(request_id="r", attempt=0), 0.0)
    case.finish()


def test_a_prompt_that_landed_without_its_first_token_shares_no_page_that_is_written_again() -> None:
    """The last token is computed once more: nobody who comes with the same prompt finds that page before it is."""
    case = Case()
    _all_pages_here(case)
    pages = case.engine.pages
    longer = [*PROMPT, 1, 1, 1]
    case.role.handle(ROUTER, Submit(request=_request("other", longer)), 0.0)
    case.hear(PeerLost("p1", "killed"))  # ends the hand-off, then the other one is admitted
    written = {pages.table("r:0:0")[-1]}
    assert len(pages.table("r:0:0")) == 2
    assert len(pages.table("other:0:0")) == 1 and not written & set(pages.table("other:0:0"))
    case.finish()
    assert case.tokens("r") == oracle(PROMPT, 5)
    assert case.tokens("other") == oracle(longer, 5)


@pytest.mark.parametrize("source", [None, nixl_worker("decode-1", "d1")])
def test_choices_of_one_token_are_handed_off_together_and_longer_ones_wait_for_the_pages(
    source: WorkerInfo | None,
) -> None:
    case = Case()
    for choice in range(3):
        case.submit("one", PROMPT, remote=True, max_tokens=1, choice=choice, source=source)
        case.submit("more", PROMPT[::-1], remote=True, choice=choice, source=source)
    asked = [(message.request.request_id, message.request.choice) for message in case.links.sent]
    assert sorted(asked) == [("more", 0), ("one", 0), ("one", 1), ("one", 2)]
    end = Finish(reason="length")
    for choice in range(3):
        case.hear(PrefillDone(request_id="one", attempt=0, choice=choice, token_ids=[1], finish=end))
        case.role.handle(ROUTER, Abort(request_id="more", attempt=0, choice=choice), 0.0)
    case.finish()


@pytest.mark.parametrize("source", [None, nixl_worker("decode-1", "d1")])
def test_what_is_found_in_the_cache_counts_whether_or_not_more_is_fetched(source: WorkerInfo | None) -> None:
    case = Case()
    case.submit("first", PROMPT)
    case.finish()
    case.submit("r", [*PROMPT, *PROMPT], source=source)
    case.links.events.append(("d1", PeerLost("d1", "killed")))
    case.finish()
    assert case.role.load()["fetches"] == (source is not None)
    counters = case.engine.scheduler.counters
    assert case.role.load()["cached_tokens"] + counters.prefix_hits == len(PROMPT)
    assert counters.prompt_tokens == 2 * len(PROMPT)


def test_a_preempted_request_that_waits_for_its_mask_holds_up_nobody() -> None:
    case = Case()
    mask = SimpleNamespace(ready=False, mask=b"\xff" * 16, allows=lambda token: True)
    waiting = Request(_request("waiting", [1, 2, 3]), 0.0)
    waiting.constraint, waiting.preemptions = mask, 1
    case.engine.scheduler.add(waiting)
    case.submit("r", PROMPT)
    assert case.engine.scheduler.get("r:0:0") is not None
    mask.ready = True  # now it waits for pages, and comes first
    case.submit("next", PROMPT)
    assert case.engine.scheduler.get("next:0:0") is None
    case.engine.scheduler.abort(waiting.key)
    case.finish()
    assert case.tokens("r") == case.tokens("next") == oracle(PROMPT, 5)


def _request(name: str, prompt: list[int]) -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=5))
