"""Router processes that share one port (`--router-procs`), and how each of them answers for all.

Every process listens on the shared port (SO_REUSEPORT: the kernel deals connections out) and, on loopback, on an admin
port of its own, where it answers for itself alone. Asked at the shared port for /metrics, /load or /fleet, a process
asks the others at their admin ports. Nothing is kept for that, in files or in shared memory; a process that does not
answer is left out.

Metrics are labelled (`process="0"`), not summed. A sum would fall whenever a process dies; Prometheus takes that for a
counter that began again, and would count all that the others have done a second time. `sum by` of the rates is right.
Each process labels what it says of itself; of workers, of which all say the same, only the process that was asked does.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException
from typing import Any

import msgspec
from prometheus_client.core import Metric

from penstock.common.config import RouterConfig
from penstock.router.exposition import Scrape, labelled, together, written

ASK_TIMEOUT_S = 2.0
ADMIN_HOST = "127.0.0.1"
MARKER = "process"  # the label
OWN_FIGURES = "figures=own"  # asks /metrics for what a process says of itself


class Group:
    """One process's place among those that share its port. A router that is alone is a group of one."""

    def __init__(self, config: RouterConfig) -> None:
        ports = [int(port) for port in config.group_ports]
        self.index = ports.index(config.admin_port) if ports else 0
        self._others = {i: port for i, port in enumerate(ports) if port != config.admin_port}
        self._admin_port = config.admin_port
        self._headers = {"Authorization": f"Bearer {config.api_key[0]}"} if config.api_key else {}
        self._writing = asyncio.Lock()  # one text at a time: each thread that computes delays the loop's wake-ups

    def is_for_all(self, scope: Mapping[str, Any]) -> bool:
        """The request came to the shared port of several processes, so that its answer should speak of all of them."""
        server = scope.get("server")
        return bool(self._others) and not (server and server[1] == self._admin_port)

    async def metrics(self, scope: Mapping[str, Any], scrape: Scrape) -> bytes:
        """The text of /metrics, as it was asked for: of all processes, of this one, or its `OWN_FIGURES`."""
        if self.is_for_all(scope):
            writing = self._write(lambda: written([*self._own(scrape), *scrape.of_workers()]))
            own, others = await asyncio.gather(writing, self._ask(f"/metrics?{OWN_FIGURES}"))
            texts = {self.index: own, **others}
            return await self._write(lambda: together(texts[index] for index in sorted(texts)))
        if scope.get("query_string") == OWN_FIGURES.encode():
            return await self._write(lambda: written(self._own(scrape)))
        return await self._write(scrape.text)

    def _own(self, scrape: Scrape) -> Iterator[Metric]:
        return labelled(scrape.of_router(), MARKER, str(self.index))

    async def _write(self, work: Callable[[], bytes]) -> bytes:
        async with self._writing:
            return await asyncio.to_thread(work)

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
