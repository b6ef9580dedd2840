"""`penstock prefill`: a worker that computes prompts and hands their pages to decode workers."""

from __future__ import annotations

from penstock.common.config import WorkerConfig
from penstock.engine.policy import BatchPolicy, PrefillPolicy
from penstock.engine.worker_process import run_worker
from penstock.kv_transfer.joint import ExchangeJoint
from penstock.prefill_worker.handoff import HandOffOut


def main(config: WorkerConfig) -> None:
    """Run a prefill worker until it is told to stop; raises as `run_worker`."""
    policy: BatchPolicy = PrefillPolicy()
    run_worker(config, ExchangeJoint(config, policy, HandOffOut))
