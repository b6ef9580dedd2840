"""The cost policy: one cost in milliseconds for every way to serve a request, and the cheapest way taken. Pure.

    cost =  what is queued ahead / prefill rate                  queue_ms
          + tokens to compute / prefill rate                     prefill_ms
          + bytes to move / link rate                            move_ms
          + what a longer decode step costs, here and to others  decode_ms
          + waiting for a slot or for pages, if there are none   room_ms
          + what the pages it displaces are worth                evict_ms
          + what it was given beyond its share                   share_ms
          + computing it where others decode, if that is taken   beside_ms

Beside prefill workers the decode worker is one more place to compute a prompt: in small chunks, which take longer and
hold up others' tokens, so that it is taken when the queues of the prefill workers are long, and not without one.

A prompt's missing prefix is computed, read together with the hand-off, or (where workers can do so) read from a worker
that holds it; the cheapest counts. So a prefix that many ask for is computed once, and copied wherever a queue in front
of its holder costs more than the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from penstock.router.expected import computing_ms, held_context, room_ms
from penstock.router.policy import (
    EXPECTED_OUTPUT_TOKENS,
    Candidate,
    Placement,
    Policy,
    RequestFacts,
    by_role,
    pairs,
    placement,
    worth_a_handoff,
)


@dataclass(frozen=True)
class CostWeights:
    """What cannot be measured but has to be chosen; docs/routing.md has what was tried."""

    decode: float = 0.05  # a millisecond between tokens, times expected tokens, against one before the first token
    evict: float = 8.0  # how often a page is asked for again, against the share of tokens that hit now
    share: float = 0.1  # a millisecond of work that a worker was given more than others
    beside: float = 1.05  # a millisecond of computing a prompt beside sequences that decode, whose gaps it stretches


DEFAULT_WEIGHTS = CostWeights()


class CostPolicy(Policy):
    """The cheapest pair; ties go to who runs fewer sequences, then by name."""

    name: ClassVar[str] = "cost"
    beside: ClassVar[bool] = True

    def __init__(self, *, fetch: bool = False, weights: CostWeights = DEFAULT_WEIGHTS) -> None:
        """`fetch`: workers can read a prefix from any other worker of their fingerprint."""
        self._fetch = fetch
        self._weights = weights

    def choose(
        self, facts: RequestFacts, candidates: Sequence[Candidate], min_remote_prefill_tokens: int = 0
    ) -> Placement | None:
        decoders, prefillers = by_role(facts, candidates)
        sources = self._sources(candidates)
        choosy = {decode for _, decode in facts.avoid_pairs}
        remote: dict[tuple[str, str], _Elsewhere | None] = {}  # for decoders that are alike
        best: tuple[tuple[float, int, str], Candidate, _Priced] | None = None
        for decoder in decoders:
            fingerprint = decoder.worker.fingerprint
            incarnation = decoder.worker.incarnation
            kind = fingerprint, incarnation if incarnation in choosy else ""
            if kind not in remote:
                remote[kind] = self._elsewhere(facts, decoder, prefillers, sources.get(fingerprint))
            elsewhere = remote[kind] if worth_a_handoff(facts, decoder, min_remote_prefill_tokens) else None
            priced, cost = self._way(facts, decoder, elsewhere, sources.get(fingerprint))
            cost += self._decode_ms(facts, decoder) + room_ms(facts, decoder)
            rank = (cost, decoder.load.running, decoder.worker.worker_id)
            if best is None or rank < best[0]:
                best = rank, decoder, priced
        if best is None:
            return None
        _, decoder, priced = best
        return placement(facts, decoder, None if priced.at is decoder else priced.at, priced.source)

    def pick(self, facts: RequestFacts, workers: Sequence[Candidate]) -> Candidate:
        return min(workers, key=lambda c: (self._price(facts, c, None).cost_ms, c.load.running, c.worker.worker_id))

    def load(self, candidate: Candidate) -> tuple[float, int]:
        """What every request would pay at this worker, whatever its prompt."""
        step_ms = self._step_ms(candidate, 1, 0) if candidate.worker.role == "decode" else 0.0
        return self._base_ms(candidate) + step_ms, candidate.load.running

    def _sources(self, candidates: Sequence[Candidate]) -> dict[str, Candidate]:
        """For each fingerprint who holds most of the prompt, if prefixes can be read from others."""
        found: dict[str, Candidate] = {}
        if not self._fetch:
            return found
        for candidate in candidates:
            best = found.get(candidate.worker.fingerprint)
            if candidate.held_tokens and (best is None or candidate.held_tokens > best.held_tokens):
                found[candidate.worker.fingerprint] = candidate
        return found

    def _way(
        self, facts: RequestFacts, decoder: Candidate, elsewhere: _Elsewhere | None, source: Candidate | None
    ) -> tuple[_Priced, float]:
        """How `decoder` comes by the prompt's pages at the least cost: computed here, or handed off; and what it is."""
        here = self._price(facts, decoder, source)
        if elsewhere is None:
            return here, here.cost_ms
        lacking = decoder.lacks(facts)
        taking_ms = _queue_ms(decoder) + self._evict_ms(facts, decoder, lacking)
        taking_ms += decoder.rates.move_ms(lacking * _token_bytes(decoder))
        # What a worker was given before counts between workers of one role, not between the two ways.
        cost = here.cost_ms - self._share_ms(decoder) + elsewhere.standing_ms + self._beside_ms(decoder, here.tokens)
        # Nobody's tokens are held up for a prompt that a prefill worker has time for.
        cost = max(cost, elsewhere.idle_ms + taking_ms)
        if elsewhere.now_ms + taking_ms <= cost:
            return elsewhere.cheapest, elsewhere.cheapest.cost_ms + taking_ms
        return here, cost

    def _elsewhere(
        self, facts: RequestFacts, decoder: Candidate, prefillers: Sequence[Candidate], source: Candidate | None
    ) -> _Elsewhere | None:
        priced = [self._price(facts, p, source) for p in pairs(facts, decoder, prefillers)]
        if not priced:
            return None
        cheapest = min(priced, key=lambda p: (p.cost_ms, p.at.worker.worker_id))
        queue_ms = cheapest.at.rates.prefill_ms(cheapest.at.prompt_tokens)
        return _Elsewhere(
            cheapest,
            cheapest.cost_ms - _queue_ms(cheapest.at) + queue_ms,
            min(p.cost_ms - _queue_ms(p.at) for p in priced),
            min(self._share_ms(p.at) + self._evict_ms(facts, p.at, p.at.lacks(facts)) for p in priced),
        )

    def _price(self, facts: RequestFacts, worker: Candidate, source: Candidate | None) -> _Priced:
        """Computing the prompt at `worker`, reading from `source` what that makes cheaper."""
        lacking = worker.lacks(facts)
        cost = worker.rates.prefill_ms(lacking)
        use, tokens = None, lacking
        if source is not None and source is not worker and source.held_tokens > worker.held_tokens:
            rest = source.lacks(facts)
            rate = min(worker.rates.link_bytes_per_s, source.rates.link_bytes_per_s)
            moved_ms = worker.rates.link_setup_ms + (lacking - rest) * _token_bytes(worker) * 1e3 / rate
            if (read := moved_ms + worker.rates.prefill_ms(rest)) < cost:
                cost, use, tokens = read, source, rest
        return _Priced(worker, use, tokens, self._base_ms(worker) + cost + self._evict_ms(facts, worker, lacking))

    def _beside_ms(self, worker: Candidate, tokens: int) -> float:
        """What computing them in chunks, behind the prompts that wait there, takes more than in whole steps at once."""
        chunks_ms = computing_ms(worker, worker.prompt_tokens + tokens)
        return max(0.0, self._weights.beside * chunks_ms - worker.rates.prefill_ms(tokens))

    def _base_ms(self, worker: Candidate) -> float:
        return _queue_ms(worker) + self._share_ms(worker)

    def _share_ms(self, worker: Candidate) -> float:
        return self._weights.share * worker.given_ms

    def _decode_ms(self, facts: RequestFacts, worker: Candidate) -> float:
        return self._step_ms(worker, 1, facts.num_tokens)

    def _step_ms(self, worker: Candidate, sequences: int, tokens: int) -> float:
        step = worker.rates.sequences_ms(worker.load.running + sequences, held_context(worker) + tokens)
        return self._weights.decode * EXPECTED_OUTPUT_TOKENS * step

    def _evict_ms(self, facts: RequestFacts, worker: Candidate, tokens: int) -> float:
        """Computing again what these tokens displace, as likely as the fleet finds tokens in its caches today."""
        return self._weights.evict * facts.hit_share * worker.rates.prefill_ms(tokens)


@dataclass(frozen=True)
class _Priced:
    """One way to get the prompt computed: where, with whose pages, and what stands before the first token."""

    at: Candidate
    source: Candidate | None
    tokens: int  # to compute
    cost_ms: float


@dataclass(frozen=True)
class _Elsewhere:
    """The prefill workers that can hand a prompt to a decode worker."""

    cheapest: _Priced
    now_ms: float  # its cost, by reservations alone: a report may tell of a queue that has gone since
    idle_ms: float  # the least cost if none had a queue
    standing_ms: float  # the least of share and evict, which choose among prefill workers, not between them and others


def _queue_ms(worker: Candidate) -> float:
    return worker.rates.prefill_ms(worker.queued_tokens)


def _token_bytes(worker: Candidate) -> float:
    """KV of one token."""
    return worker.worker.page_bytes / worker.worker.page_size
