"""The router service between a real Redis and workers on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from penstock.common.config import RouterConfig
from penstock.common.errors import Overloaded, PenstockError, Unavailable
from penstock.common.messages import GenerateRequest, MeasuredRates, TokenDelta
from penstock.common.page_hash import chained, page_hashes, root_hash
from penstock.common.sampling import SamplingParams
from penstock.common.text_probe import TextProbe
from penstock.router import fleet
from penstock.router.service import ModelInfo, RouterService
from tests.index_view import pages_held
from tests.router.fake_worker import FakeWorker, oracle

LIMIT_S = 60.0
LEASE_S = 2.0  # where its end, or a stall, is awaited; else it is longer than any machine stands still


class Collector:
    """A sink that keeps what came and checks the order."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.error: PenstockError | None = None
        self.deltas: list[TokenDelta] = []
        self.ended = asyncio.Event()
        self.some = asyncio.Event()

    def on_delta(self, delta: TokenDelta) -> None:
        assert not self.ended.is_set() and delta.index == len(self.tokens)
        self.tokens += delta.token_ids
        self.deltas.append(delta)
        self.some.set()
        if delta.finish is not None:
            self.ended.set()

    def on_error(self, error: PenstockError) -> None:
        assert not self.ended.is_set()
        self.error = error
        self.ended.set()

    def complete(self) -> bool:
        return self.error is None and self.tokens == oracle(self.request)


def request(name: str, tokens: int = 20, choice: int = 0, prompt: list[int] | None = None) -> GenerateRequest:
    sampling = SamplingParams(seed=3, max_tokens=tokens)
    return GenerateRequest(
        request_id=name, choice=choice, prompt_token_ids=prompt or [5, 6, 7, 8, 9], sampling=sampling
    )


async def until(check: Callable[[], Any]) -> None:
    async def loop() -> None:
        while not check():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(loop(), LIMIT_S)


async def send(service: RouterService, one: GenerateRequest) -> Collector:
    sink = Collector(one)
    await service.submit(one, sink)
    return sink


async def ended(*sinks: Collector) -> None:
    await asyncio.wait_for(asyncio.gather(*(sink.ended.wait() for sink in sinks)), LIMIT_S)


@contextlib.asynccontextmanager
async def running(
    url: str, workers: int, texts: TextProbe | None = None, **options: Any
) -> AsyncIterator[RouterService]:
    """A service that sees `workers` workers, and that leaves nothing behind."""
    config: dict[str, Any] = {"lease_s": 30.0, "slow_start_s": 0.0, **options}
    service = RouterService(RouterConfig(redis_url=url, **config), texts)
    await service.start()
    try:
        await until(lambda: len(service.loads()) == workers)
        yield service
    finally:
        await service.stop(0.0)
        assert service.counters()["in_flight"] == 0 and service.counters()["reserved_tokens"] == 0
        assert service._context.closed
        assert asyncio.all_tasks() == {asyncio.current_task()}


def play(scenario: Awaitable[None]) -> None:
    async def run() -> None:
        await scenario

    asyncio.run(run())


@pytest.fixture
def start_worker(redis_server: Any) -> Iterator[Callable[..., Any]]:
    started: list[Any] = []
    before = set(threading.enumerate())  # those of a fleet that other tests share are no concern of these

    def start(worker_id: str, role: str = "decode", url: str = "", **options: Any) -> Any:
        started.append(FakeWorker(url or redis_server.url, worker_id, role, **options))
        return started[-1]

    yield start
    for worker in started:
        worker.close()
    left = set(threading.enumerate()) - before
    assert not [t for t in left if t.name == "registry" or t.name.startswith(("d", "p"))]


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


def test_a_worker_that_hashes_differently_is_refused_and_said(redis_server, start_worker, caplog):
    start_worker("d1")

    async def scenario() -> None:
        async with running(redis_server.url, 1) as service:
            other = start_worker("d2", hash_probe="00")
            await until(lambda: service.counters()["workers_refused"] == 1)
            sinks = [await send(service, request(f"r{i}")) for i in range(3)]
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks) and not other.submitted
            told = [record.message for record in caplog.records if record.levelname == "ERROR"]
            assert len(told) == 1 and "d2" in told[0] and "hashes prompts differently" in told[0]

    play(scenario())


def test_a_worker_of_another_tokenizer_is_refused_and_one_of_another_template_said(redis_server, start_worker, caplog):
    ours = TextProbe("one tokenizer", "one template")
    start_worker("d1", texts=ours)
    start_worker("d2", texts=TextProbe("one tokenizer", "another template"))

    async def scenario() -> None:
        async with running(redis_server.url, 2, ours) as service:
            other = start_worker("d3", texts=TextProbe("another tokenizer", "one template"))
            await until(lambda: service.counters()["workers_refused"] == 1)
            assert service.counters()["template_mismatches"] == 1
            sinks = [await send(service, request(f"r{i}")) for i in range(6)]
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks) and not other.submitted
            told = {record.levelname: record.message for record in caplog.records if "another" in record.message}
            assert "d3" in told["ERROR"] and "its tokenizer is another" in told["ERROR"]
            assert "d2" in told["WARNING"] and "chat template" in told["WARNING"]

    play(scenario())


def test_a_worker_of_another_model_gets_nothing(redis_server, start_worker, monkeypatch, caplog):
    monkeypatch.setattr(fleet, "FINGERPRINT_KEPT_S", 0.0)
    first = start_worker("d1")

    async def scenario() -> None:
        async with running(redis_server.url, 1) as service:
            other = start_worker("d2", fingerprint="g", max_model_len=77)
            await until(lambda: service.counters()["workers_refused"] == 1)
            sinks = [await send(service, request(f"r{i}")) for i in range(10)]
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks) and not other.submitted and len(service.loads()) == 1
            assert service.model_info() == ModelInfo(4096, 1000, (2,), 4)
            told = [record.message for record in caplog.records if record.levelname == "ERROR"]
            assert len(told) == 1 and "d2" in told[0] and "'g'" in told[0] and "'f'" in told[0]
            await asyncio.get_running_loop().run_in_executor(None, first.kill)
            await until(lambda: [worker.worker_id for worker, _ in service.loads()] == ["d2"])
            sink = await send(service, request("last"))
            await ended(sink)
            assert sink.complete() and len(other.submitted) == 1
            assert service.model_info() == ModelInfo(77, 1000, (2,), 4)
            assert service.counters()["workers_refused"] == 1 and service.counters()["workers_lost"] == 1

    play(scenario())


def test_many_requests_over_two_workers(redis_server, start_worker):
    workers = [start_worker("d1"), start_worker("d2")]

    async def scenario() -> None:
        async with running(redis_server.url, 2) as service:
            assert service.ready()
            assert service.model_info() == ModelInfo(4096, 1000, (2,), 4)
            sinks = [await send(service, request(f"r{i}", choice=i % 3)) for i in range(60)]
            assert service.counters()["in_flight"] == 60
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks)
            assert all(sink.deltas[-1].spans is not None for sink in sinks)
            share = [len(worker.submitted) for worker in workers]
            assert sum(share) == 60 and min(share) >= 25, "requests of one burst see each other's load"

    play(scenario())


def test_the_prefill_worker_sends_the_first_token_itself(redis_server, start_worker):
    decode, prefill = start_worker("d1"), start_worker("p1", "prefill")
    decode.prefill_worker = prefill

    async def scenario() -> None:
        async with running(redis_server.url, 2) as service:
            sinks = [await send(service, request(f"r{i}")) for i in range(20)]
            await ended(*sinks)
            assert all(sink.complete() for sink in sinks)

    play(scenario())


def test_a_prompt_goes_where_its_prefix_is(redis_server, start_worker):
    start_worker("d1")
    holder = start_worker("d2")
    holder.cached_tokens = 196
    prompt = list(range(400))
    holder.registry.publish(chained(list(page_hashes(root_hash("scope"), prompt[:200], 4))), [])

    async def scenario() -> None:
        async with running(redis_server.url, 2, fetch_prefixes=False) as service:
            with contextlib.closing(redis_server.client()) as client:
                await until(lambda: pages_held(client, "penstock", holder.info.incarnation) == 50)
            for i in range(3):
                await ended(await send(service, request(f"r{i}", prompt=prompt)))
            assert len(holder.submitted) == 3
            counters = service.counters()
            assert counters["predicted_hit_tokens"] == 3 * 200 and counters["realised_hit_tokens"] == 3 * 196
            assert counters["missed_hit_tokens"] == 3 * 4

    play(scenario())


def test_a_prefix_is_fetched_from_a_holder_that_is_busy(redis_server, start_worker):
    idle, holder = start_worker("d1"), start_worker("d2")
    holder.queued_tokens = 100_000
    prompt = list(range(3000))
    hashes = list(page_hashes(root_hash("scope"), prompt, 4))
    holder.registry.publish(chained(hashes), [])

    async def scenario() -> None:
        async with running(redis_server.url, 2) as service:
            with contextlib.closing(redis_server.client()) as client:
                await until(lambda: pages_held(client, "penstock", holder.info.incarnation) == len(hashes))
            await until(lambda: any(load.queued_tokens for _, load in service.loads()))
            await ended(await send(service, request("r", prompt=prompt)))
            assert idle.sources == [holder.info.incarnation] and not holder.submitted

    play(scenario())


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


def test_cancel_frees_the_worker(redis_server, start_worker):
    worker = start_worker("d1")
    worker.limit = 3

    async def scenario() -> None:
        async with running(redis_server.url, 1) as service:
            sinks = [await send(service, request("r", choice=choice)) for choice in range(2)]
            await until(lambda: all(len(sink.tokens) == 3 for sink in sinks))
            service.cancel("r", 1)
            service.cancel("nobody", 0)
            await until(lambda: len(worker.running) == 1)
            worker.limit = 1 << 30
            await ended(sinks[0])
            assert sinks[0].complete() and not sinks[1].ended.is_set() and worker.aborted == [("r", 1)]

    play(scenario())


@pytest.mark.parametrize("limit", [{"max_inflight": 2}, {"max_inflight": 5, "group_ports": ("1", "2", "3")}])
def test_more_choices_than_allowed_are_refused_at_once(redis_server, start_worker, limit):
    worker = start_worker("d1")
    worker.limit = 3

    async def scenario() -> None:
        async with running(redis_server.url, 1, **limit) as service:
            taken = [await send(service, request("r", choice=choice)) for choice in range(2)]
            refused = await send(service, request("late"))
            assert isinstance(refused.error, Overloaded) and "2 choices" in refused.error.message
            worker.limit = 1 << 30
            await ended(*taken)
            assert all(sink.complete() for sink in taken)
            again = await send(service, request("again"))
            await ended(again)
            assert again.complete() and "late" not in {r.request_id for r in worker.submitted}

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


def test_stop_drains_then_ends_the_rest_with_an_error(redis_server, start_worker):
    worker = start_worker("d1")
    worker.limit = 5

    async def scenario() -> None:
        async with running(redis_server.url, 1) as service:
            short, long = await send(service, request("short", tokens=5)), await send(service, request("long"))
            await until(lambda: len(long.tokens) == 5)
            stopping = asyncio.ensure_future(service.stop(0.3))
            await asyncio.sleep(0)
            refused = await send(service, request("refused"))
            assert isinstance(refused.error, Unavailable)
            await stopping
            assert short.complete() and isinstance(long.error, Unavailable)
            await until(lambda: worker.aborted == [("long", 0)] and not worker.running)

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


def test_a_worker_that_fails_is_left_alone_and_tried_again(redis_server, start_worker):
    bad, good = start_worker("d1"), start_worker("d2")
    bad.fails = True

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
            bad.fails = False
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
