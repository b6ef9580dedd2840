"""The virtual router's view of the virtual fleet: what a policy is shown for a request, and the load it reserves. Pure.

A policy may be shown a thousand workers for each of a million requests, so it is shown those only that it can choose:
of workers that hold equally much of the prompt, the ones with the least load (`Policy.load`), and of those that hold
less, only the ones with less load still. What is left out could not have won; a test compares with the whole fleet.
(Beside prefill workers it could, rarely: prompts that a decode worker computes count more than they do in its load.)
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import msgspec

from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.router.policy import Candidate, Placement, Policy, RequestFacts
from penstock.router.rates import WorkerRates
from penstock.router.shares import WorkShares
from penstock.simulate.prefix_index import PrefixIndex, workers_of
from penstock.simulate.worker import VirtualWorker

_EACH = 2  # workers shown of those that hold equally much: what a prompt's own pages cost can still turn the order
_FEW = 32  # up to so many holders are sorted; of more, the first in the order of load are taken


class FleetView:
    """Workers by number; the first `prefill_workers` of them compute prompts for the others."""

    def __init__(
        self,
        workers: Sequence[VirtualWorker],
        policy: Policy,
        index: PrefixIndex,
        infos: Sequence[WorkerInfo],
        rates: WorkerRates,
    ) -> None:
        self._workers = workers
        self._policy = policy
        self._index = index
        self._infos = infos
        self._rates = rates
        self._numbers = {info.incarnation: number for number, info in enumerate(infos)}
        self._reserved = [0] * len(workers)
        self._prompts = [0] * len(workers)  # of those, tokens of prompts to compute
        self._shares = WorkShares()
        for info in infos:
            self._shares.join(info.incarnation)
        self._hits = 0
        self._queries = 0
        everyone = [Candidate(info, WorkerLoad(), rates=rates) for info in infos]
        self._loads = [policy.load(candidate) for candidate in everyone]
        self._everyone = everyone
        self._stale: set[int] = set()  # workers whose place in the order is an old one
        roles = sorted({info.role for info in infos})
        self._masks = {role: sum(1 << n for n, info in enumerate(infos) if info.role == role) for role in roles}
        self._orders = {
            role: sorted((self._loads[n], n) for n, info in enumerate(infos) if info.role == role) for role in roles
        }

    def choose(self, pages: Sequence[int], prompt_tokens: int) -> Placement:
        """What the policy chooses for a request."""
        facts = self.facts(prompt_tokens)
        candidates = self._everyone if self._policy.sees_all else self.shortlist(pages)
        placement = self._policy.choose(facts, candidates)
        assert placement is not None, "virtual workers never drain"
        return placement

    def facts(self, prompt_tokens: int) -> RequestFacts:
        """What the policy is told of a request."""
        return RequestFacts(prompt_tokens, hit_share=self._hits / self._queries if self._queries else 0.0)

    def shortlist(self, pages: Sequence[int]) -> list[Candidate]:
        """The workers that a policy could choose for a prompt of these pages."""
        for number in self._stale:
            self._sort_in(number)
        self._stale.clear()
        found: list[Candidate] = []
        for role, mask in self._masks.items():
            least = ((float("inf"), 0), 0)
            for depth, holders in self._index.runs(pages, mask):
                numbers = self._least_loaded(self._orders[role], holders)
                if (first := (self._loads[numbers[0]], numbers[0])) < least:
                    least = first
                    found += [self.candidate(number, depth) for number in numbers]
        return found

    def candidate(self, number: int, held_pages: int = 0) -> Candidate:
        """One worker as the router sees it."""
        worker, info = self._workers[number], self._infos[number]
        load = WorkerLoad(
            running=len(worker.running),
            num_pages=worker.cache.num_pages,
            free_pages=worker.cache.num_pages - worker.cache.held,
        )
        held = held_pages * info.page_size
        given_ms = self._shares.of(info.incarnation)
        return Candidate(info, load, held, self._reserved[number], self._rates, given_ms, self._prompts[number])

    @property
    def reserved(self) -> int:
        """Tokens, of all workers."""
        return sum(self._reserved)

    def number(self, info: WorkerInfo | None, default: int) -> int:
        """A worker's number."""
        return default if info is None else self._numbers[info.incarnation]

    def reserve(self, number: int, tokens: int, *, prompt: bool = False) -> None:
        """Add load, a prompt's or a sequence's, or take it back."""
        self._reserved[number] += tokens
        self._prompts[number] += tokens if prompt else 0
        self.changed(number)

    def given(self, number: int, work_ms: float) -> None:
        """The worker has been given so much work."""
        self._shares.give(self._infos[number].incarnation, work_ms)
        self.changed(number)

    def looked_up(self, prompt_tokens: int, hit_tokens: int) -> None:
        """A prompt was looked up in a worker's cache."""
        self._queries += prompt_tokens
        self._hits += hit_tokens

    def changed(self, number: int) -> None:
        """The worker's load is another one now; nobody needs to know before the next choice."""
        self._stale.add(number)

    def _sort_in(self, number: int) -> None:
        load = self._policy.load(self.candidate(number))
        before = self._loads[number]
        if load != before:
            order = self._orders[self._infos[number].role]
            del order[bisect_left(order, (before, number))]
            insort(order, (load, number))
            self._loads[number] = load

    def _least_loaded(self, order: Sequence[tuple[tuple[float, int], int]], holders: int) -> list[int]:
        if holders.bit_count() <= _FEW:
            return heapq.nsmallest(_EACH, workers_of(holders), key=lambda n: (self._loads[n], n))
        found: list[int] = []
        for _, number in order:
            if holders >> number & 1:
                found.append(number)
                if len(found) == _EACH:
                    break
        return found


def virtual_infos(
    workers: int,
    prefill_workers: int,
    pages: int,
    page_tokens: int,
    token_bytes: int,
    max_num_seqs: int,
    step_tokens: int,
    mixed_chunk_tokens: int,
) -> list[WorkerInfo]:
    """What virtual workers say of themselves: numbers below `prefill_workers` are prefill workers."""
    common = WorkerInfo(
        worker_id="",
        incarnation="",
        role="decode",
        address="",
        fingerprint="virtual",
        model="virtual",
        served_models=[],
        page_size=page_tokens,
        num_pages=pages,
        page_bytes=page_tokens * token_bytes,
        max_model_len=pages * page_tokens,
        max_num_seqs=max_num_seqs,
        step_tokens=step_tokens,
        mixed_chunk_tokens=mixed_chunk_tokens,
        vocab_size=1,
    )
    return [
        msgspec.structs.replace(
            common,
            worker_id=f"{number:05}",
            incarnation=str(number),
            role="prefill" if number < prefill_workers else "decode",
        )
        for number in range(workers)
    ]
