"""A real Prometheus (Debian's package) that watches a router with our alert rules."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import free_port

RULES = Path(__file__).resolve().parents[2] / "compose" / "prometheus"
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None and not os.environ.get("TEST_PROMETHEUS"),
    reason="needs Prometheus; TEST_PROMETHEUS=1 makes its absence a failure",
)


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=60)

    def get(self, path: str, **parameters: str) -> Any:
        return self._http.get(path, params=parameters).raise_for_status().json()["data"]

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._http.get("/-/ready").status_code == 200
        return False

    def values(self, query: str) -> list[float]:
        """What a query says now, without what is not a number."""
        data = self.get("/api/v1/query", query=query)
        values = [data["result"][1]] if data["resultType"] == "scalar" else [one["value"][1] for one in data["result"]]
        return [float(value) for value in values if not math.isnan(float(value))]

    def close(self) -> None:
        self._http.close()


@contextlib.contextmanager
def prometheus(folder: Path, router_url: str) -> Iterator[Prometheus]:
    """Scrapes the router twice a second, under the job's name of compose/prometheus/prometheus.yml."""
    assert PROMETHEUS is not None
    target = router_url.partition("://")[2]
    settings = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(RULES / "alerts.yml")],
        "scrape_configs": [{"job_name": "penstock", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_port()}"
    command = [PROMETHEUS, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    server = Prometheus(f"http://{address}")
    try:
        deadline = time.monotonic() + 60
        while not server.ready():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield server
    finally:
        server.close()
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
