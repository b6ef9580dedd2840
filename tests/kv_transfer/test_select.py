"""Which transport is opened and chosen."""

from __future__ import annotations

import importlib
import logging

import msgspec
import pytest

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer import select
from penstock.kv_transfer import tcp as tcp_module
from penstock.kv_transfer.base import Copy, TransportError
from penstock.kv_transfer.nixl import NixlTransport
from penstock.kv_transfer.peer_transports import PeerTransports
from penstock.kv_transfer.select import choose, open_transports, same_host
from penstock.kv_transfer.shm import SharedPool, ShmTransport
from tests.kv_transfer.pools import Pool
from tests.kv_transfer.test_reader import LENDER


@pytest.mark.parametrize(("rdma", "names"), [([], ["shm", "tcp"]), (["mlx5_0"], ["shm", "nixl", "tcp"])])
def test_auto_opens_what_there_is_and_says_so(
    rdma: list[str], names: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TCP NIXL would read, too, but slower, and a reader that dies may take its lender along."""
    monkeypatch.setattr(select, "rdma_devices", lambda: rdma)
    pool = Pool(4096, 3, seed=1)
    before = pool.pages.copy()
    with caplog.at_level(logging.INFO, "penstock.kv_transfer"):
        transports = open_transports("auto", pool.region, "worker-1")
    assert [t.name for t in transports] == names
    assert [record.message.split(",")[0] for record in caplog.records] == [f"transport {n}: works" for n in names]
    assert (pool.pages == before).all()
    for transport in transports:
        transport.close()
    pool.close()


def test_what_is_missing_is_dropped_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, package: str | None = None) -> object:
        raise ImportError(f"no {name}")

    pool = Pool(4096, 3)
    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(select, "rdma_devices", lambda: ["mlx5_0"])
    with pytest.raises(TransportError, match="NIXL is not installed"):
        open_transports("nixl", pool.region, "worker-1")
    shm, tcp = open_transports("auto", pool.region, "worker-1")
    assert (shm.name, tcp.name) == ("shm", "tcp")
    shm.close()
    tcp.close()
    hidden = MemoryRegion(pool.region.address, 4096, 3)  # no file behind it
    with pytest.raises(TransportError, match="no file"):
        open_transports("shm", hidden, "worker-1")
    (tcp,) = open_transports("auto", hidden, "worker-1")
    assert tcp.name == "tcp"
    tcp.close()
    taken = tcp_module.Listen(host="192.0.2.1")  # nobody's
    with pytest.raises(TransportError, match="no transport works"):
        open_transports("auto", hidden, "worker-1", taken)
    pool.close()


def test_the_probe_compares_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport that reports success without copying anything is not used."""
    pool = Pool(4096, 3, seed=1)
    monkeypatch.setattr(ShmTransport, "post", lambda self, peer, src, dst: Copy(peer, 4096))
    with pytest.raises(TransportError, match="other bytes"):
        open_transports("shm", pool.region, "worker-1")
    pool.close()


def test_choose() -> None:
    both = {"shm": b"", "nixl": b""}
    assert choose(["shm", "nixl", "tcp"], {**both, "tcp": b""}, same_host=False) == "nixl"
    assert choose(["shm", "tcp"], {**both, "tcp": b""}, same_host=False) == "tcp"
    assert choose(["nixl", "tcp"], {"shm": b"", "tcp": b""}, same_host=True) == "tcp"
    assert choose(["shm", "nixl"], both, same_host=True) == "shm"
    assert choose(["shm", "nixl"], both, same_host=False) == "nixl"
    assert choose(["nixl"], both, same_host=True) == "nixl"
    with pytest.raises(TransportError, match="another host"):
        choose(["shm", "nixl"], {"shm": b""}, same_host=False)
    with pytest.raises(TransportError, match="we have shm, it has nixl"):
        choose(["shm"], {"nixl": b""}, same_host=True)


def test_same_host() -> None:
    pool = Pool(4096, 1)
    description = ShmTransport(pool.region).description()
    assert same_host({"shm": description})
    elsewhere = msgspec.structs.replace(msgspec.msgpack.decode(description, type=SharedPool), host="another")
    assert not same_host({"shm": msgspec.msgpack.encode(elsewhere)})
    assert not same_host({"shm": b"\xc1"})
    assert not same_host({"nixl": b""})
    pool.close()


def test_memory_on_a_gpu_is_not_shared() -> None:
    with pytest.raises(TransportError, match="cuda:0"):
        ShmTransport(MemoryRegion(0, 4096, 1, "cuda:0"))
    assert NixlTransport.progress_s is not None and ShmTransport.progress_s is None


def test_a_transport_that_is_refused_after_its_link_was_lost_is_tried_again_on_the_next_link() -> None:
    transports = PeerTransports(["nixl"], "auto")
    assert transports.find(LENDER) == "nixl" and transports.forget(LENDER.incarnation)
    assert transports.refuse(LENDER.incarnation, "nixl", "out of reach") is None
    assert transports.find(LENDER) == "nixl"
