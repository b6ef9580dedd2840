"""Runs over one trace: arrivals scaled to a utilisation, then each policy on the same requests. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.common.errors import ConfigError
from penstock.router.policies import make_policy
from penstock.router.policy import EXPECTED_OUTPUT_TOKENS
from penstock.simulate.result import PolicyResult, Slo, oracle_hits, with_oracle
from penstock.simulate.simulator import FleetShape, Simulator
from penstock.simulate.trace import TracedRequest, time_scaled
from penstock.simulate.worker import decode_work_ms


def scaled(requests: Sequence[TracedRequest], shape: FleetShape, utilisation: float | None) -> list[TracedRequest]:
    """Requests whose work fills `utilisation` of the fleet's time if all hits of the oracle are hits; None: as traced.

    Work is what computing prompts takes, and what sequences add to the steps that they are part of. With prefill
    workers the busier role counts.

    Raises:
        ConfigError: `utilisation` is not above 0, or all requests arrive at once.
    """
    if utilisation is None:
        return list(requests)
    span_ms = requests[-1].arrival_ms
    if utilisation <= 0 or span_ms <= 0:
        raise ConfigError("a utilisation needs to be above 0, and requests that do not all arrive at once")
    prompts_ms, outputs_ms = needed_ms(requests, shape)
    if shape.prefill_workers:
        busy_ms = max(prompts_ms / shape.prefill_workers, outputs_ms / shape.decode_workers)
    else:
        busy_ms = (prompts_ms + outputs_ms) / shape.workers
    return time_scaled(requests, busy_ms / utilisation / span_ms)


def needed_ms(requests: Sequence[TracedRequest], shape: FleetShape) -> tuple[float, float]:
    """Work for the whole fleet if all hits of the oracle are hits: (prompts, what sequences add to steps)."""
    hits = oracle_hits(requests, shape.workers * shape.pages_per_worker, shape.page_tokens)
    prompts_ms = sum(shape.rates.prefill_ms(r.prompt_tokens - hit) for r, hit in zip(requests, hits, strict=True))
    return prompts_ms, sum(decode_work_ms(request, shape.rates) for request in requests)


@dataclass(frozen=True)
class BalanceBounds:
    """max/mean load if a router looked at nothing but balance, and every prompt took what it took in some run."""

    foreseen: float  # all requests known beforehand, the longest given first: no router can
    known: float  # in order of arrival, each one's work known when it comes
    guessed: float  # as `known`, but outputs are taken to be as long as a router takes them to be


def balance_bounds(requests: Sequence[TracedRequest], computed: Sequence[int], shape: FleetShape) -> BalanceBounds:
    """What balance a router could hope for that looked at nothing else, with as many hits. One phase only.

    `computed` are the tokens of each prompt that were computed in a run: the oracle's hits, which it has as soon as a
    prompt with the same beginning has come, cannot be had before that one has been computed. In a run that is short for
    the fleet the bounds are far above 1: some requests are longer than what there is time to balance.
    """
    prompts = [shape.rates.prefill_ms(tokens) for tokens in computed]
    work = [prompt + decode_work_ms(request, shape.rates) for prompt, request in zip(prompts, requests, strict=True)]
    guessed = [
        prompt + EXPECTED_OUTPUT_TOKENS * shape.rates.sequences_ms(1, request.prompt_tokens)
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    return BalanceBounds(
        foreseen=_balance(sorted(work, reverse=True), shape.workers),
        known=_balance(work, shape.workers),
        guessed=_balance(work, shape.workers, guessed),
    )


def _balance(work: Sequence[float], workers: int, seen: Sequence[float] | None = None) -> float:
    """max/mean if each piece of work goes, in turn, to whoever has least so far, going by `seen` if given."""
    order = [(0.0, worker) for worker in range(workers)]
    loads = [0.0] * workers
    for piece, shown in zip(work, seen or work, strict=True):
        load, worker = order[0]
        heapq.heapreplace(order, (load + shown, worker))
        loads[worker] += piece
    return max(loads) * workers / sum(loads)


def oracle_ratio(requests: Sequence[TracedRequest], shape: FleetShape) -> float:
    """The share of prompt tokens that one cache with all pages of the fleet would have had."""
    hits = oracle_hits(requests, shape.workers * shape.pages_per_worker, shape.page_tokens)
    return sum(hits) / sum(request.prompt_tokens for request in requests)


def compare(
    requests: Sequence[TracedRequest],
    shape: FleetShape,
    policies: Sequence[str],
    slo: Slo,
    fetch: bool = False,
    seed: int = 0,
) -> list[PolicyResult]:
    """One result a policy, all on the same requests.

    Raises:
        ConfigError: there is no such policy, or a request does not fit a worker.
    """
    ratio = oracle_ratio(requests, shape)
    return [
        with_oracle(Simulator(shape, make_policy(name, seed, fetch)).run(requests, slo), ratio) for name in policies
    ]
