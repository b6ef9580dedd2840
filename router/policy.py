"""Which workers serve a request: the longest cached prefix weighed against load. Pure; called by the service.

Everything is counted in prompt tokens, the unit in which workers report what they still have to compute. The cost of a
choice is what stands between the request and its first token: tokens to compute for it, tokens queued before it, and
(cheaper by `TRANSFER_PER_TOKEN`) tokens whose pages have to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.common.messages import WorkerInfo, WorkerLoad

DECODE_TOKENS = 32  # what a request that is being decoded weighs on its worker, beside tokens it has to compute there
TRANSFER_PER_TOKEN = 0.05  # moving a token's KV against computing it


@dataclass(frozen=True)
class RequestFacts:
    """What matters of a request: its length, and the incarnations that have just failed it."""

    num_tokens: int
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Candidate:
    """A worker whose link is up, as seen for one request."""

    worker: WorkerInfo
    load: WorkerLoad
    held_tokens: int = 0  # leading tokens of this request in the worker's prefix cache (whole pages)
    reserved_tokens: int = 0  # by all routers

    @property
    def queued_tokens(self) -> int:
        """Work ahead of a new request. Reservations and report speak of the same requests: the report is late, the
        reservations may miss what other routers have (Redis away), so the larger one counts."""
        return max(self.load.queued_tokens, self.reserved_tokens)


@dataclass(frozen=True)
class Placement:
    """Where a request goes, and the load it reserves: until it ends, at the prefill worker until a token comes."""

    decode: WorkerInfo
    prefill: WorkerInfo | None
    decode_tokens: int
    prefill_tokens: int = 0


def choose(
    facts: RequestFacts, candidates: Sequence[Candidate], min_remote_prefill_tokens: int = 0
) -> Placement | None:
    """The cheapest decode worker, with a prefill worker of the same fingerprint when the prompt is worth it.

    A prompt of which the decode worker lacks fewer than `min_remote_prefill_tokens` is computed there, and so is every
    prompt while no prefill worker is up. None: no decode worker takes new requests.
    """
    usable = [c for c in candidates if not c.load.draining]
    decoders = _prefer_others(usable, "decode", facts.avoid)
    prefillers = _prefer_others(usable, "prefill", facts.avoid)
    best: tuple[tuple[float, int, str], Placement] | None = None
    for decoder in decoders:
        uncached = max(0, facts.num_tokens - decoder.held_tokens)
        prefiller = None
        if uncached >= max(1, min_remote_prefill_tokens):
            prefiller = _cheapest_prefiller(facts, decoder, prefillers)
        if prefiller is None:
            cost = float(uncached)
            placement = Placement(decoder.worker, None, decode_tokens=uncached + DECODE_TOKENS)
        else:
            cost = _prefill_cost(facts, prefiller) + TRANSFER_PER_TOKEN * uncached
            to_compute = max(0, facts.num_tokens - prefiller.held_tokens)
            placement = Placement(decoder.worker, prefiller.worker, DECODE_TOKENS, to_compute)
        rank = (cost + decoder.queued_tokens, decoder.load.running, decoder.worker.worker_id)
        if best is None or rank < best[0]:
            best = rank, placement
    return best[1] if best else None


def _prefer_others(candidates: Sequence[Candidate], role: str, avoid: frozenset[str]) -> list[Candidate]:
    """Candidates of a role without those to avoid, unless nobody else is left."""
    of_role = [c for c in candidates if c.worker.role == role]
    return [c for c in of_role if c.worker.incarnation not in avoid] or of_role


def _prefill_cost(facts: RequestFacts, prefiller: Candidate) -> float:
    return max(0, facts.num_tokens - prefiller.held_tokens) + prefiller.queued_tokens


def _cheapest_prefiller(facts: RequestFacts, decoder: Candidate, prefillers: Sequence[Candidate]) -> Candidate | None:
    fitting = [p for p in prefillers if p.worker.fingerprint == decoder.worker.fingerprint]
    return min(fitting, key=lambda p: (_prefill_cost(facts, p), p.worker.worker_id), default=None)
