"""The compose files: what they start parses with our own command line, and docker-compose accepts them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.common.config import TWO_PHASE_MIXED_CHUNK_TOKENS, RouterConfig, WorkerConfig
from penstock.common.config_loader import load_config

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("docker-compose.yaml", "docker-compose.gpu.yaml")
SETTINGS = {"PENSTOCK_CLUSTER_KEY": "a-secret-of-the-test", "PENSTOCK_MODEL": "org/model"}
CONFIGS = {"router": RouterConfig, "prefill": WorkerConfig, "decode": WorkerConfig}

_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def _interpolated(value: Any, settings: dict[str, str]) -> Any:
    """A parsed compose file with ${NAME}, ${NAME:-default} and ${NAME:?message} replaced, as docker-compose does."""

    def replace(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if settings.get(name):
            return settings[name]
        if kind == "?":
            raise KeyError(f"{name}: {rest}")
        return rest if kind == "-" else ""

    if isinstance(value, str):
        return _VARIABLE.sub(replace, value)
    if isinstance(value, list):
        return [_interpolated(item, settings) for item in value]
    if isinstance(value, dict):
        return {key: _interpolated(item, settings) for key, item in value.items()}
    return value


def _compose(file: str, settings: dict[str, str] = SETTINGS) -> dict[str, Any]:
    parsed: dict[str, Any] = _interpolated(yaml.safe_load((ROOT / "compose" / file).read_text()), settings)
    return parsed


def _config(service: dict[str, Any]) -> RouterConfig | WorkerConfig:
    """What the process of a service would make of its command and environment."""
    program, command, *arguments = service["command"]
    assert program == "penstock"
    fixed = {"role": command} if command != "router" else {}
    return load_config(CONFIGS[command], arguments, service["environment"], prog=f"penstock {command}", fixed=fixed)


@pytest.mark.parametrize("file", FILES)
def test_commands_parse_and_agree(file: str) -> None:
    services = _compose(file)["services"]
    router, prefill, decode = (_config(services[name]) for name in ("router", "prefill", "decode"))
    assert isinstance(router, RouterConfig) and isinstance(prefill, WorkerConfig) and isinstance(decode, WorkerConfig)
    for config in (router, prefill, decode):
        assert config.model == "org/model"
        assert config.redis_url == "redis://redis:6379/0"
        assert config.cluster_key == SETTINGS["PENSTOCK_CLUSTER_KEY"]
        assert config.served_model_name == ()
    assert (prefill.role, decode.role) == ("prefill", "decode")
    assert router.api_key == ()
    assert router.host == "0.0.0.0"
    for worker in (prefill, decode):
        assert worker.bus_host == "0.0.0.0"
    assert decode.mixed_chunk_tokens == TWO_PHASE_MIXED_CHUNK_TOKENS  # as penstock serve sets it


@pytest.mark.parametrize("file", FILES)
def test_ports_and_probes_match_the_commands(file: str) -> None:
    services = _compose(file)["services"]
    router = _config(services["router"])
    assert isinstance(router, RouterConfig)
    assert services["router"]["ports"] == [f"127.0.0.1:8000:{router.port}"]
    assert f":{router.port}/health" in services["router"]["healthcheck"]["test"][-1]
    for name in ("prefill", "decode"):
        worker = _config(services[name])
        assert isinstance(worker, WorkerConfig)
        assert f":{worker.metrics_port}/health" in services[name]["healthcheck"]["test"][-1]
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > worker.drain_s
        assert "ports" not in services[name], "nothing but the router is reachable from outside"
    assert "ports" not in services["redis"]


@pytest.mark.parametrize("file", FILES)
def test_workers_share_the_namespaces_that_mapping_memory_needs(file: str) -> None:
    services = _compose(file)["services"]
    for name in ("prefill", "decode"):
        assert services[name]["pid"] == "service:pause"
        assert services[name]["ipc"] == "service:pause"
        assert "pause" in services[name]["depends_on"]
    assert services["pause"]["ipc"] == "shareable"


def test_gpu_workers_see_both_gpus_and_use_one_each() -> None:
    services = _compose("docker-compose.gpu.yaml")["services"]
    devices = []
    for name in ("prefill", "decode"):
        config = _config(services[name])
        assert isinstance(config, WorkerConfig)
        devices.append(config.device)
        (reserved,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert reserved["device_ids"] == ["0", "1"]
    assert devices == ["cuda:0", "cuda:1"]


def test_the_cpu_fleet_serves_the_demo_model_unless_told_otherwise() -> None:
    services = _compose("docker-compose.yaml", {"PENSTOCK_CLUSTER_KEY": "key"})["services"]
    assert {_config(services[name]).model for name in CONFIGS} == {"/demo-model"}
    assert "/demo-model" in (ROOT / "compose" / "Dockerfile").read_text()


@pytest.mark.parametrize("file", FILES)
def test_without_a_cluster_key_nothing_starts(file: str) -> None:
    with pytest.raises(KeyError, match="PENSTOCK_CLUSTER_KEY"):
        _compose(file, {"PENSTOCK_MODEL": "org/model"})


@pytest.mark.parametrize("file", FILES)
def test_monitoring_is_optional_and_stays_on_this_host(file: str) -> None:
    services, base = _compose(file)["services"], _compose("monitoring.yaml")["services"]
    for name, service in base.items():
        assert services[name]["extends"] == {"file": "monitoring.yaml", "service": name}
        assert services[name]["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            assert (ROOT / "compose" / volume.partition(":")[0]).is_dir(), volume


@pytest.mark.parametrize("file", FILES)
def test_prometheus_watches_every_process_where_it_listens(file: str) -> None:
    services = _compose(file)["services"]
    jobs = yaml.safe_load((ROOT / "compose" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    watched = {name: found["port"] for job in jobs for found in job["dns_sd_configs"] for name in found["names"]}
    router, prefill, decode = (_config(services[name]) for name in ("router", "prefill", "decode"))
    assert isinstance(router, RouterConfig) and isinstance(prefill, WorkerConfig) and isinstance(decode, WorkerConfig)
    assert watched == {"router": router.port, "prefill": prefill.metrics_port, "decode": decode.metrics_port}


def test_images_are_built_from_stages_that_exist() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "compose" / "Dockerfile").read_text(), re.MULTILINE))
    for file in FILES:
        for name, service in _compose(file)["services"].items():
            if "build" in service:
                assert service["build"]["target"] in stages, name
                assert (ROOT / "compose" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("file", FILES)
def test_docker_compose_reads_the_file_as_we_do(file: str) -> None:
    done = subprocess.run(
        ["docker-compose", "-f", str(ROOT / "compose" / file), "--profile", "monitoring", "config"],
        env={"PATH": os.environ["PATH"], **SETTINGS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = yaml.safe_load(done.stdout)["services"], _compose(file)["services"]
    assert theirs.keys() == ours.keys()
    for name, service in ours.items():
        assert theirs[name]["command"] == service["command"] if "command" in service else "extends" in service
        for key, value in service.get("environment", {}).items():
            assert theirs[name]["environment"][key] == value
