"""NIXL's wrapper where NIXL itself fails; with the real one it is in test_transports.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from penstock.kv_transfer import nixl
from penstock.kv_transfer.nixl import NixlPool, NixlTransport
from tests.kv_transfer.pools import Pool


class Agent:
    """Stands for NIXL's; what is named in `failing` raises."""

    def __init__(self, name: str, config: Any) -> None:
        self.backends = ["UCX"]
        self.failing: set[str] = set()
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> str:
            self.called.append(name)
            if name in self.failing:
                raise RuntimeError(f"{name} fails")
            return name

        return call


@pytest.mark.parametrize("failing", ["release_dlist_handle", "remove_remote_agent"])
def test_what_fails_of_leaving_a_peer_keeps_nothing_else_of_it(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    module = SimpleNamespace(nixl_agent_config=lambda **_: None, nixl_agent=Agent)
    bindings = SimpleNamespace(nixlRemoteDisconnectError=ConnectionError)
    monkeypatch.setattr(nixl, "import_nixl", lambda: (module, bindings))
    pool = Pool(4096, 4)
    transport = NixlTransport(pool.region, "ours")
    theirs = NixlPool("theirs", b"", 0, 4096, 4, "DRAM", 0)
    transport.connect("p1", msgspec.msgpack.encode(theirs))
    agent: Agent = transport._agent
    agent.failing, agent.called = {failing}, []
    transport.disconnect("p1")
    assert agent.called == ["release_dlist_handle", "remove_remote_agent"]
    pool.close()
