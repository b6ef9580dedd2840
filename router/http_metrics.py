"""HTTP requests as `prometheus-fastapi-instrumentator` names them, which vLLM serves and its dashboards read.

`HttpMetrics` is the collector, `HttpMeter` the ASGI middleware that feeds it. Durations end with the last byte, streams
included; of a stream only the first message is looked at, so that a token costs one plain call. Sizes are those that
the headers tell. A client that left before its answer began counts among 4xx, as for nginx (499): no server failed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from penstock.common.histogram import Histogram
from penstock.common.worker_metrics import histogram_family

PER_ROUTE = (0.1, 0.5, 1.0)
OVERALL = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)  # fmt: skip
CLIENT_LEFT = 499
NOT_COUNTED = frozenset({"/metrics", "/health", "/load", "/ping", "/version"})  # asked by machines, all the time

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class HttpMetrics(Collector):
    """Counts by route, method and class of status."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str, str]] = Counter()  # method, status, handler
        self._durations: dict[tuple[str, str], Histogram] = {}  # method, handler
        self._overall = Histogram(OVERALL)
        self._sizes: dict[str, list[int]] = {}  # handler -> requests, bytes asked, bytes answered

    def observe(
        self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        """One request was answered, or cut."""
        self._requests[method, f"{status // 100}xx", handler] += 1
        self._overall.observe(seconds)
        key = method, handler
        if key not in self._durations:
            self._durations[key] = Histogram(PER_ROUTE)
        self._durations[key].observe(seconds)
        sizes = self._sizes.setdefault(handler, [0, 0, 0])
        for place, value in enumerate((1, request_bytes, response_bytes)):
            sizes[place] += value

    def describe(self) -> list[Metric]:
        """Nothing is read at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        requests = CounterMetricFamily(
            "http_requests", "Requests by method, status and handler.", labels=("method", "status", "handler")
        )
        for key, count in sorted(self._requests.items()):
            requests.add_metric(key, count)
        yield requests
        for name, place in (("request", 1), ("response", 2)):
            sizes = SummaryMetricFamily(
                f"http_{name}_size_bytes", f"Content-Length of {name}s, 0 where there is none.", labels=("handler",)
            )
            for handler, totals in sorted(self._sizes.items()):
                sizes.add_metric((handler,), totals[0], totals[place])
            yield sizes
        overall: HistogramMetricFamily = histogram_family(
            "http_request_duration_highr_seconds", "Durations of all requests.", [({}, self._overall)], ()
        )
        yield overall
        rows = [
            ({"method": method, "handler": handler}, histogram)
            for (method, handler), histogram in sorted(self._durations.items())
        ]
        yield histogram_family(
            "http_request_duration_seconds", "Durations by method and handler.", rows, ("method", "handler")
        )


class HttpMeter:
    """ASGI middleware around everything else."""

    def __init__(self, app: App, metrics: HttpMetrics, paths: frozenset[str]) -> None:
        """`paths`: those of routes without parameters; what is asked elsewhere is told apart by its route, if any."""
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in NOT_COUNTED:
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status, answered = CLIENT_LEFT, 0

        def look(message: Message) -> Awaitable[None]:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], _length(message.get("headers", ()))
            return send(message)

        try:
            await self._app(scope, receive, look)
        except BaseException:
            if status == CLIENT_LEFT:
                status = 500
            raise
        finally:
            path = scope["path"]
            handler = path if path in self._paths else getattr(scope.get("route"), "path", "none")
            seconds = time.monotonic() - began
            self._metrics.observe(handler, scope["method"], status, seconds, _length(scope["headers"]), answered)


def _length(headers: Any) -> int:
    for name, value in headers:
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return 0
