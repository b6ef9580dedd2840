"""The prefix index against brute force: any history of pages, deaths, losses and outages, on a real redis-server."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penstock.common import announcements as announcements_module
from penstock.common.announcements import Announcements
from penstock.common.index_writer import IndexWriter, Sweeper
from penstock.common.page_hash import chained, page_hashes, root_hash
from penstock.common.prefix_index import BUCKET_TTL_S, LOOK_UP, PACKED_BYTES, pack
from tests.index_view import index_view

WORKERS = 3
# Prompts that fork: the first half is shared, and two scopes (models, LoRA names, salts) stand side by side.
PROMPTS = [
    list(page_hashes(root_hash(scope, [salt]), [*range(16), *range(tail, tail + 16)], 4))
    for scope, salt in (("model-a", ""), ("model-a", "salt"), ("model-b", "lora"))
    for tail in (100, 200)
]
PARENTS = {page: parent for prompt in PROMPTS for page, parent in chained(prompt)}
PAGES = sorted(PARENTS)
numbers = st.integers(0, WORKERS - 1)
pages = st.lists(st.sampled_from(PAGES), max_size=12)
steps = st.one_of(
    st.tuples(st.just("change"), numbers, pages, pages),
    st.tuples(st.just("prompt"), numbers, st.sampled_from(PROMPTS), pages),
    st.tuples(st.sampled_from(["write", "answer lost", "batch lost", "overflow"]), numbers),
    st.tuples(st.sampled_from(["restart", "expire", "leave", "repeat", "sweep"]), numbers),
    st.tuples(st.sampled_from(["flush", "slots lost"])),
)


@dataclass
class Worker:
    """One worker as its registry thread drives it, and what it truly caches."""

    client: redis.Redis
    number: int
    life: int = 0
    truth: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.incarnation = f"w{self.number}-{self.life}"
        self.known = Announcements(1 << 30)
        self.writer = IndexWriter(self.client, "ns", self.incarnation, 60.0)
        self.sweeper = Sweeper(self.client, "ns", self.incarnation, 60.0)
        self.enter()

    def enter(self) -> None:
        if self.writer.enter(self.known.seq, not self.known.overflowed):
            self.known.restart()

    def publish(self, added: list[bytes], removed: list[bytes]) -> None:
        new = [page for page in dict.fromkeys(added) if page not in self.truth - set(removed)]
        self.known.publish([(page, PARENTS[page]) for page in new], removed)
        self.truth = self.truth - set(removed) | set(new)

    def write(self, acknowledge: bool = True) -> None:
        if self.known.overflowed:
            self.enter()
        batch = self.known.next()
        if batch is not None:
            if not self.writer.write(batch):
                self.enter()
            elif acknowledge:
                self.known.acknowledged()

    def settle(self) -> None:
        self.enter()
        while self.known.overflowed or self.known.next() is not None:
            self.write()

    def sweep(self) -> None:
        self.sweeper.begin()
        while self.sweeper.step():
            pass

    def held(self, prompt: list[bytes]) -> int:
        return next((count for count, page in enumerate(prompt) if page not in self.truth), len(prompt))


def play(client: redis.Redis, workers: list[Worker], step: tuple) -> None:
    kind, *rest = step
    if kind == "flush":
        client.flushall()
        return
    if kind == "slots lost":  # evicted, say
        client.delete("ns:slots")
        return
    one = workers[rest[0]]
    if kind in ("change", "prompt"):
        one.publish(rest[1], rest[2])
    elif kind in ("write", "answer lost"):
        one.write(acknowledge=kind == "write")
    elif kind == "batch lost" and one.known.next() is not None:
        one.known.acknowledged()
    elif kind == "overflow":
        one.known.overflowed = True
    elif kind == "expire":
        client.delete(f"ns:index:{one.incarnation}")
    elif kind == "repeat":
        one.known.repeat(5)
    elif kind == "sweep":
        one.sweep()
    elif kind in ("restart", "leave"):
        if kind == "leave":
            one.known.leave()
            one.write()
            one.writer.leave(one.known)
        else:
            client.delete(f"ns:index:{one.incarnation}")  # its lease has run out
        workers[one.number] = Worker(client, one.number, one.life + 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=30))
@example([("prompt", 0, PROMPTS[0], []), ("batch lost", 0), ("prompt", 0, PROMPTS[3], []), ("write", 0)])
@example([("prompt", 0, PROMPTS[0], []), ("write", 0), ("write", 0), ("slots lost",), ("restart", 1), ("write", 0)])
def test_look_ups_equal_brute_force_after_any_history(redis_server, monkeypatch, history: list[tuple]) -> None:
    monkeypatch.setattr(announcements_module, "BATCH_PAGES", 5)
    with contextlib.closing(redis_server.client()) as client:
        client.flushall()
        workers = [Worker(client, number) for number in range(WORKERS)]
        sweeps = [i for i, step in enumerate(history) if step[0] == "sweep"]
        for i, step in enumerate(history):
            if i not in sweeps[1:]:  # one a history: it visits all buckets
                play(client, workers, step)
        for _ in range(2):  # a slot that one settles may be what another has to notice
            for one in workers:
                one.settle()
        look_up = client.register_script(LOOK_UP)
        names = [one.incarnation for one in workers]
        for prompt in [*PROMPTS, PROMPTS[0][:1], PROMPTS[0][:0]]:
            keys = [f"ns:index:{name}" for name in [*names, "nobody"]]
            answer = look_up(keys, ["ns", "router", pack(prompt), *names, "nobody"])
            assert answer[:-1:2] == [*(one.held(prompt) for one in workers), 0]


def test_dead_workers_are_swept_out_and_their_slots_given_again(redis_server) -> None:
    with contextlib.closing(redis_server.client()) as client:
        first, second = Worker(client, 0), Worker(client, 1)
        for one in (first, second):
            one.publish(PROMPTS[0], [])
            one.settle()
        client.delete("ns:index:w0-0")
        third = Worker(client, 2)
        slots = client.hgetall("ns:slots")
        assert slots[b"0"] == b"w0-0" and slots[b"2"] == b"w2-0", "nobody gets a slot that is still in the buckets"
        third.sweeper.begin()
        second.sweep()
        assert b"0" in client.hgetall("ns:slots"), "one sweeps at a time"
        while third.sweeper.step():
            pass
        assert set(client.hgetall("ns:slots")) == {b"generation", b"1", b"2"}
        assert index_view(client, "ns") == {"w1-0": {pack([page]) for page in PROMPTS[0]}, "w2-0": set()}
        assert client.hgetall("ns:slots").get(b"0") is None
        fourth = Worker(client, 0, life=1)
        assert client.hget("ns:slots", "0") == b"w0-1" and index_view(client, "ns")["w0-1"] == set()
        for one in (second, third, fourth):
            one.known.leave()
            one.settle()
            one.writer.leave(one.known)
        assert client.keys("*") == []


def test_one_worker_looks_for_the_dead_and_the_others_do_not(redis_server) -> None:
    """Whoever looks asks for each worker: with thousands that all do Redis would have time for nothing else."""
    with contextlib.closing(redis_server.client()) as client:
        workers = [Worker(client, number) for number in range(WORKERS)]
        asked = []
        for one in [*workers, workers[0]]:
            client.config_resetstat()
            one.sweep()
            asked.append(client.info("commandstats").get("cmdstat_get", {}).get("calls", 0))
        assert asked == [1 + WORKERS, *[1] * (WORKERS - 1), 1 + WORKERS]
        workers[0].writer.leave(workers[0].known)
        client.delete(f"ns:index:{workers[1].incarnation}")
        workers[2].sweep()
        assert workers[1].incarnation.encode() not in client.hgetall("ns:slots").values(), "another one takes over"


def test_what_the_index_lost_is_announced_again_and_said(redis_server, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(redis_server.client()) as client:
        one = Worker(client, 0)
        one.publish([page for prompt in PROMPTS for page in prompt], [])
        one.settle()
        lost = client.keys("ns:pages:*")[:3]
        client.delete(*lost)
        assert len(index_view(client, "ns")["w0-0"]) == len(PAGES) - 3
        one.known.repeat(len(PAGES))
        one.settle()
        assert len(index_view(client, "ns")["w0-0"]) == len(PAGES)
        assert f"had lost 3 of {len(PAGES)} pages" in caplog.text and one.writer.repaired == 3


def test_what_nobody_refreshes_expires_and_what_is_announced_again_stays(redis_server) -> None:
    with contextlib.closing(redis_server.client()) as client:
        one = Worker(client, 0)
        one.publish([page for prompt in PROMPTS for page in prompt], [])
        one.settle()
        buckets = client.keys("ns:pages:*")
        assert all(0 < client.pttl(bucket) <= BUCKET_TTL_S * 1000 for bucket in buckets)
        for bucket in buckets:
            client.pexpire(bucket, 60_000)  # as if nothing had come for long
        one.known.repeat(len(PAGES))
        one.settle()
        assert all(client.pttl(bucket) > 60_000 for bucket in buckets)


@given(st.lists(st.tuples(pages, pages), max_size=20))
def test_announced_is_what_can_be_reached(changes: list[tuple[list[bytes], list[bytes]]]) -> None:
    known, truth, announced = Announcements(1 << 30), set(), set()
    for added, removed in changes:
        known.publish([(page, PARENTS[page]) for page in added], removed)
        truth = truth - set(removed) | set(added)
        while (batch := known.next()) is not None:
            assert known.next() is batch, "the same again until it is acknowledged"
            announced = announced - set(batch.gone) | set(batch.held)
            known.acknowledged()
        assert announced == {page for page in truth if reachable(page, truth)}
        assert known.num_held == len(truth)


def test_pages_are_announced_again_however_many_changes_there_are() -> None:
    """Where writing takes longer than a step there is always a change to tell."""
    known, again = Announcements(1 << 30), set()
    steady, changing = PROMPTS[0], next(page for page in PAGES if page not in PROMPTS[0] and not PARENTS[page])
    known.publish([(page, PARENTS[page]) for page in steady], [])
    for turn in range(8):
        known.publish([(changing, b"")], [changing])
        known.repeat(known.num_held)
        batch = known.next()
        assert batch is not None and batch.again == bool(turn % 2), "they take turns"
        if batch.again:
            again.update(batch.held)
        known.acknowledged()
    assert again == set(steady), "the index need not know a page whose change is still to be told"


def reachable(page: bytes, truth: set[bytes]) -> bool:
    """Whether the page and all before it are held."""
    while page in truth:
        page = PARENTS[page]
        if not page:
            return True
    return False


def test_packing_keeps_the_bits_it_says() -> None:
    packed = pack(PAGES)
    for i, page in enumerate(PAGES):
        one = packed[i * PACKED_BYTES : (i + 1) * PACKED_BYTES]
        number = int.from_bytes(page[:9], "big") & ((1 << 66) - 1)
        assert one == number.to_bytes(9, "big")
    assert pack([]) == b""
