"""What a simulated run comes to, and the oracle it is measured against. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.simulate.trace import TracedRequest
from penstock.simulate.worker import Job, StepTimes


@dataclass(frozen=True)
class Slo:
    """What a request has to keep to count as served well."""

    ttft_ms: float = 2000.0
    tpot_ms: float = 100.0  # mean time from token to token
    gap_ms: float = math.inf  # the longest


@dataclass(frozen=True)
class PolicyResult:
    """One policy on one trace: the keys of `--json`."""

    policy: str
    requests: int
    hit_ratio: float  # prompt tokens that were not computed, those read from other workers included
    oracle_hit_ratio: float  # of one cache with all pages of the fleet
    max_over_mean_load: float  # work given to a worker; in two phases the worse of the two roles
    ttft_p50_ms: float
    ttft_p99_ms: float
    ttft_mean_ms: float
    itl_p50_ms: float  # of all tokens after the first
    itl_p99_ms: float
    slo_attainment: float  # share of requests within both objectives
    goodput: float  # such requests a second
    fetched_ratio: float  # of prompt tokens, those read from another worker
    span_s: float  # from the first arrival to the last token
    handed_off_ratio: float = (
        0.0  # of requests, those whose prompt another worker computed than the one that decoded them
    )
    output_tokens_per_s: float = 0.0


def summary(
    policy: str, jobs: Sequence[Job], loads: Sequence[Sequence[float]], times: StepTimes, slo: Slo
) -> PolicyResult:
    """Figures of a finished run; `loads` are milliseconds of work, one list a role. `oracle_hit_ratio` is 0 as yet."""
    ttft = sorted(job.first_ms - job.request.arrival_ms for job in jobs)
    span_s = max(job.last_ms for job in jobs) / 1e3
    good = sum(_within(job, slo) for job in jobs)
    prompt = sum(job.request.prompt_tokens for job in jobs)
    return PolicyResult(
        policy=policy,
        requests=len(jobs),
        hit_ratio=sum(job.hit_tokens for job in jobs) / prompt,
        oracle_hit_ratio=0.0,
        max_over_mean_load=max((max(load) * len(load) / total if (total := sum(load)) else 1.0) for load in loads),
        ttft_p50_ms=quantile(ttft, 0.5),
        ttft_p99_ms=quantile(ttft, 0.99),
        ttft_mean_ms=sum(ttft) / len(ttft),
        itl_p50_ms=times.quantile(0.5),
        itl_p99_ms=times.quantile(0.99),
        slo_attainment=good / len(jobs),
        goodput=good / span_s if span_s else 0.0,
        fetched_ratio=sum(job.fetched_tokens for job in jobs) / prompt,
        handed_off_ratio=sum(job.prefill != job.decode for job in jobs) / len(jobs),
        output_tokens_per_s=sum(job.request.output_tokens for job in jobs) / span_s if span_s else 0.0,
        span_s=span_s,
    )


def with_oracle(result: PolicyResult, ratio: float) -> PolicyResult:
    """The result beside what was possible."""
    return replace(result, oracle_hit_ratio=ratio)


def oracle_hits(requests: Sequence[TracedRequest], num_pages: int, page_tokens: int) -> list[int]:
    """For each request the prompt tokens found in one LRU cache of `num_pages`, all others served before it."""
    cached: OrderedDict[int, None] = OrderedDict()
    found = []
    for request in requests:
        run = 0
        for page in request.pages:
            if page not in cached:
                break
            run += 1
        for page in reversed(request.pages):
            cached[page] = None
            cached.move_to_end(page)
        while len(cached) > num_pages:
            cached.popitem(last=False)
        found.append(min(run * page_tokens, request.prompt_tokens - 1))
    return found


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _within(job: Job, slo: Slo) -> bool:
    if job.first_ms - job.request.arrival_ms > slo.ttft_ms or job.gap_ms > slo.gap_ms:
        return False
    return job.last_ms - job.first_ms <= slo.tpot_ms * (job.request.output_tokens - 1)
