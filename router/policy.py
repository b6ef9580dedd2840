"""Which workers serve a request. Pure; called by the service for every request, and by the fleet simulator.

A `Policy` sees the request's facts and every worker whose link is up (`Candidate`), and answers with a `Placement`:
the decode worker, the prefill worker if one is worth it, and the load this reserves. What all policies guarantee is in
`by_role` and `worth_a_handoff`: a draining worker gets nothing new, a retry goes to who has not failed it if there is
another, a prompt of which the decode worker lacks few tokens stays there; and a hand-off joins only workers of one
fingerprint. The policy to use, with costs in milliseconds, is in cost.py; those that look at one thing only, to compare
it with, are in simple_policies.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.router.rates import H200_LLAMA8B, WorkerRates

EXPECTED_OUTPUT_TOKENS = 256  # of a request: nobody knows it when it is placed
DECODE_TOKENS = 32  # what a request that is being decoded weighs on its worker, beside tokens it has to compute there


@dataclass(frozen=True)
class RequestFacts:
    """What matters of a request: its length, and the incarnations that have just failed it.

    `hit_share` is of the fleet: of the prompt tokens that its workers looked up, those they found. Between the workers
    of `avoid_pairs` (prefill, decode) hand-offs fail. `most_tokens` is what it may come to with its whole output.
    """

    num_tokens: int
    avoid: frozenset[str] = frozenset()
    hit_share: float = 0.0
    avoid_pairs: frozenset[tuple[str, str]] = frozenset()
    most_tokens: int = 0


@dataclass(frozen=True)
class Moving:
    """Where a request comes from that a draining worker has given up, and who has room for it."""

    source: WorkerInfo
    kept_tokens: int  # from the first: the source keeps their pages
    destination: str  # incarnation; "": any

    def to_anybody(self) -> Moving:
        """The same, without a destination."""
        return replace(self, destination="")


@dataclass(frozen=True)
class Candidate:
    """A worker whose link is up, as seen for one request."""

    worker: WorkerInfo
    load: WorkerLoad
    held_tokens: int = 0  # leading tokens of this request in the worker's prefix cache (whole pages)
    reserved_tokens: int = 0  # by all routers
    rates: WorkerRates = H200_LLAMA8B
    given_ms: float = 0.0  # work this router has given it (`WorkShares`)
    prompt_tokens: int = 0  # of `reserved_tokens`, those that are to be computed: exact for this router's
    placed: int = 0  # sequences that routers have there, as far as this one knows

    @property
    def queued_tokens(self) -> int:
        """Work ahead of a new request. Reservations and report speak of the same requests: the report is late, the
        reservations may miss what other routers have (Redis away), so the larger one counts."""
        return max(self.load.queued_tokens, self.reserved_tokens)

    def lacks(self, facts: RequestFacts) -> int:
        """Tokens of the prompt that it does not hold."""
        return max(0, facts.num_tokens - self.held_tokens)


@dataclass(frozen=True)
class Placement:
    """Where a request goes, and the load it reserves.

    `decode_tokens` count at the decode worker until the request ends; `prefill_tokens`, what has to be computed, at
    the worker that computes the prompt until a token comes. `source` is another worker whose pages the prompt's worker
    should read rather than compute, so that it begins with `source_tokens` of the prompt.
    """

    decode: WorkerInfo
    prefill: WorkerInfo | None
    decode_tokens: int
    prefill_tokens: int = 0
    source: WorkerInfo | None = None
    source_tokens: int = 0
    prefill_ms: float = 0.0  # work for the worker that computes the prompt
    decode_ms: float = 0.0  # work for the decode worker, beside that, as long as nobody knows how long the output gets
    rates: WorkerRates = H200_LLAMA8B  # of the decode worker

    @property
    def load(self) -> dict[str, int]:
        """Tokens to reserve, by incarnation."""
        load = {self.decode.incarnation: self.decode_tokens}
        if self.prefill_tokens:
            computing = (self.prefill or self.decode).incarnation
            load[computing] = load.get(computing, 0) + self.prefill_tokens
        return load


class Policy(ABC):
    """One way to choose. Policies may remember what they chose; they know no clock and no network."""

    name: ClassVar[str]
    sees_all: ClassVar[bool] = False  # True: the choice depends on more than what is held and `load`
    beside: ClassVar[bool] = False  # True: decode workers get prompts, too, where prefill workers are behind

    @abstractmethod
    def choose(
        self, facts: RequestFacts, candidates: Sequence[Candidate], min_remote_prefill_tokens: int = 0
    ) -> Placement | None:
        """A decode worker, with a prefill worker of the same fingerprint when the prompt is worth it.

        A prompt of which the decode worker lacks fewer than `min_remote_prefill_tokens` is computed there, and so is
        every prompt while no prefill worker is up. None: no decode worker takes new requests.
        """

    def load(self, candidate: Candidate) -> tuple[float, int]:
        """Of workers that hold equally much of a prompt the policy takes the one with the least; then by name."""
        return candidate.rates.prefill_ms(candidate.queued_tokens), candidate.load.running


class PickingPolicy(Policy):
    """A policy that picks the decode worker first, and then the prefill worker in the same way."""

    def choose(
        self, facts: RequestFacts, candidates: Sequence[Candidate], min_remote_prefill_tokens: int = 0
    ) -> Placement | None:
        decoders, prefillers = by_role(facts, candidates)
        if not decoders:
            return None
        decoder = self.pick(facts, decoders)
        prefiller = None
        if worth_a_handoff(facts, decoder, min_remote_prefill_tokens):
            fitting = list(pairs(facts, decoder, prefillers))
            prefiller = self.pick(facts, fitting) if fitting else None
        return placement(facts, decoder, prefiller)

    @abstractmethod
    def pick(self, facts: RequestFacts, workers: Sequence[Candidate]) -> Candidate:
        """One of `workers`, which are not empty and all of one role."""


def by_role(facts: RequestFacts, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """(decode workers, prefill workers) that take new requests, and in whose context this one fits; without those to
    avoid. Unless no other decode worker is left: then it may say itself what is wrong."""
    decoders: list[Candidate] = []
    prefillers: list[Candidate] = []
    short: list[Candidate] = []
    for candidate in candidates:
        worker = candidate.worker
        if candidate.load.draining:
            continue
        if worker.role == "decode":
            (decoders if facts.most_tokens <= worker.max_model_len else short).append(candidate)
        elif facts.num_tokens < worker.max_model_len:
            prefillers.append(candidate)
    decoders = decoders or short
    if facts.avoid:
        decoders = [c for c in decoders if c.worker.incarnation not in facts.avoid] or decoders
        prefillers = [c for c in prefillers if c.worker.incarnation not in facts.avoid] or prefillers
    return decoders, prefillers


def pairs(facts: RequestFacts, decoder: Candidate, prefillers: Iterable[Candidate]) -> Iterator[Candidate]:
    """The prefill workers that can hand prompts to `decoder`, in their order."""
    decode = decoder.worker
    return (
        p
        for p in prefillers
        if p.worker.fingerprint == decode.fingerprint
        and (p.worker.incarnation, decode.incarnation) not in facts.avoid_pairs
    )


def worth_a_handoff(facts: RequestFacts, decoder: Candidate, min_remote_prefill_tokens: int) -> bool:
    """The decode worker lacks enough of the prompt for another worker to compute it."""
    return decoder.lacks(facts) >= max(1, min_remote_prefill_tokens)


def placement(
    facts: RequestFacts, decoder: Candidate, prefiller: Candidate | None, source: Candidate | None = None
) -> Placement:
    """The choice with its load; `source` holds more of the prompt than the worker that computes it."""
    computing = prefiller or decoder
    tokens = computing.lacks(facts) if source is None else source.lacks(facts)
    return Placement(
        decoder.worker,
        prefiller.worker if prefiller else None,
        DECODE_TOKENS,
        tokens,
        source.worker if source else None,
        min(source.held_tokens, facts.num_tokens) if source else 0,
        computing.rates.prefill_ms(tokens),
        decoder.rates.output_ms(facts.num_tokens, EXPECTED_OUTPUT_TOKENS),
        decoder.rates,
    )


def moved(placement: Placement, moving: Moving, num_tokens: int) -> Placement:
    """The choice for a request of `num_tokens` tokens that moves: what its worker has kept of their pages goes with it.

    A prefill worker is left out for less than a page; what is longer it computes behind the pages that it reads.
    """
    source = moving.source
    held = min(moving.kept_tokens, num_tokens - 1)
    lacking = num_tokens - held
    if source.fingerprint != placement.decode.fingerprint or source.incarnation == placement.decode.incarnation:
        return placement
    if placement.prefill_tokens <= lacking:  # no more than it has to compute without
        return placement
    prefill = placement.prefill if lacking > source.page_size else None
    prefill_ms = placement.prefill_ms * lacking / placement.prefill_tokens
    if prefill is not placement.prefill:
        prefill_ms = placement.rates.prefill_ms(lacking)
    return replace(
        placement,
        prefill=prefill,
        prefill_tokens=lacking,
        source=source,
        source_tokens=held,
        prefill_ms=prefill_ms,
    )
