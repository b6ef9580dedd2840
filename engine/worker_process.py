"""Starts a worker process around a role: engine, bus, Redis registration, status pages, then the loop until it stops.

Called by the `main` of both workers. What differs between them (the batch policy, the role, how pages are reached)
comes in as a `Joint`, since engine and kv_transfer do not know each other.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import uuid
from contextlib import ExitStack
from functools import partial
from typing import Protocol

from penstock.common.bus import BusServer
from penstock.common.config import WorkerConfig
from penstock.common.errors import ConfigError
from penstock.common.hash_probe import probe_digest
from penstock.common.logs import report_progress
from penstock.common.messages import GenerateRequest, WorkerInfo
from penstock.common.open_files import raise_open_files_limit
from penstock.common.redis_state import RegistryWriter
from penstock.common.sampling import SamplingParams
from penstock.common.status_server import StatusServer
from penstock.common.text_probe import TextProbe
from penstock.common.tokenizer import Tokenizer
from penstock.common.version import __version__
from penstock.engine.build import BuiltEngine, build_engine
from penstock.engine.kv_pool import KVPool
from penstock.engine.policy import BatchPolicy
from penstock.engine.request import Request
from penstock.engine.worker_loop import Role, WorkerLoop, stop_on_signals

logger = logging.getLogger(__name__)


class Joint(Protocol):
    """Joins the engine with the transfer of pages."""

    policy: BatchPolicy

    def open_transports(self, pool: KVPool, incarnation: str) -> dict[str, bytes]:
        """Open what moves pages between pools; name -> how a peer reads ours."""

    def close_transports(self) -> None:
        """Where the start ends before `make_role`, whose role closes them."""

    def make_role(self, loop: WorkerLoop) -> Role:
        """The role that drives the loop."""


def run_worker(config: WorkerConfig, joint: Joint) -> None:
    """Load, register, serve until SIGTERM or SIGINT, leave nothing behind.

    Raises:
        ModelError, ConfigError: the worker cannot start.
        Exception: a step failed; the routers were told to retry elsewhere.
    """
    raise_open_files_limit()
    incarnation = f"{config.worker_id or f'{config.role}-{os.getpid()}'}-{uuid.uuid4().hex[:12]}"
    built = build_engine(
        config,
        joint.policy,
        name=f"penstock-{incarnation}",
        memory_share=config.memory_share,
        progress=report_progress,
        tokenizer=partial(Tokenizer.load, config.tokenizer or config.model),
    )
    transports = joint.open_transports(built.pool, incarnation)
    with ExitStack() as undo:  # what moves pages has threads, with which a process does not end well
        undo.callback(joint.close_transports)
        bus = BusServer(config.bus_host, config.bus_port, config.cluster_key)
        info = _worker_info(config, built, incarnation, bus.address, transports, _text_probe(config))
        loop = WorkerLoop(built, bus, info, lease_s=config.lease_s, drain_s=config.drain_s)
        role = joint.make_role(loop)
        undo.pop_all()
        undo.callback(role.close)
        status = StatusServer(
            config.bus_host,
            config.metrics_port,
            health=loop.health,
            snapshot=lambda: loop.ask(lambda: loop.ledger(role)),
            load=lambda: loop.load,
            info=info,
        )
        undo.pop_all()
    announced = status_url(bus.address, status.port)
    # How to read the pages is told over the bus only: the keys to them are in it.
    public = {"status_url": announced, "transports": dict.fromkeys(transports, b"")}
    registered = WorkerInfo(**{f: getattr(info, f) for f in info.__struct_fields__} | public)
    registry = RegistryWriter(config.redis_url, config.namespace, registered) if config.redis_url else None
    stop_on_signals(loop)
    logger.info(
        "%s (%s) is ready on %s, transports %s, status %s",
        info.worker_id,
        config.role,
        bus.address,
        "+".join(transports) or "none",
        announced,
    )
    gc.freeze()  # what the start made stays: a full collection that looked at it all would hold up a step
    try:
        loop.run(role, registry)
    finally:
        if registry is not None:
            registry.close()
        status.close()
        _take_down(built, bus, loop, role)


def status_url(bus_address: str, port: int) -> str:
    """Where peers reach the status pages at this port: the host that the bus announces, an IPv6 address in brackets."""
    host = bus_address.removeprefix("tcp://").rpartition(":")[0]
    return f"http://{host}:{port}"


def _take_down(built: BuiltEngine, bus: BusServer, loop: WorkerLoop, role: Role) -> None:
    """End what computes and speaks. With a copy in flight the process is left at once: the mover's thread goes on and
    may wake the loop, and a device that does not end the copy may not end a step either."""
    clean = role.close()
    bus.close()
    if not clean:
        logger.warning("leaving with a copy in flight")
        logging.shutdown()
        os._exit(0 if sys.exc_info()[0] is None else 1)
    loop.close()
    built.engine.close()


def _worker_info(
    config: WorkerConfig,
    built: BuiltEngine,
    incarnation: str,
    address: str,
    transports: dict[str, bytes],
    texts: TextProbe,
) -> WorkerInfo:
    pages = built.engine.pages
    return WorkerInfo(
        worker_id=config.worker_id or incarnation,
        incarnation=incarnation,
        role=config.role,
        address=address,
        fingerprint=built.fingerprint,
        model=config.model,
        served_models=list(config.served_model_name) or [config.model],
        page_size=pages.page_size,
        num_pages=pages.num_pages,
        page_bytes=built.pool.layout.page_bytes,
        max_model_len=built.max_model_len,
        max_num_seqs=config.max_num_seqs,
        vocab_size=built.spec.vocab_size,
        step_tokens=(step_tokens := built.engine.scheduler.max_num_batched_tokens),
        mixed_chunk_tokens=built.engine.scheduler.policy.prefill_budget(step_tokens, 1),
        eos_token_ids=list(built.spec.eos_token_ids),
        hash_scope=built.hash_scope,
        hash_probe=probe_digest(pages.page_size, partial(_engine_hashes, built)),
        tokenizer_probe=texts.tokenizer,
        template_probe=texts.template,
        transports=transports,
        lease_s=config.lease_s,
        pid=os.getpid(),
        version=__version__,
    )


def _text_probe(config: WorkerConfig) -> TextProbe:
    try:
        return TextProbe.of(Tokenizer.load(config.tokenizer or config.model))
    except ConfigError as error:
        logger.info("without a tokenizer here, routers cannot tell whether theirs fits the model: %s", error)
        return TextProbe()


def _engine_hashes(built: BuiltEngine, tokens: list[int], salt: str) -> list[bytes]:
    """A prompt's page hashes by the code that names pages here."""
    source = GenerateRequest(
        request_id="probe", prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=1), cache_salt=salt
    )
    return Request(source, 0.0).extend_hashes(built.hash_scope, built.engine.pages.page_size, len(tokens))
