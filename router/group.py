"""Router processes that share one port (`--router-procs`), and how each of them answers for all.

Every process listens on the shared port (SO_REUSEPORT: the kernel deals connections out) and, on loopback, on an admin
port of its own, where it answers for itself alone. Asked at the shared port for /metrics, /load or /fleet, a process
asks the others at their admin ports. Nothing is kept for that, in files or in shared memory; a process that does not
answer is left out.

Metrics are labelled (`process="0"`), not summed. A sum would fall whenever a process dies; Prometheus takes that for a
counter that began again, and would count all that the others have done a second time. `sum by` of the rates is right.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from penstock.common.config import RouterConfig

ASK_TIMEOUT_S = 2.0
ADMIN_HOST = "127.0.0.1"
MARKER = "process"  # the label


class Group:
    """One process's place among those that share its port. A router that is alone is a group of one."""

    def __init__(self, config: RouterConfig) -> None:
        ports = [int(port) for port in config.group_ports]
        self.index = ports.index(config.admin_port) if ports else 0
        self._others = {i: port for i, port in enumerate(ports) if port != config.admin_port}
        self._admin_port = config.admin_port
        self._headers = {"Authorization": f"Bearer {config.api_key[0]}"} if config.api_key else {}

    def is_for_all(self, scope: Mapping[str, Any]) -> bool:
        """The request came to the shared port of several processes, so that its answer should speak of all of them."""
        server = scope.get("server")
        return bool(self._others) and not (server and server[1] == self._admin_port)

    async def metrics(self, own: bytes) -> bytes:
        """The text of /metrics: what `own` says of this process and its workers, and what others say of themselves."""
        texts = {self.index: own, **await self._ask("/metrics")}
        families = {i: list(text_string_to_metric_families(text.decode())) for i, text in texts.items()}
        registry = CollectorRegistry()
        registry.register(_Families(merged(families, self.index)))
        return generate_latest(registry)

    async def counters(self, own: Mapping[str, int]) -> dict[str, int]:
        """The sums of all processes' counters, and `processes`, how many they are of."""
        total = Counter({**own, "processes": 1})
        for body in (await self._ask("/fleet")).values():
            total.update({**msgspec.json.decode(body)["router"], "processes": 1})
        return dict(total)

    async def _ask(self, path: str) -> dict[int, bytes]:
        """Answers by the process's place."""
        asked = [asyncio.to_thread(_get, port, path, self._headers) for port in self._others.values()]
        answers = await asyncio.gather(*asked)
        return {i: answer for i, answer in zip(self._others, answers, strict=True) if answer is not None}


def merged(families: Mapping[int, Iterable[Metric]], here: int) -> list[Metric]:
    """One list of metric families of all processes. What they say of themselves gets their label; of workers, of which
    all say the same, counts what the process `here` says.
    """
    found: dict[str, Metric] = {}
    for index in sorted(families):
        for family in families[index]:
            target = found.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
            for sample in family.samples:
                engine = sample.labels.get("engine", "router")
                if engine == "router":
                    target.samples.append(sample._replace(labels={**sample.labels, MARKER: str(index)}))
                elif index == here:
                    target.samples.append(sample)
    return list(found.values())


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _get(port: int, path: str, headers: Mapping[str, str]) -> bytes | None:
    """Body of an answer of another process; None if there is none."""
    connection = HTTPConnection(ADMIN_HOST, port, timeout=ASK_TIMEOUT_S)
    try:
        connection.request("GET", path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()
