"""What a client would see of a request that goes to given workers now: milliseconds to its first token, and between
tokens. Pure; the same rates and reservations that the cost policy weighs (cost.py).

Admission refuses, or holds back, by these (admission.py). They are means, not bounds: arrivals after this one may slow
it down, a batch that ends early may speed it up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.common.mixed_chunk import chunk_beside
from penstock.router.policy import (
    EXPECTED_OUTPUT_TOKENS,
    Candidate,
    Placement,
    RequestFacts,
    by_role,
    pairs,
    placement,
    worth_a_handoff,
)


@dataclass(frozen=True)
class Expected:
    """Milliseconds. `wait_ms` is until somebody works on the request, `room_ms` what of that is for a slot or pages."""

    wait_ms: float
    room_ms: float
    prefill_ms: float
    tpot_ms: float

    @property
    def ttft_ms(self) -> float:
        """Until the first token."""
        return self.wait_ms + self.prefill_ms


def expected(
    facts: RequestFacts, decoder: Candidate, computing: Candidate, source: Candidate | None = None
) -> Expected:
    """For a prompt that `computing` works on, with the pages of `source` if given, and that `decoder` goes on with."""
    prefill_ms = computing_ms(computing, (source or computing).lacks(facts))
    if source is not None:
        moved = computing.lacks(facts) - source.lacks(facts)
        prefill_ms += computing.rates.move_ms(moved * computing.worker.page_bytes / computing.worker.page_size)
    room = room_ms(facts, decoder)
    sequences = max(decoder.load.running, decoder.placed) + 1
    tpot_ms = decoder.rates.step_ms(sequences, held_context(decoder) + facts.num_tokens)
    return Expected(computing_ms(computing, computing.prompt_tokens) + room, room, prefill_ms, tpot_ms)


def of_placement(facts: RequestFacts, chosen: Placement, candidates: Sequence[Candidate]) -> Expected:
    """As `expected`, for what a policy chose among `candidates`."""
    by_incarnation = {candidate.worker.incarnation: candidate for candidate in candidates}
    decoder = by_incarnation[chosen.decode.incarnation]
    computing = by_incarnation[chosen.prefill.incarnation] if chosen.prefill else decoder
    return expected(facts, decoder, computing, by_incarnation[chosen.source.incarnation] if chosen.source else None)


def quickest(
    facts: RequestFacts, candidates: Sequence[Candidate], min_remote_prefill_tokens: int = 0
) -> Placement | None:
    """Where the first token would come soonest, at whatever cost to others; None: no decode worker takes requests."""
    decoders, prefillers = by_role(facts, candidates)
    soonest = sorted(prefillers, key=lambda c: computing_ms(c, c.prompt_tokens) + computing_ms(c, c.lacks(facts)))
    best: tuple[tuple[float, bool, str], Candidate, Candidate] | None = None
    for decoder in decoders:
        worth = worth_a_handoff(facts, decoder, min_remote_prefill_tokens)
        elsewhere = next(pairs(facts, decoder, soonest), None) if worth else None
        for computing in (decoder,) if elsewhere is None else (elsewhere, decoder):
            ttft_ms = expected(facts, decoder, computing).ttft_ms
            rank = (ttft_ms, computing is decoder, decoder.worker.worker_id)
            if best is None or rank < best[0]:
                best = rank, decoder, computing
    if best is None:
        return None
    _, decoder, computing = best
    return placement(facts, decoder, None if computing is decoder else computing)


def computing_ms(worker: Candidate, tokens: int) -> float:
    """Computing so many tokens of prompts: beside sequences that decode in chunks, each of which moves them all on."""
    sequences, few = max(worker.load.running, worker.placed), worker.worker.mixed_chunk_tokens
    if worker.worker.role == "prefill" or not sequences or not few:
        return worker.rates.prefill_ms(tokens)
    chunk = max(1, min(chunk_beside(few, sequences), worker.worker.step_tokens - sequences))
    return worker.rates.mixed_ms(tokens, chunk, sequences, held_context(worker))


def held_context(worker: Candidate) -> float:
    """Tokens in pages that somebody holds."""
    return float(max(0, worker.load.num_pages - worker.load.free_pages) * worker.worker.page_size)


def room_ms(facts: RequestFacts, worker: Candidate) -> float:
    """Until enough of the running sequences end, if there is no slot or there are too few pages for this one."""
    load, running = worker.load, max(worker.load.running, worker.placed)
    if not load.num_pages or not running:  # it has not reported yet, or nothing is in the way
        return 0.0
    pages = -(-facts.num_tokens // worker.worker.page_size)
    lacking = max(running + 1 - worker.worker.max_num_seqs, 0) / running
    lacking = max(lacking, max(pages - load.free_pages, 0) / load.num_pages)
    return lacking * EXPECTED_OUTPUT_TOKENS * worker.rates.step_ms(running, held_context(worker))
