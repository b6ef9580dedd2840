"""The fleet as `GET /fleet` tells it: every live worker with its load, and this router's own totals. Pure.

Totals only grow, as long as a worker lives; `penstock top` and the page at /ui make rates of two answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.router.health import WorkerState

_UP = WorkerState("up")
_TOTALS = (
    *("steps", "prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions"),
    *("handoffs", "handoff_failures", "transfer_bytes", "transfer_pages", "checksum_failures"),
    *("fetches", "fetch_failures", "fetched_tokens", "moved"),
)


def fleet_view(
    models: Sequence[str],
    router: Mapping[str, int],
    loads: Iterable[tuple[WorkerInfo, WorkerLoad]],
    now: float,
    states: Mapping[str, WorkerState] | None = None,
    broken_pairs: Sequence[tuple[str, str, float]] = (),
) -> dict[str, Any]:
    """The answer's body. `now`: seconds on a clock that only this router's answers share; `router`: its counters;
    `states`: by incarnation; `broken_pairs`: worker ids of prefill and decode worker, seconds until the next try."""
    workers = sorted(loads, key=lambda pair: (pair[0].role != "prefill", pair[0].worker_id))
    return {
        "object": "fleet",
        "time_s": round(now, 3),
        "models": list(models),
        "router": dict(router),
        "workers": [_worker(worker, load, (states or {}).get(worker.incarnation, _UP)) for worker, load in workers],
        "broken_pairs": [
            {"prefill": prefill, "decode": decode, "retry_in_s": round(retry_in_s, 1)}
            for prefill, decode, retry_in_s in broken_pairs
        ],
    }


def _worker(worker: WorkerInfo, load: WorkerLoad, state: WorkerState) -> dict[str, Any]:
    pages = {
        "size_tokens": worker.page_size,
        "size_bytes": worker.page_bytes,
        "total": worker.num_pages,
        "held": max(0, load.num_pages - load.free_pages),
        "lent": load.lent_pages,
        "quarantined": load.quarantined_pages,
    }
    return {
        "worker_id": worker.worker_id,
        "role": worker.role,
        "incarnation": worker.incarnation,
        "address": worker.address,
        "status_url": worker.status_url,
        "model": worker.model,
        "version": worker.version,
        "max_num_seqs": worker.max_num_seqs,
        "draining": load.draining,
        "state": "draining" if load.draining and state.state in ("up", "starting") else state.state,
        "reason": state.reason,
        "running": load.running,
        "waiting": load.waiting,
        "queued_tokens": load.queued_tokens,
        "pages": pages,
        "transports": dict(load.transports),
        "totals": {name: getattr(load, name) for name in _TOTALS},
    }
