"""Placing a request beside other routers: what changes while a claim is on its way to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from penstock.common.messages import GenerateRequest
from penstock.common.redis_state import Lookup
from penstock.common.sampling import SamplingParams
from penstock.router import placing as placing_module
from penstock.router.admission import Limits
from penstock.router.fleet import Fleet
from penstock.router.off_loop import OffLoop
from penstock.router.placing import HASH_OFF_LOOP_TOKENS, KEPT_HASHES, Placing
from penstock.router.simple_policies import LeastLoadPolicy
from tests.router.test_fleet import worker

WORKERS = [worker(name, f"tcp://127.0.0.1:{name}") for name in ("1", "2")]
REQUEST = GenerateRequest(request_id="a", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=4))


class Reader:
    """A Redis in which there is another router, and nothing else."""

    other_routers = 1

    def __init__(self) -> None:
        self.asked: list[int] = []  # for how many pages

    async def look_up(self, incarnations: Sequence[str], hashes: Sequence[bytes]) -> dict[str, Lookup]:
        self.asked.append(len(hashes))
        return {one: Lookup(0, 0) for one in incarnations}


class Claims:
    """Reservations for which something happens during each claim; they answer `others`."""

    def __init__(self, during: list[Callable[[], Any]], others: dict[str, int] | None) -> None:
        self._during, self._others = during, others

    def publish(self, incarnation: str, tokens: int) -> None:
        pass

    async def claim(self) -> dict[str, int] | None:
        if self._during:
            self._during.pop(0)()
        return self._others


@pytest.mark.parametrize("others", [{}, None])
@pytest.mark.parametrize(("lost", "left"), [(["1"], "2"), (["1", "2"], None)])
def test_a_worker_lost_during_the_claim_gets_nothing(lost: list[str], left: str | None, others: dict[str, int] | None):
    fleet, off_loop = Fleet(), OffLoop(1)
    for one in WORKERS:
        fleet.connected(one.address, one, 0.0)
    during = [lambda address=f"tcp://127.0.0.1:{name}": fleet.disconnected(address, 1.0) for name in lost]
    placing = Placing(fleet, LeastLoadPolicy(), Reader(), Claims(during, others), off_loop, 0, Limits())  # type: ignore[arg-type]
    try:
        placement = asyncio.run(placing.place(REQUEST, frozenset(), 0.0)).placement
    finally:
        off_loop.close()
    assert (placement and placement.decode.incarnation) == left
    assert fleet.reservations == {}, "what was claimed is given back"


def test_nobody_holds_anything_of_a_prompt_that_is_to_be_scored():
    fleet, off_loop, reader = Fleet(), OffLoop(1), Reader()
    for one in WORKERS:
        fleet.connected(one.address, one, 0.0)
    placing = Placing(fleet, LeastLoadPolicy(), reader, Claims([], {}), off_loop, 0, Limits())  # type: ignore[arg-type]
    prompt, scored = list(range(3 * WORKERS[0].page_size)), SamplingParams(prompt_logprobs=1)
    try:
        for sampling, output in ((SamplingParams(), []), (scored, []), (scored, [5])):
            request = GenerateRequest(
                request_id="a", prompt_token_ids=prompt, output_token_ids=output, sampling=sampling
            )
            asyncio.run(placing.place(request, frozenset(), 0.0))
    finally:
        off_loop.close()
    assert reader.asked == [3, 0, 3], "with its first token the client has the scores"


def test_the_choices_of_a_request_hash_their_long_prompt_once(monkeypatch: pytest.MonkeyPatch):
    hashed: list[str] = []
    plain = placing_module._page_hashes

    def counting(request: GenerateRequest, scope: str, page_size: int) -> list[bytes]:
        hashed.append(request.request_id)
        return plain(request, scope, page_size)

    monkeypatch.setattr(placing_module, "_page_hashes", counting)
    fleet, off_loop = Fleet(), OffLoop(1)
    for one in WORKERS:
        fleet.connected(one.address, one, 0.0)
    placing = Placing(fleet, LeastLoadPolicy(), Reader(), Claims([], {}), off_loop, 0, Limits())  # type: ignore[arg-type]
    prompt = [1] * HASH_OFF_LOOP_TOKENS

    async def place(name: str, *, cancelled: bool = False) -> None:
        request = GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=4))
        task = asyncio.ensure_future(placing.place(request, frozenset(), 0.0))
        await asyncio.sleep(0)
        if cancelled:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() == cancelled

    async def scenario() -> None:
        nonlocal prompt
        await asyncio.gather(place("a", cancelled=True), *(place("a") for _ in range(20)))
        for number in range(KEPT_HASHES + 1):
            await place(f"r{number}")
        assert len(placing._hashing) == KEPT_HASHES
        prompt = [2] * HASH_OFF_LOOP_TOKENS
        await place("r16")

    try:
        asyncio.run(scenario())
    finally:
        off_loop.close()
    assert hashed == ["a", *(f"r{number}" for number in range(KEPT_HASHES + 1)), "r16"], "another prompt, the same id"
