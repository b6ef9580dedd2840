"""A worker's small HTTP server: /health, /metrics (Prometheus) and /debug/ledger (JSON), in threads of its own.

The worker gives three callables, which run in an HTTP thread: they must be thread-safe and quick. One that has to ask
the engine thread raises `TimeoutError` when there is no answer in time, and the client gets a 503.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from socket import AF_INET, AF_INET6
from socketserver import TCPServer, ThreadingMixIn
from threading import Thread
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from penstock.common.errors import ConfigError
from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.common.worker_metrics import worker_metric_families

CLIENT_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class StatusServer:
    """Serves a worker's state until `close`.

    Args:
        host, port: where to listen; port 0 takes any free one, see `port` and `url`.
        health: (healthy, one line that says why).
        snapshot: the worker's ledger, JSON-serialisable: pages, leases, requests, transfers.
        load: the newest load.
        info: the worker, for the labels of its metrics.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        health: Callable[[], tuple[bool, str]],
        snapshot: Callable[[], dict[str, object]],
        load: Callable[[], WorkerLoad],
        info: WorkerInfo,
    ) -> None:
        self._health = health
        self._snapshot = snapshot
        self._metrics = CollectorRegistry()
        self._metrics.register(_LoadCollector(info, load))
        self._host = host
        try:
            self._server = _HttpServer(host, port, self.answer)
        except OSError as error:
            raise ConfigError(f"cannot bind the status pages to {host}:{port}: {error.strerror}") from error
        self._thread = Thread(target=self._server.serve_forever, args=(0.1,), name="status-server", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port in use."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """http://host:port, as bound: a worker that binds 0.0.0.0 must announce another host."""
        return f"http://[{self._host}]:{self.port}" if ":" in self._host else f"http://{self._host}:{self.port}"

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """(HTTP status, content type, body) for a GET of `path`."""
        try:
            if path == "/health":
                healthy, message = self._health()
                return _json(200 if healthy else 503, {"healthy": healthy, "message": message})
            if path == "/metrics":
                return 200, CONTENT_TYPE_LATEST, generate_latest(self._metrics) + generate_latest(REGISTRY)
            if path == "/debug/ledger":
                return _json(200, self._snapshot())
        except TimeoutError as error:
            return _json(503, {"healthy": False, "message": str(error) or "the engine did not answer in time"})
        return _json(404, {"message": f"no such page: {path}; there are /health, /metrics and /debug/ledger"})

    def close(self) -> None:
        """Stop listening; returns when the port is free."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _LoadCollector:
    """Reads the worker's load whenever Prometheus asks."""

    def __init__(self, info: WorkerInfo, load: Callable[[], WorkerLoad]) -> None:
        self._info = info
        self._load = load

    def describe(self) -> list[Metric]:
        return worker_metric_families(self._info.served_models[0], [])

    def collect(self) -> Iterator[Metric]:
        yield from worker_metric_families(self._info.served_models[0], [(self._info, self._load())])


class _HttpServer(ThreadingMixIn, TCPServer):
    """A thread per connection. Not http.server's own class: that one asks the DNS for its name when it starts."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, answer: Callable[[str], tuple[int, str, bytes]]) -> None:
        self.address_family = AF_INET6 if ":" in host else AF_INET
        self.answer = answer
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception("status page failed for %s", client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer
    timeout = CLIENT_TIMEOUT_S
    protocol_version = "HTTP/1.0"  # a connection per request: nothing to keep track of at close

    def do_GET(self) -> None:
        status, content_type, body = self.server.answer(self.path.partition("?")[0])
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("status page: " + format, *args)


def _json(status: int, body: object) -> tuple[int, str, bytes]:
    return status, "application/json", json.dumps(body).encode()
