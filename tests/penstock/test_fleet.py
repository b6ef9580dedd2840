"""A fleet: what its children are told, and the real thing from start to stop with the embedded model."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from penstock import launcher
from penstock.common.config import RouterConfig, ServeConfig
from penstock.common.errors import ConfigError
from penstock.console import Console
from penstock.fleet import Fleet
from penstock.private_redis import free_port, port_is_free
from penstock.process_group import LaunchError, ProcessGroup

CHECKOUT = Path(__file__).parents[2]
MODEL = str(CHECKOUT / "penstock" / "demo_model" / "checkpoint")
DEADLINE_S = 60.0
SMALL = {"kv_cache_memory_bytes": 8 << 20, "device": "cpu", "drain_s": 5.0}


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.05)


def test_children_are_told_everything_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_MAX_NUM_SEQS", "9")
    config = ServeConfig(
        model="tiny", device="cpu", port=0, prefill_workers=1, cpu_threads=2, api_key=("sk-secret",), max_num_seqs=3
    )
    fleet = Fleet(config)
    specs = {spec.name: spec for spec in fleet.specs}
    assert list(specs) == ["redis", "prefill-0", "decode-0", "router"]
    assert [spec.member.tier for spec in fleet.specs] == [0, 1, 1, 2]
    prefill, router = json.loads(specs["prefill-0"].stdin), json.loads(specs["router"].stdin)
    assert prefill["role"] == "prefill"
    assert prefill["max_num_seqs"] == 3
    assert prefill["redis_url"] == router["redis_url"] == fleet.config.redis_url
    assert router["api_key"] == ["sk-secret"]
    assert "api_key" not in prefill
    for spec in fleet.specs:
        everything = f"{spec.command} {spec!r}"
        assert "sk-secret" not in everything
        assert fleet.config.redis_url not in everything
        assert "PENSTOCK_MAX_NUM_SEQS" not in spec.environ or spec.name == "redis"
    assert specs["prefill-0"].environ["OMP_NUM_THREADS"] == "2"
    assert fleet.url == f"http://127.0.0.1:{fleet.config.port}"


def test_a_redis_that_is_given_is_not_started() -> None:
    fleet = Fleet(ServeConfig(model="tiny", device="cpu", port=0, redis_url="redis://db:6379/1"))
    assert [spec.name for spec in fleet.specs] == ["decode-0", "router"]
    assert json.loads(fleet.specs[0].stdin)["redis_url"] == "redis://db:6379/1"


def test_a_redis_that_is_away_is_for_the_processes_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    """The launcher asks it again and again while a worker starts."""
    redis_url = f"redis://127.0.0.1:{free_port()}/0"
    fleet = Fleet(ServeConfig(model="tiny", device="cpu", port=0, redis_url=redis_url))
    assert not fleet.specs[0].ready(1)
    assert not caplog.records


def test_a_port_in_use_is_found_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: it is in use"):
            Fleet(ServeConfig(model="tiny", port=port))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_port_that_routers_will_share_is_held_from_the_start(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    port = free_port()
    while_it_runs: list[bool] = []

    def run(*_: object) -> int:
        while_it_runs.append(port_is_free("127.0.0.1", port))
        return 0

    monkeypatch.setattr(launcher, "run_in_foreground", run)
    monkeypatch.setattr(launcher.logs, "setup", lambda *_: None)
    launcher.launch(ServeConfig(model="tiny", device="cpu", port=port, router_procs=processes))
    launcher.launch_routers(RouterConfig(model="tiny", port=port, router_procs=processes))
    assert while_it_runs == [processes == 1] * 2
    assert port_is_free("127.0.0.1", port)


def test_routers_of_a_group_share_one_port_though_any_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[ProcessGroup] = []
    monkeypatch.setattr(launcher, "run_in_foreground", lambda group, *_: groups.append(group))
    monkeypatch.setattr(launcher.logs, "setup", lambda *_: None)
    launcher.launch_routers(RouterConfig(model="tiny", port=0, router_procs=2))
    ports = {json.loads(spec.stdin)["port"] for spec in groups[0]._specs.values()}
    assert len(ports) == 1 and ports != {0}


def test_a_fleet_that_was_not_started_can_be_stopped() -> None:
    Fleet(ServeConfig(model="tiny", port=0)).stop()


@pytest.mark.system
def test_a_broken_checkpoint_ends_the_launch(tmp_path: Path) -> None:
    broken = Path(shutil.copytree(MODEL, tmp_path / "broken"))
    shape = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(shape | {"architectures": ["NoSuchModel"]}))
    fleet = Fleet(ServeConfig(model=str(broken), port=0, **SMALL), console=Console(io.StringIO()))
    with pytest.raises(LaunchError, match=r"^decode-0 did not start \(exit status 2\): .*NoSuchModel") as caught, fleet:
        pass
    assert caught.value.exit_status == 2
    assert fleet.group.pids() == {}


@pytest.mark.system
def test_the_real_thing_from_start_to_stop() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    options = {"port": free_port(), "prefill-workers": 1, "kv-transport": "shm", "drain-s": 5, "device": "cpu"}
    argv = [f"--{name}={value}" for name, value in options.items()]
    argv += ["--kv-cache-memory-bytes=8MiB", "--served-model-name=tiny"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "penstock", "serve", MODEL, *argv],
        cwd=CHECKOUT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    try:
        line = launcher.stdout.readline().strip()
        url = f"http://127.0.0.1:{options['port']}"
        assert line == f"Penstock is ready: {url} | tiny | 1 prefill + 1 decode worker | KV transport: shm"
        children = psutil.Process(launcher.pid).children(recursive=True)
        body = json.dumps({"model": "tiny", "prompt": "Water flows", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 4
        launcher.send_signal(signal.SIGTERM)
        rest, errors = launcher.communicate(timeout=DEADLINE_S)
    finally:
        launcher.kill()
        launcher.communicate()
    assert (launcher.returncode, rest) == (0, "")
    assert "decode-0   | loading weights 100 %" in errors
    assert "Traceback" not in errors
    wait_for(lambda: not any(child.is_running() for child in children), "no process is left")


@pytest.mark.system
def test_a_worker_that_dies_comes_back() -> None:
    with Fleet(ServeConfig(model=MODEL, port=0, **SMALL), console=Console(io.StringIO())) as fleet:
        before = fleet.workers()["decode-0"]
        assert before.pid == fleet.worker_pids()["decode-0"]
        with urllib.request.urlopen(fleet.status_urls()["decode-0"] + "/health", timeout=60) as response:
            assert json.load(response)["healthy"] is True
        fleet.kill("decode-0")
        wait_for(lambda: fleet.worker_pids().get("decode-0", before.pid) != before.pid, "it is started again")
        wait_for(lambda: fleet.group.ready, "everything is ready again")
        assert fleet.workers()["decode-0"].incarnation != before.incarnation
    assert fleet.group.pids() == {}
