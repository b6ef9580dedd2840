"""The fleet view: what listings and links do to it."""

from __future__ import annotations

import pytest

from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.common.redis_state import Lookup
from penstock.router.fleet import Discovery, Fleet


def worker(incarnation: str, address: str = "tcp://127.0.0.1:1", role: str = "decode") -> WorkerInfo:
    return WorkerInfo(
        worker_id="w",
        incarnation=incarnation,
        role=role,
        address=address,
        fingerprint="f",
        model="m",
        served_models=["m"],
        page_size=4,
        num_pages=100,
        page_bytes=64,
        max_model_len=128,
        max_num_seqs=8,
        vocab_size=256,
    )


ONE, TWO = worker("1", "tcp://127.0.0.1:1"), worker("2", "tcp://127.0.0.1:2")


def test_redis_adds_addresses_and_the_link_decides_who_is_alive():
    fleet = Fleet()
    assert fleet.discovered([ONE, TWO]) == Discovery([ONE.address, TWO.address], [])
    assert fleet.discovered([ONE, TWO]) == Discovery([], [])
    assert fleet.members == [] and fleet.live("decode") == []
    fleet.connected(ONE.address, ONE)
    assert fleet.live("decode") == [ONE] and fleet.live("prefill") == [] and not fleet.has_choice()
    fleet.connected(TWO.address, TWO)
    assert fleet.has_choice()


def test_an_address_is_forgotten_only_when_its_link_is_down_too():
    fleet = Fleet()
    fleet.discovered([ONE, TWO])
    fleet.connected(ONE.address, ONE)
    assert fleet.discovered([]) == Discovery([], [TWO.address]), "ONE has lost its lease but answers"
    assert fleet.disconnected(ONE.address) == ONE
    assert fleet.disconnected(ONE.address) is None
    assert fleet.discovered([]) == Discovery([], [ONE.address])
    assert fleet.discovered([ONE]) == Discovery([ONE.address], [])


def test_a_restart_behind_the_same_address_is_another_worker():
    fleet = Fleet()
    fleet.discovered([ONE])
    fleet.connected(ONE.address, ONE)
    fleet.disconnected(ONE.address)
    fleet.connected(ONE.address, worker("1b"))
    assert [w.incarnation for w in fleet.live("decode")] == ["1b"]


def test_reservations_count_per_worker_and_end_at_nothing():
    fleet = Fleet()
    assert fleet.reserve("1", 10) == 10 and fleet.reserve("1", 5) == 15 and fleet.reserve("2", 1) == 1
    assert fleet.release("1", 10) == 5 and fleet.release("1", 5) == 0
    assert fleet.reservations == {"2": 1}
    with pytest.raises(ValueError, match="released more"):
        fleet.release("1", 1)


def test_candidates_join_links_reports_reservations_and_redis():
    fleet = Fleet()
    fleet.discovered([ONE, TWO])
    fleet.connected(ONE.address, ONE)
    fleet.connected(TWO.address, TWO)
    fleet.report(ONE.address, WorkerLoad(running=3))
    fleet.report("tcp://127.0.0.1:9", WorkerLoad(running=9))
    fleet.reserve("1", 100)
    one, two = fleet.candidates({"1": Lookup(held_pages=5, reserved_tokens=50), "9": Lookup(1, 1)})
    assert (one.worker, one.load.running, one.held_tokens, one.reserved_tokens) == (ONE, 3, 20, 150)
    assert (two.worker, two.held_tokens, two.reserved_tokens) == (TWO, 0, 0)
