"""`penstock drain WORKER`: a worker gives its requests, with their pages, to the others, and leaves.

Asks a router where the worker is, tells the worker over its bus (so whoever may use the bus may drain: with the cluster
key, where there is one), and watches until it is gone.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Sequence

import zmq

from penstock.ask_fleet import ask_fleet
from penstock.client_options import ClientParser, api_key, number, readable, server_url
from penstock.common.bounds import LONGEST_S
from penstock.common.bus import BusLink, Connected, Disconnected
from penstock.common.errors import ConfigError
from penstock.common.messages import Drain, HeartbeatAck, WorkerLoad

GONE_S = 1.5  # a link that is down for so long, without a Goodbye, is not merely cut
CONNECT_S = 10.0
LEASE_S = 3.0  # of this command at the worker: three heartbeats in it tell how far it is


def main(arguments: Sequence[str]) -> int:
    """0 when the worker has left, 1 when it is still there after --timeout.

    Raises:
        ConfigError: no fleet, no such worker, or it cannot be reached.
    """
    options = _parser().parse(arguments, os.environ)
    workers = ask_fleet(options.url, options.api_key)["workers"]
    found = [w for w in workers if options.worker in (w["worker_id"], w["incarnation"])]
    if not found:
        names = ", ".join(worker["worker_id"] for worker in workers)
        raise ConfigError(f"no such worker: {options.worker}; there are {names or 'none'}")
    if options.worker == found[0]["worker_id"] and len(found) > 1:
        raise ConfigError(f"{len(found)} workers are called {options.worker}: name one by its incarnation")
    left = drain(found[0]["address"], found[0]["incarnation"], options.cluster_key, options.timeout)
    print(f"{options.worker} has left" if left else f"{options.worker} is still there", flush=True)
    return 0 if left else 1


def drain(address: str, incarnation: str, cluster_key: str, timeout_s: float) -> bool:
    """Tell the worker, wait for its end; what it still holds goes to stderr. False: not within timeout_s.

    Raises:
        ConfigError: it does not answer, or another worker answers there.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    poller = zmq.Poller()
    peer_id = f"operator-{secrets.token_hex(6)}"
    link = BusLink(address, peer_id, "operator", 1, "", cluster_key, context, lease_s=LEASE_S, poller=poller)
    try:
        return _watch(link, poller, incarnation, time.monotonic(), timeout_s)
    finally:
        link.close()
        context.term()


def _watch(link: BusLink, poller: zmq.Poller, incarnation: str, started: float, timeout_s: float) -> bool:
    told, down_at, shown = False, None, ""
    while (now := time.monotonic()) < started + timeout_s:
        for item in link.receive(now):
            if isinstance(item, Connected) and item.worker.incarnation == incarnation:
                down_at = None
                if not told:
                    told = link.send(Drain())
            elif isinstance(item, Connected):
                if not told:
                    raise ConfigError(f"another worker answers there: {item.worker.incarnation}")
                return True
            elif isinstance(item, Disconnected) and down_at is None:
                down_at = now
                if not told and not item.greeted and item.reason.startswith("refused"):
                    raise ConfigError(f"the worker does not take us: {item.reason}")
                if item.left and told:
                    return True
            elif isinstance(item, HeartbeatAck) and (line := _describe(item.load)) != shown:
                shown = line
                print(line, file=sys.stderr, flush=True)
        if told and down_at is not None and now - down_at > GONE_S:
            return True
        if not told and now - started > CONNECT_S:
            raise ConfigError(f"{link.address} does not answer")
        poller.poll(50)
    if not told:
        raise ConfigError(f"{link.address} has not answered: the worker was not told to leave")
    return False


def _describe(load: WorkerLoad) -> str:
    state = "drains" if load.draining else "runs"
    return f"{state}: {load.running} running, {load.waiting} waiting, {load.moved} moved, {load.lent_pages} pages lent"


def _parser() -> ClientParser:
    parser = ClientParser("penstock drain", "Let a worker give its requests to the others, and leave.")
    parser.add_argument("worker", help="worker id, or incarnation")
    parser.add_argument(
        "--url", type=server_url, default="http://127.0.0.1:8000", help="a router of the fleet: it knows the workers"
    )
    parser.add_argument("--api-key", default=api_key(os.environ), help="if the router wants one")
    cluster_key = os.environ.get("PENSTOCK_CLUSTER_KEY", "")
    parser.add_argument("--cluster-key", type=readable, default=cluster_key, help="if the bus is encrypted")
    seconds = number(0.0, LONGEST_S)
    parser.add_argument("--timeout", type=seconds, default=60.0, metavar="SECONDS", help="how long to wait for its end")
    return parser
