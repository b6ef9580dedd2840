"""The router service between a real Redis and workers on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from penstock.common.errors import Overloaded, Unavailable
from penstock.common.page_hash import chained, page_hashes, root_hash
from penstock.common.text_probe import TextProbe
from penstock.router import fleet
from penstock.router import service as router_service
from penstock.router.rates import H200_LLAMA8B
from penstock.router.service import ModelInfo
from tests.index_view import pages_held
from tests.router.services import ended, play, request, running, send, until


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
            given_ms = sum(one.given_ms for one in service._fleet.candidates({}, time.monotonic()))
            outputs_ms, prompts_ms = 60 * H200_LLAMA8B.output_ms(5, 20), 60 * H200_LLAMA8B.prefill_ms(5)
            assert outputs_ms < given_ms <= outputs_ms + prompts_ms + 1e-6, "as much as it was, not as was guessed"

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


def test_requests_may_have_the_context_of_every_decode_worker(redis_server, start_worker, caplog):
    start_worker("d1")
    short = start_worker("d2", max_model_len=100)

    async def scenario() -> None:
        async with running(redis_server.url, 2) as service:
            assert service.model_info() == ModelInfo(100, 1000, (2,), 4)
            assert "decode workers differ in their context: requests may have 100 tokens" in caplog.text
            short.close()
            await until(lambda: service.model_info() == ModelInfo(4096, 1000, (2,), 4))

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


def test_as_many_as_may_wait_for_room_may_wait_for_a_worker(redis_server, monkeypatch):
    """A program's fleet has no limit: its thousands of requests outlive the restart of its only worker."""
    monkeypatch.setattr(router_service, "MAX_WAITING", 1)

    async def scenario() -> None:
        async with running(redis_server.url, 0, max_queued=3) as service:
            sinks = [await send(service, request(str(number))) for number in range(4)]
            await ended(sinks[3])
            assert "too many requests wait" in str(sinks[3].error)
            assert [sink.error for sink in sinks[:3]] == [None] * 3

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
