"""`penstock decode`: a worker that generates; prompts come from prefill workers, or are computed here."""

from __future__ import annotations

from penstock.common.config import WorkerConfig
from penstock.decode_worker.role import DecodeRole
from penstock.engine.policy import BatchPolicy, DecodePolicy
from penstock.engine.worker_process import run_worker
from penstock.kv_transfer.joint import ExchangeJoint


def main(config: WorkerConfig) -> None:
    """Run a decode worker until it is told to stop; raises as `run_worker`."""
    policy: BatchPolicy = DecodePolicy(mixed_chunk_tokens=config.mixed_chunk_tokens)
    run_worker(config, ExchangeJoint(config, policy, DecodeRole))
