"""The router service when workers, links, sinks or Redis fail: what clients see, and who is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from penstock.common.errors import Overloaded, QueueTimeout
from penstock.common.messages import MeasuredRates, TokenDelta
from penstock.common.redis_state import FleetReader
from penstock.router.fleet import Fleet
from tests.router.fake_worker import FakeWorker, oracle
from tests.router.services import LEASE_S, Collector, ended, play, request, running, send, until


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    one = Proxy()
    yield one
    one.close()


class Proxy:
    """A TCP proxy whose connections can be cut."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.target = 0
        self._pairs: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        for one in self._pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            self._pairs += [client, server]
            for a, b in ((client, server), (server, client)):
                self._threads.append(threading.Thread(target=self._pump, args=(a, b)))
                self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
        source.close()


def test_a_killed_worker_shows_nothing_to_the_client(redis_server, start_worker, caplog):
    victim, other = start_worker("d1"), start_worker("d2")
    victim.limit = other.limit = 5

    async def scenario() -> None:
        async with running(redis_server.url, 2) as service:
            sinks = [await send(service, request(f"r{i}")) for i in range(12)]
            await until(lambda: all(len(sink.tokens) == 5 for sink in sinks))
            other.limit = 1 << 30
            lost = len(victim.submitted)
            assert lost > 0
            await asyncio.get_running_loop().run_in_executor(None, victim.kill)
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks)
            assert service.counters()["retries"] == lost
            told = [record.request_id for record in caplog.records if record.message.startswith("trying again: ")]
            assert sorted(told) == sorted(r.request_id for r in victim.submitted)
            again = [r for r in other.submitted if r.attempt == 1]
            assert len(again) == lost and all(r.output_token_ids == oracle(r)[:5] for r in again)

    play(scenario())


def test_a_worker_that_restarts_in_time_is_waited_for(redis_server, start_worker):
    victim = start_worker("d1")
    victim.limit = 5

    async def scenario() -> None:
        async with running(redis_server.url, 1) as service:
            sink = await send(service, request("r"))
            await until(lambda: len(sink.tokens) == 5)
            await asyncio.get_running_loop().run_in_executor(None, victim.kill)
            await until(lambda: not service.ready())
            late = await send(service, request("late"))
            start_worker("d1")
            await ended(sink, late)
            assert sink.complete() and late.complete()

    play(scenario())


def test_a_goodbye_is_no_loss(redis_server, start_worker, caplog):
    caplog.set_level("INFO")
    leaving, staying = start_worker("d1"), start_worker("d2")

    async def scenario() -> None:
        async with running(redis_server.url, 2) as service:
            await asyncio.get_running_loop().run_in_executor(None, leaving.close)
            await until(lambda: len(service.loads()) == 1)
            assert service.counters()["workers_lost"] == 0 and len(staying.peers) == 1
        await until(lambda: len(staying.peers) == 0)  # long before a lease is over

    play(scenario())
    told = [record for record in caplog.records if "worker d1" in record.message and "has left" in record.message]
    assert [record.levelname for record in told] == ["INFO"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_cut_connection_is_a_new_session(redis_server, start_worker, proxy):
    worker = start_worker("d1", announced=proxy.address)
    proxy.target = worker.port
    worker.limit = 5

    async def scenario() -> None:
        async with running(redis_server.url, 1) as service:
            sinks = [await send(service, request(f"r{i}")) for i in range(5)]
            await until(lambda: all(len(sink.tokens) == 5 for sink in sinks))
            proxy.cut()
            await until(lambda: service.counters()["workers_lost"] == 1)
            worker.limit = 1 << 30
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks)
            assert service.counters()["retries"] == 5
            await until(lambda: not worker.running)  # the older session's requests ended with it

    play(scenario())


def test_no_progress_is_a_timeout(redis_server, start_worker):
    worker = start_worker("d1")
    worker.limit = 3

    async def scenario() -> None:
        async with running(redis_server.url, 1, progress_timeout_s=1.5) as service:
            sink = await send(service, request("r"))
            await ended(sink)
            assert sink.error is not None and sink.error.code == "timeout" and len(sink.tokens) == 3
            await until(lambda: not worker.running)

    play(scenario())


def test_a_broken_sink_hurts_nobody_else(redis_server, start_worker):
    worker = start_worker("d1")

    class Broken(Collector):
        def on_delta(self, delta: TokenDelta) -> None:
            raise RuntimeError("a bug of the front")

    async def scenario() -> None:
        async with running(redis_server.url, 1) as service:
            await service.submit(request("broken"), Broken(request("broken")))
            sinks = [await send(service, request(f"r{i}")) for i in range(5)]
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks)
            await until(lambda: worker.aborted == [("broken", 0)] and service.counters()["in_flight"] == 0)

    play(scenario())


def test_a_worker_that_hangs_is_taken_out_until_it_goes_on(redis_server, start_worker):
    rates = MeasuredRates(prefill_tokens_per_s=1e6)  # steps are short: none has to be waited for
    workers = [start_worker(name, rates=rates) for name in ("d1", "d2")]

    async def scenario() -> None:
        async with running(redis_server.url, 2, lease_s=LEASE_S, stall_timeout_s=0.5) as service:

            def state(worker: FakeWorker) -> str:
                return service.states()[worker.info.incarnation].state

            for worker in workers:
                worker.limit = 5
            sinks = [await send(service, request(f"r{i}")) for i in range(6)]
            await until(lambda: all(len(sink.tokens) == 5 for sink in sinks))
            hanging = workers[0] if workers[0].running else workers[1]
            (other,) = [worker for worker in workers if worker is not hanging]
            other.limit = 1 << 30
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks), "they went on at the other worker"
            assert service.counters()["workers_stalled"] >= 1 and service.counters()["workers_lost"] == 0
            await until(lambda: state(hanging) == "up" and state(other) == "up")  # it has nothing to do any more
            hanging.answers_heartbeats = False
            await until(lambda: state(hanging) == "stalled")
            before = len(hanging.submitted)
            sinks = [await send(service, request(f"s{i}")) for i in range(6)]
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks) and len(hanging.submitted) == before
            hanging.answers_heartbeats, hanging.limit = True, 1 << 30
            await until(lambda: state(hanging) == "up")

    play(scenario())


@pytest.mark.parametrize(("code", "level"), [("unavailable", "INFO"), ("internal_error", "WARNING")])
def test_only_what_is_wrong_with_a_worker_is_a_warning(redis_server, start_worker, caplog, code, level):
    """One that drains may refuse what was sent before its router heard of it."""
    caplog.set_level("INFO")
    refusing, _ = start_worker("d1"), start_worker("d2")
    refusing.fails = code

    async def scenario() -> None:
        async with running(redis_server.url, 2) as service:
            sinks = [await send(service, request(f"r{i}")) for i in range(10)]
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks)
            assert service.counters()["retries"] == len(refusing.submitted) > 0

    play(scenario())
    told = [record.levelname for record in caplog.records if record.message.startswith("trying again: it fails")]
    assert told == [level] * len(refusing.submitted)


def test_a_worker_that_fails_is_left_alone_and_tried_again(redis_server, start_worker):
    bad, good = start_worker("d1"), start_worker("d2")
    bad.fails = "internal_error"

    async def scenario() -> None:
        async with running(redis_server.url, 2) as service:
            number = 0
            while service.states()[bad.info.incarnation].state != "broken":
                sink = await send(service, request(f"r{number}"))
                await ended(sink)
                assert sink.complete(), "the other worker serves it"
                number += 1
                assert number < 100
            assert service.counters()["workers_broken"] == 1 and len(bad.submitted) == 3
            assert "next try in" in service.states()[bad.info.incarnation].reason
            bad.fails = ""
            while service.states()[bad.info.incarnation].state != "up":  # after the back-off
                sink = await send(service, request(f"r{number}"))
                await ended(sink)
                number += 1
                await asyncio.sleep(0.05)
            assert good.submitted

    play(scenario())


def test_a_pair_whose_hand_offs_fail_is_avoided_as_a_pair(redis_server, start_worker):
    one, two, prefill = start_worker("d1"), start_worker("d2"), start_worker("p1", "prefill")
    one.prefill_worker = two.prefill_worker = prefill
    one.local_prefill = True  # as if its hand-offs failed

    async def scenario() -> None:
        async with running(redis_server.url, 3) as service:
            number = 0
            while not service.broken_pairs():
                await ended(await send(service, request(f"r{number}")))
                number += 1
                assert number < 100
            [(lender, reader, _)] = service.broken_pairs()
            assert (lender, reader) == ("p1", "d1") and service.counters()["pairs_broken"] == 1
            assert {state.state for state in service.states().values()} == {"up"}, "each is fine with others"
            one.local_prefill = False
            while service.broken_pairs():
                sink = await send(service, request(f"r{number}"))
                await ended(sink)
                assert sink.complete()
                number += 1
                await asyncio.sleep(0.05)

    play(scenario())


def test_nobody_notices_an_outage_of_redis(own_redis, start_worker):
    workers = [start_worker(name, url=own_redis.url, lease_s=LEASE_S) for name in ("d1", "d2")]

    async def scenario() -> None:
        async with running(own_redis.url, 2, lease_s=LEASE_S) as service:
            for worker in workers:
                worker.limit = 5
            before = [await send(service, request(f"b{i}")) for i in range(6)]
            await until(lambda: all(len(sink.tokens) == 5 for sink in before))
            own_redis.stop()
            for worker in workers:
                worker.limit = 1 << 30
            during = [await send(service, request(f"d{i}")) for i in range(6)]
            await ended(*before, *during)
            await asyncio.sleep(1.25 * LEASE_S)  # workers stay, for their links are up
            assert len(service.loads()) == 2 and service.counters()["redis_failures"] > 0
            own_redis.start()
            late = start_worker("d3", url=own_redis.url)
            await until(lambda: len(service.loads()) == 3)
            after = [await send(service, request(f"a{i}")) for i in range(9)]
            await ended(*after)
            assert all(sink.complete() for sink in (*before, *during, *after))
            assert late.submitted
            with contextlib.closing(own_redis.client()) as client:
                key = f"penstock:load:{service.router_id}"
                await until(lambda: client.hgetall(key) == {b"": b"0"})

    play(scenario())
    for worker in workers:
        worker.close()


def test_a_turn_that_fails_is_followed_by_others(redis_server, start_worker, monkeypatch, caplog):
    start_worker("d1")
    turns = Counter()

    def failing(name, real):
        def one(*arguments):
            turns[name] += 1
            if turns[name] <= 2:
                raise OSError(f"{name}: too many open files")
            return real(*arguments)

        return one

    monkeypatch.setattr(FleetReader, "workers", failing("discover", FleetReader.workers))
    monkeypatch.setattr(Fleet, "acceptable", failing("tick", Fleet.acceptable))

    async def scenario() -> None:
        async with running(redis_server.url, 1) as service:
            await until(lambda: turns["tick"] > 2)
            sink = await send(service, request("r"))
            await ended(sink)
            assert sink.complete() and service.ready()

    play(scenario())
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert sorted(told) == [f"{name}: a turn failed: {name}: too many open files" for name in ("discover", "tick")]


@pytest.mark.parametrize("name", ["discover", "tick"])
def test_a_router_without_one_of_its_tasks_is_not_ready(redis_server, start_worker, name):
    start_worker("d1")

    async def scenario() -> None:
        async with running(redis_server.url, 1) as service:
            assert service.ready()
            (task,) = (task for task in service._tasks if task.get_name() == name)
            task.cancel()
            await until(lambda: not service.ready())
            assert service.why_not_ready() == f"its task {name} has ended: start it again"

    play(scenario())


def test_a_full_worker_that_is_left_alone_has_its_newcomers_wait_and_told_why(redis_server, start_worker, caplog):
    worker = start_worker("d1", max_num_seqs=1)
    worker.limit = 1

    async def scenario() -> None:
        async with running(redis_server.url, 1, queue_timeout_s=1.0) as service:
            first = await send(service, request("first", tokens=500))
            await until(lambda: first.tokens and service.loads()[0][1].running == 1)
            for _ in range(20):
                service._health.failed(worker.info.incarnation, "a request made no progress", time.monotonic())
            late = [await send(service, replace(request(f"late{i}"), queue_timeout_s=0.5)) for i in range(4)]
            await ended(*late)
            assert all(isinstance(sink.error, (Overloaded, QueueTimeout)) for sink in late), [s.error for s in late]
            service.cancel("first", 0)

    play(scenario())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
