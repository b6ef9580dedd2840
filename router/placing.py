"""Finds the workers for a request: asks Redis, lets the policy choose, and tells the other routers before it is sent.

Used by service.py. The choice itself is pure (policy.py); what several routers need beyond it is here. A router that is
alone asks Redis once. Otherwise its load, with the new request in it, is written first (`Reservations.claim`), and a
worker to which another router has given load at the same moment is reconsidered: the one that was first keeps it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from penstock.common.messages import GenerateRequest
from penstock.common.page_hash import page_hashes, root_hash
from penstock.common.redis_state import FleetReader, Lookup
from penstock.common.reservations import Reservations
from penstock.router.admission import Limits, refusal
from penstock.router.dispatch_state import most_tokens
from penstock.router.expected import Expected, of_placement, quickest
from penstock.router.fleet import Fleet
from penstock.router.off_loop import OffLoop
from penstock.router.policy import Moving, Placement, Policy, RequestFacts, moved

MAX_CLAIMS = 4  # how often a placement is reconsidered because other routers chose the same worker
HASH_OFF_LOOP_TOKENS = 4096  # from here on hashing takes over 0.2 ms, the cost of a thread
KEPT_HASHES = 16  # of long prompts: a request's choices come together


@dataclass(frozen=True)
class Found:
    """A placement, what the client may expect of it (None: no worker takes it), and what Redis said of workers, by
    incarnation."""

    placement: Placement | None
    expected: Expected | None
    lookups: Mapping[str, Lookup]


class Placing:
    """One router's way to place requests."""

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        reader: FleetReader,
        reservations: Reservations,
        off_loop: OffLoop,
        min_remote_prefill_tokens: int,
        limits: Limits,
    ) -> None:
        self._fleet, self._policy = fleet, policy
        self._reader, self._reservations = reader, reservations
        self._off_loop = off_loop
        self._minimum = min_remote_prefill_tokens
        self._limits = limits
        self._hashing: OrderedDict[tuple[str, str, int], tuple[list[int], asyncio.Task[list[bytes]]]] = OrderedDict()

    async def place(
        self, request: GenerateRequest, avoid: frozenset[str], since: float, moving: Moving | None = None
    ) -> Found:
        """Workers for a request that came at `since`.

        What they are to be given is not reserved yet: do it before the next `await`.
        """
        lookups = await self._look_up(request) if self._fleet.has_choice() else {}
        tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        bad_pairs = self._fleet.health.bad_pairs(time.monotonic())
        facts = RequestFacts(tokens, avoid, self._fleet.hit_share(), bad_pairs, most_tokens(request))
        placement, found = self._choose(facts, lookups, since, moving)
        for _ in range(MAX_CLAIMS):
            if placement is None or not lookups or not self._reader.other_routers:
                break
            others = await self._claim(placement)
            alive = self._fleet.has(placement)  # what is lost from here on, the dispatcher is told
            if alive and (others is None or not _grown(placement, lookups, others)):
                break
            if others is not None:
                lookups = {i: replace(one, reserved_tokens=others.get(i, 0)) for i, one in lookups.items()}
            before = placement
            placement, found = self._choose(facts, lookups, since, moving)
            if alive and placement is not None and placement.load == before.load:  # still the best, and claimed already
                break
        return Found(placement, found, lookups)

    def prefill_rate(self) -> float:
        """Prompt tokens a second that the workers among which the policy chooses can compute."""
        return self._fleet.prefill_rate(time.monotonic(), beside=self._policy.beside)

    def reserve(self, incarnation: str, tokens: int, *, prompt: bool = False) -> None:
        """More load at a worker, for this router's own choices and, soon, for the other routers'."""
        self._reservations.publish(incarnation, self._fleet.reserve(incarnation, tokens, prompt=prompt))

    def release(self, incarnation: str, tokens: int, *, prompt: bool = False) -> None:
        """The reverse."""
        self._reservations.publish(incarnation, self._fleet.release(incarnation, tokens, prompt=prompt))

    def _choose(
        self, facts: RequestFacts, lookups: Mapping[str, Lookup], since: float, moving: Moving | None
    ) -> tuple[Placement | None, Expected | None]:
        """The policy's choice, unless that would be too late for the client and another one would not."""
        now = time.monotonic()
        candidates = self._fleet.candidates(lookups, now, moving.destination if moving is not None else "")
        chosen = self._policy.choose(facts, candidates, self._minimum)
        if chosen is None:
            return None, None
        if moving is not None:
            return moved(chosen, moving, facts.num_tokens), None
        found, waited_ms = of_placement(facts, chosen, candidates), (now - since) * 1e3
        if refusal(self._limits, found, waited_ms) is not None:
            other = quickest(facts, candidates, self._minimum)
            if other is not None:
                return other, of_placement(facts, other, candidates)
        return chosen, found

    async def _claim(self, placement: Placement) -> dict[str, int] | None:
        """What others had reserved when they could first see this placement's load; None while Redis is away."""
        load = placement.load
        for incarnation, tokens in load.items():
            self.reserve(incarnation, tokens)
        try:
            return await self._reservations.claim()
        finally:
            for incarnation, tokens in load.items():
                self.release(incarnation, tokens)

    async def _look_up(self, request: GenerateRequest) -> Mapping[str, Lookup]:
        """Prefixes held and load reserved by others; workers Redis does not answer for are simply missing."""
        groups: dict[tuple[str, int], list[str]] = {}
        for member in self._fleet.members:
            groups.setdefault((member.worker.hash_scope, member.worker.page_size), []).append(member.worker.incarnation)
        found: dict[str, Lookup] = {}
        for (scope, page_size), incarnations in groups.items():
            hashes = await self._hashes(request, scope, page_size)
            found |= await self._reader.look_up(incarnations, hashes) or {}
        return found

    async def _hashes(self, request: GenerateRequest, scope: str, page_size: int) -> list[bytes]:
        if len(request.prompt_token_ids) < HASH_OFF_LOOP_TOKENS:
            return _page_hashes(request, scope, page_size)
        if request.output_token_ids:  # nobody else has these
            return await self._off_loop.run(lambda: _page_hashes(request, scope, page_size))
        key = (request.request_id, scope, page_size)
        prompt, task = self._hashing.get(key, ([], None))
        if task is None or prompt is not request.prompt_token_ids:  # a client may give its next request the same id
            work = self._off_loop.run(lambda: _page_hashes(request, scope, page_size))
            task = asyncio.ensure_future(work)
            self._hashing[key] = request.prompt_token_ids, task
            while len(self._hashing) > KEPT_HASHES:
                self._hashing.popitem(last=False)
        return await asyncio.shield(task)  # one choice that is cancelled takes nothing from the others


def _grown(placement: Placement, lookups: Mapping[str, Lookup], others: Mapping[str, int]) -> bool:
    """Others have reserved more at these workers than was known when they were chosen."""
    return any(others.get(i, 0) > lookups[i].reserved_tokens for i in placement.load if i in lookups)


def _page_hashes(request: GenerateRequest, scope: str, page_size: int) -> list[bytes]:
    """None for a prompt that is to be scored: all of it is computed, whoever holds a prefix."""
    if request.wants_prompt_logprobs:
        return []
    tokens = request.prompt_token_ids + request.output_token_ids
    return list(page_hashes(root_hash(scope, (request.cache_salt,)), tokens, page_size))
