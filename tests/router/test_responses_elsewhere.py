"""Responses and several routers: made at one of them, asked for at another. Redis is all that they share."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from penstock.router.dispatch import SHUTTING_DOWN
from penstock.router.responses.store import ResponseStore
from tests.conftest import RedisServer
from tests.router.fake_router import ANSWER, Router, running


@pytest.fixture(scope="module")
def routers(_shared_redis: RedisServer) -> Iterator[tuple[Router, Router]]:
    options = {"redis_url": _shared_redis.url, "namespace": "two-routers"}
    with running(**options) as one, running(**options) as other:
        yield one, other


@pytest.fixture
def here(routers: tuple[Router, Router]) -> Router:
    routers[0].reset()
    return routers[0]


@pytest.fixture
def there(routers: tuple[Router, Router]) -> Router:
    routers[1].reset()
    return routers[1]


def create(router: Router, **fields: Any) -> Any:
    return router.openai.responses.create(**{"model": "tiny", "input": "Hello?", **fields})


def eventually(read: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 60
    while not good(found := read()):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_has_the_whole_answer_may_ask_anywhere(here: Router, there: Router, stream: bool) -> None:
    for _ in range(5):
        made = create(here, stream=stream)
        response = list(made)[-1].response if stream else made
        assert there.openai.responses.retrieve(response.id).model_dump() == response.model_dump()
        later = create(there, previous_response_id=response.id, input="And?")
        assert later.previous_response_id == response.id
    there.openai.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        here.openai.responses.retrieve(response.id)


def test_the_background(here: Router, there: Router) -> None:
    here.service.pause_after = 5
    response = create(here, background=True)
    partly = eventually(lambda: there.openai.responses.retrieve(response.id), lambda r: r.output_text == "Hello ")
    assert partly.status == "in_progress"
    with pytest.raises(openai.BadRequestError, match="in the making"):
        create(there, previous_response_id=response.id)
    for router in (there, here, there):
        cancelled = router.openai.responses.cancel(response.id)
        assert (cancelled.status, cancelled.output_text) == ("cancelled", "Hello ")
    assert here.service.cancelled == [(here.last.request_id, 0)] and there.service.requests == []
    here.service.pause_after = None
    done = create(here, background=True)
    found = eventually(lambda: there.openai.responses.retrieve(done.id), lambda r: r.status == "completed")
    assert found.output_text == ANSWER
    with pytest.raises(openai.BadRequestError, match="over, with status 'completed'"):
        there.openai.responses.cancel(done.id)


def test_who_cancels_too_late_is_told_so_by_the_router_that_makes_it(
    here: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its status is final, and it is still being stored."""
    keep, keeping, may_keep = ResponseStore.keep, threading.Event(), threading.Event()

    async def slowly(self: ResponseStore, *args: Any) -> None:
        keeping.set()
        await asyncio.to_thread(may_keep.wait, 60)
        await keep(self, *args)

    monkeypatch.setattr(ResponseStore, "keep", slowly)
    response = create(here, background=True)
    assert keeping.wait(60)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(here.openai.responses.cancel, response.id)
        eventually(lambda: here.server.server_state.tasks, bool)
        may_keep.set()
        with pytest.raises(openai.BadRequestError, match="over, with status 'completed'"):
            asked.result()


def test_what_is_deleted_stays_so_when_redis_had_lost_it(
    here: Router, there: Router, _shared_redis: RedisServer
) -> None:
    here.service.pause_after = 5
    response = create(here, background=True)
    with contextlib.closing(_shared_redis.client()) as redis:
        redis.delete(*redis.scan_iter(f"two-routers:response:*{response.id}*"))
    assert here.openai.responses.delete(response.id) is None
    for router in (here, there):
        with pytest.raises(openai.NotFoundError):
            router.openai.responses.retrieve(response.id)


def test_a_background_response_is_deleted(here: Router, there: Router) -> None:
    here.service.pause_after = 5
    response = create(here, background=True)
    there.openai.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        there.openai.responses.retrieve(response.id)
    assert here.service.cancel_heard.wait(60)

    def status(_: Any = None) -> int:
        return here.http.get(f"/v1/responses/{response.id}").status_code

    eventually(status, lambda code: code == 404)


def test_events_are_read_as_they_come_and_again(here: Router, there: Router) -> None:
    here.service.pause_after = 5
    with create(here, background=True, stream=True) as stream:
        seen = [next(stream) for _ in range(7)]
    response_id = seen[0].response.id
    with there.openai.responses.retrieve(response_id, stream=True, starting_after=2) as stream:
        assert [next(stream) for _ in range(4)] == seen[3:]
    here.openai.responses.cancel(response_id)
    again = list(there.openai.responses.retrieve(response_id, stream=True))
    assert again[:7] == seen  # a cancelled one has no event for its end
    here.service.pause_after = None
    events = list(create(here, background=True, stream=True))
    response_id = events[0].response.id
    assert list(there.openai.responses.retrieve(response_id, stream=True, starting_after=-1)) == events
    with pytest.raises(openai.BadRequestError, match="stream=true"):
        there.openai.responses.retrieve(create(here).id, stream=True)


def test_many_follow_at_another_router(here: Router, there: Router, _shared_redis: RedisServer) -> None:
    """All of them by one connection, whatever their number, which says who is to look again."""
    here.service.pause_after = 5
    with contextlib.ExitStack() as stack, contextlib.closing(_shared_redis.client()) as redis:
        first = next(stack.enter_context(create(here, background=True, stream=True)))
        follow = there.openai.responses.retrieve
        streams = [stack.enter_context(follow(first.response.id, stream=True)) for _ in range(8)]
        seen = [[next(stream) for _ in range(7)] for stream in streams]
        assert all(events == seen[0] for events in seen) and seen[0][0] == first
        channel = f"two-routers:response::{first.response.id}"
        assert redis.pubsub_numsub(channel) == [(channel.encode(), 1)]
        there.openai.responses.cancel(first.response.id)
        assert [list(stream) for stream in streams] == [[]] * 8  # all of them end


def test_a_router_that_dies_fails_what_it_made(redis_server: RedisServer) -> None:
    """Its lease runs out: here it is taken from it."""
    options = {"redis_url": redis_server.url, "namespace": "dying", "lease_s": 600.0}
    with running(**options) as here, running(**options) as there:
        here.service.pause_after = 5
        with create(here, background=True, stream=True) as stream:
            response_id = next(stream).response.id
        with redis_server.client() as client:

            def asked() -> Any:
                client.delete(f"dying:response::{response_id}:runner")
                return there.openai.responses.retrieve(response_id)

            failed = eventually(asked, lambda r: r.status == "failed")
            assert failed.error.code == "server_error" and "gone" in failed.error.message
        here.openai.responses.cancel(response_id)


def test_a_router_that_ends_says_so_to_who_follows_another_ones(redis_server: RedisServer) -> None:
    options = {"redis_url": redis_server.url, "namespace": "ending", "lease_s": 600.0}
    with running(**options) as here:
        here.service.pause_after = 5
        with running(**options) as there, create(here, background=True, stream=True) as stream:
            seen = [next(stream) for _ in range(7)]
            with there.openai.responses.retrieve(seen[0].response.id, stream=True) as elsewhere:
                assert [next(elsewhere) for _ in range(7)] == seen
                there.server.should_exit = True
                [error] = list(elsewhere)
        assert (error.type, error.code, error.message) == ("error", "unavailable", SHUTTING_DOWN)
        assert here.openai.responses.cancel(seen[0].response.id).status == "cancelled"


def test_redis_restarts_under_a_response_in_the_making(own_redis: RedisServer) -> None:
    with running(redis_url=own_redis.url) as here, running(redis_url=own_redis.url) as there:
        here.service.pause_after = 5
        with create(here, background=True, stream=True) as stream:
            seen = [next(stream) for _ in range(7)]
        response_id = seen[0].response.id
        with there.openai.responses.retrieve(response_id, stream=True) as stream:
            assert [next(stream) for _ in range(7)] == seen
            own_redis.stop()
            [error] = list(stream)
            assert (error.type, error.code) == ("error", "unavailable") and "Redis is away" in error.message
        own_redis.start()
        with here.openai.responses.retrieve(response_id, stream=True, starting_after=2) as stream:
            assert [next(stream) for _ in range(4)] == seen[3:]

        def known() -> int:
            """Its router tells of it again, from its beginning."""
            return there.http.get(f"/v1/responses/{response_id}").status_code

        eventually(known, lambda status: status == 200)
        with there.openai.responses.retrieve(response_id, stream=True) as stream:
            assert [next(stream) for _ in range(7)] == seen
        assert here.openai.responses.cancel(response_id).status == "cancelled"
        assert there.openai.responses.retrieve(response_id).output_text == "Hello "  # and is there at its end
        assert list(there.openai.responses.retrieve(response_id, stream=True))[:7] == seen


def test_redis_is_away_at_the_end_of_what_is_made_in_the_background(own_redis: RedisServer) -> None:
    with running(redis_url=own_redis.url) as here, running(redis_url=own_redis.url) as there:
        here.service.pause_after = 5
        response_id = create(here, background=True).id
        own_redis.stop()
        assert here.openai.responses.cancel(response_id).status == "cancelled"
        ended = here.openai.responses.retrieve(response_id)
        assert ended.status == "cancelled"
        own_redis.start()

        def known() -> int:
            return there.http.get(f"/v1/responses/{response_id}").status_code

        eventually(known, lambda status: status == 200)
        assert there.openai.responses.retrieve(response_id) == ended


def test_redis_goes_away(own_redis: RedisServer) -> None:
    with running(redis_url=own_redis.url) as router:
        kept = create(router)
        own_redis.stop()
        assert create(router).output_text == ANSWER
        for asked in (
            lambda: router.openai.responses.retrieve(kept.id),
            lambda: create(router, previous_response_id=kept.id),
            lambda: create(router, background=True),
        ):
            with pytest.raises(openai.InternalServerError) as caught:
                asked()
            assert caught.value.status_code == 503 and "Redis" in caught.value.message
        assert httpx.get(f"{router.url}/v1/responses/resp_0:events", timeout=60).status_code == 404
