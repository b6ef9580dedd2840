"""`penstock serve`, and routers in a group: processes in the foreground. Prints one line when they are ready, stops on
Ctrl-C or SIGTERM.

The first signal drains in order (router, workers, Redis), the second one kills.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import FrameType

from penstock.common import logs
from penstock.common.config import RouterConfig, ServeConfig
from penstock.common.config_loader import redacted
from penstock.common.errors import ConfigError
from penstock.console import Console
from penstock.fleet import Fleet
from penstock.interrupt import INTERRUPTED
from penstock.private_redis import free_port, held_for_sharing, port_is_free
from penstock.process_group import LaunchError, ProcessGroup
from penstock.router_specs import reachable_address, router_specs

logger = logging.getLogger(__name__)


def launch(config: ServeConfig) -> int:
    """Run the fleet until it is stopped. Returns the exit status: 0 after a clean stop.

    Raises:
        ConfigError: as `Fleet`.
    """
    logs.setup("launcher", config.log_level, config.log_format)
    logger.debug("configuration: %s", redacted(config))
    fleet = Fleet(config)
    with _port_of(fleet.config):
        return run_in_foreground(fleet.group, lambda: ready_line(fleet), config.drain_s)


def launch_routers(config: RouterConfig) -> int:
    """Run the router processes of `penstock router --router-procs N`. Returns as `launch`.

    Raises:
        ConfigError: a port is in use.
    """
    logs.setup("launcher", config.log_level, config.log_format)
    if not port_is_free(config.host, config.port):
        raise ConfigError(f"cannot listen on {config.host} port {config.port}: it is in use, or not an address here")
    config = replace(config, port=config.port or free_port(config.host))
    group = ProcessGroup(router_specs(config, {"decode": 1}), Console(json_lines=config.log_format == "json"))
    where = reachable_address(config.host, config.port)
    ready = f"Penstock's routers are ready: {where} | {config.router_procs} processes"
    with _port_of(config):
        return run_in_foreground(group, lambda: ready, config.drain_s)


def _port_of(config: RouterConfig) -> AbstractContextManager[None]:
    """Keeps what routers of a group will share from other fleets; one router alone is refused a port that is taken."""
    return held_for_sharing(config.host, config.port) if config.router_procs > 1 else nullcontext()


def ready_line(fleet: Fleet) -> str:
    """What people want to know once it runs: URL, model, workers, transport."""
    config = fleet.config
    names = ", ".join(config.served_model_name) or config.model
    if config.prefill_workers:
        lenders = [worker for worker in fleet.workers().values() if worker.role == "prefill"]
        transports = " or ".join(sorted({name for worker in lenders for name in worker.transports})) or "none"
        workers = f"{config.prefill_workers} prefill + {_count(config.decode_workers, 'decode worker')}"
        workers += f" | KV transport: {transports}"
    else:
        workers = f"{_count(config.decode_workers, 'worker')} for prefill and decode"
    return f"Penstock is ready: {fleet.url} | {names} | {workers}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def run_in_foreground(group: ProcessGroup, describe: Callable[[], str], drain_s: float) -> int:
    """Start the group, print `describe()` when it is ready, and stop it on a signal. Call it from the main thread.

    `drain_s` is how long requests may go on then, as people are told. Returns the exit status.
    """

    seen: list[int] = []
    announced = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        if seen or group.stopping:
            group.kill()
        else:
            group.stop()
            if announced:
                told = f"Penstock stops: requests have up to {drain_s:g} s to end, a second Ctrl-C ends them now\n"
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, told.encode())  # not print: the signal may have come within one
        seen.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asked to outlive the terminal
        signal.signal(signal.SIGHUP, on_signal)
    group.start()
    status = 0
    try:
        group.wait_ready()
        announced = True
        print(describe(), flush=True)
    except LaunchError as error:
        status = error.exit_status
        if status:
            print(f"{logs.ERROR_PREFIX}{error}", file=sys.stderr, flush=True)
    group.join()
    if group.error is not None:
        return 1
    return INTERRUPTED if group.killed else status
