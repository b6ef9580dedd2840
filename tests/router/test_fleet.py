"""The fleet view: what listings and links do to it."""

from __future__ import annotations

import msgspec
import pytest

from penstock.common.messages import MeasuredRates, WorkerInfo, WorkerLoad
from penstock.common.redis_state import Lookup
from penstock.router.dispatch_events import Room, WorkerLeaving
from penstock.router.fleet import FINGERPRINT_KEPT_S, Discovery, Fleet
from penstock.router.health import FAILURES, Health
from penstock.router.policy import Placement
from tests.worker_info import worker_info


def worker(incarnation: str, address: str = "tcp://127.0.0.1:1", role: str = "decode") -> WorkerInfo:
    return worker_info("w", incarnation, role, address=address)


ONE, TWO = worker("1", "tcp://127.0.0.1:1"), worker("2", "tcp://127.0.0.1:2")


def test_redis_adds_addresses_and_the_link_decides_who_is_alive():
    fleet = Fleet()
    assert fleet.discovered([ONE, TWO]) == Discovery([ONE.address, TWO.address], [])
    assert fleet.discovered([ONE, TWO]) == Discovery([], [])
    assert fleet.members == [] and fleet.live("decode") == []
    fleet.connected(ONE.address, ONE, 0.0)
    assert fleet.live("decode") == [ONE] and fleet.live("prefill") == [] and not fleet.has_choice()
    fleet.connected(TWO.address, TWO, 0.0)
    assert fleet.has_choice()


def test_an_address_is_forgotten_only_when_its_link_is_down_too():
    fleet = Fleet()
    fleet.discovered([ONE, TWO])
    fleet.connected(ONE.address, ONE, 0.0)
    assert fleet.discovered([]) == Discovery([], [TWO.address]), "ONE has lost its lease but answers"
    gone = fleet.disconnected(ONE.address, 0.0)
    assert gone is not None and gone.worker == ONE
    assert fleet.disconnected(ONE.address, 0.0) is None
    assert fleet.discovered([]) == Discovery([], [ONE.address])
    assert fleet.discovered([ONE]) == Discovery([ONE.address], [])


def test_a_restart_behind_the_same_address_is_another_worker():
    fleet = Fleet()
    fleet.discovered([ONE])
    fleet.connected(ONE.address, ONE, 0.0)
    fleet.disconnected(ONE.address, 0.0)
    fleet.connected(ONE.address, worker("1b"), 0.0)
    assert [w.incarnation for w in fleet.live("decode")] == ["1b"]


OTHER = msgspec.structs.replace(TWO, fingerprint="g")


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_the_first_worker_decides_the_fingerprint(role: str):
    fleet, first = Fleet(), worker("1", role=role)
    fleet.discovered([first, OTHER])
    assert fleet.connected(first.address, first, 0.0) == ""
    refusal = fleet.connected(OTHER.address, OTHER, 0.0)
    assert "'g'" in refusal and "'f'" in refusal
    assert [member.worker for member in fleet.members] == [first] and not fleet.has_choice()
    assert fleet.acceptable(1e6) == [], "however long the first one stays"
    assert fleet.disconnected(OTHER.address, 0.0) is None, "it was no member"
    assert fleet.connected(TWO.address, TWO, 0.0) == "" and fleet.has_choice()


def test_another_fingerprint_is_taken_when_all_requests_of_the_old_one_are_over():
    fleet, third = Fleet(), msgspec.structs.replace(OTHER, incarnation="3", address="tcp://127.0.0.1:3")
    fleet.connected(ONE.address, ONE, 0.0)
    for refused in (OTHER, third):
        assert fleet.connected(refused.address, refused, 1.0)
    fleet.disconnected(ONE.address, 100.0)
    fleet.disconnected(third.address, 100.0)
    before = 99.9 + FINGERPRINT_KEPT_S
    assert fleet.acceptable(before) == [] and fleet.connected(OTHER.address, OTHER, before)
    assert fleet.acceptable(101.0 + FINGERPRINT_KEPT_S) == [(OTHER.address, OTHER)]
    assert fleet.connected(OTHER.address, OTHER, 101.0 + FINGERPRINT_KEPT_S) == ""
    assert fleet.acceptable(1e6) == [] and fleet.live("decode") == [OTHER]
    assert fleet.connected(ONE.address, ONE, 1e6), "now the old one is the other one"


def test_a_refused_worker_is_forgotten_with_its_address():
    fleet = Fleet()
    fleet.discovered([ONE, OTHER])
    fleet.connected(ONE.address, ONE, 0.0)
    fleet.connected(OTHER.address, OTHER, 0.0)
    assert fleet.discovered([ONE]) == Discovery([], [OTHER.address])
    fleet.disconnected(ONE.address, 0.0)
    assert fleet.acceptable(1e6) == []


@pytest.mark.parametrize(
    ("router", "served", "model", "taken"),
    [
        (["a", "b"], ["b"], "/m/x", True),
        (["a", "/m/x"], ["b"], "/elsewhere/x/", True),  # names for clients differ, the model is the same
        (["org/x"], ["/models/x"], "/models/x", True),
        (["a", "/m/x"], ["b"], "/m/y", False),
        ([""], ["b"], "/m/y", True),  # a router that was told no name
    ],
)
def test_a_worker_of_another_name_is_refused(router: list[str], served: list[str], model: str, taken: bool):
    fleet, one = Fleet(router), msgspec.structs.replace(ONE, served_models=served, model=model)
    refusal = fleet.connected(one.address, one, 0.0)
    assert (refusal == "") is taken and (fleet.live("decode") == [one]) is taken
    if not taken:
        assert "it serves b, y, this router a, x" in refusal
        assert fleet.acceptable(1e6) == []


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
    fleet.connected(ONE.address, ONE, 0.0)
    fleet.connected(TWO.address, TWO, 0.0)
    fleet.report(ONE.address, WorkerLoad(running=3), 0.0)
    fleet.report("tcp://127.0.0.1:9", WorkerLoad(running=9), 0.0)
    fleet.reserve("1", 100)
    one, two = fleet.candidates({"1": Lookup(held_pages=5, reserved_tokens=50), "9": Lookup(1, 1)}, 100.0)
    assert (one.worker, one.load.running, one.held_tokens, one.reserved_tokens) == (ONE, 3, 20, 150)
    assert (two.worker, two.held_tokens, two.reserved_tokens) == (TWO, 0, 0)


def test_the_share_of_hits_is_the_whole_fleets():
    fleet = Fleet()
    assert fleet.hit_share() == 0.0
    fleet.connected(ONE.address, ONE, 0.0)
    fleet.connected(TWO.address, TWO, 0.0)
    fleet.report(ONE.address, WorkerLoad(prefix_queries=100, prefix_hits=90), 0.0)
    fleet.report(TWO.address, WorkerLoad(prefix_queries=300, prefix_hits=10), 0.0)
    assert fleet.hit_share() == 0.25


def test_work_given_counts_for_live_workers_only():
    fleet = Fleet()
    fleet.connected(ONE.address, ONE, 0.0)
    fleet.connected(TWO.address, TWO, 0.0)
    fleet.give(Placement(ONE, None, 32, 100, prefill_ms=10.0, decode_ms=5.0), 0.0)
    fleet.give(Placement(ONE, TWO, 32, 100, prefill_ms=10.0, decode_ms=5.0), 0.0)
    fleet.give_more("1", 3.0)
    fleet.give_more("2", -4.0)
    fleet.give_more("gone", 100.0)
    assert [c.given_ms for c in fleet.candidates({}, 100.0)] == [23.0, 6.0]
    fleet.disconnected(ONE.address, 1.0)
    fleet.give(Placement(ONE, None, 32, 100, prefill_ms=10.0), 0.0)  # lost while it was chosen
    fleet.connected(ONE.address, msgspec.structs.replace(ONE, incarnation="1b"), 2.0)
    assert {c.worker.incarnation: c.given_ms for c in fleet.candidates({}, 100.0)} == {"2": 6.0, "1b": 6.0}


def test_the_rate_of_prompts_is_of_all_that_compute_them():
    fleet = Fleet(health=Health(stall_timeout_s=30.0))
    prefill = msgspec.structs.replace(worker("p", "tcp://127.0.0.1:3", role="prefill"), step_tokens=1000)
    decode = msgspec.structs.replace(ONE, step_tokens=1000, mixed_chunk_tokens=100)
    rates = MeasuredRates(prefill_tokens_per_s=10_000.0, decode_step_ms=5.0, decode_sequence_ms=5.0)
    for one in (decode, prefill):
        fleet.connected(one.address, one, 0.0)
        fleet.report(one.address, WorkerLoad(rates=rates), 0.0)
    assert fleet.prefill_rate(0.0, beside=False) == pytest.approx(10_000)
    assert fleet.prefill_rate(0.0, beside=True) == pytest.approx(20_000)
    fleet.report(decode.address, WorkerLoad(running=2, rates=rates), 0.0)  # ten chunks of 10 + 2 * 5 ms
    assert fleet.prefill_rate(0.0, beside=True) == pytest.approx(15_000)
    fleet.report(decode.address, WorkerLoad(draining=True, rates=rates), 0.0)
    assert fleet.prefill_rate(0.0, beside=True) == pytest.approx(10_000)
    fleet.report(decode.address, WorkerLoad(rates=rates), 99.0)
    assert [one for one, _ in fleet.stalled(99.0)] == [prefill]
    assert fleet.prefill_rate(99.0, beside=False) == pytest.approx(10_000), "the decode worker's, which is all there is"


def test_a_long_first_step_is_no_stall_before_anything_is_measured():
    fleet = Fleet(health=Health(stall_timeout_s=30.0))
    fleet.connected(ONE.address, ONE, 0.0)
    fleet.report(ONE.address, WorkerLoad(running=1), 1.0)
    fleet.report(ONE.address, WorkerLoad(running=1), 2.0)
    assert fleet.stalled(101.0) == []
    assert fleet.stalled(130.0)[0][0] == ONE


def test_beside_a_draining_worker_a_cold_one_is_always_a_candidate():
    fleet = Fleet(health=Health(slow_start_s=10.0))
    fleet.connected(ONE.address, ONE, 0.0)
    fleet.connected(TWO.address, TWO, 100.0)
    fleet.report(ONE.address, WorkerLoad(draining=True), 100.0)
    assert all([c.worker for c in fleet.candidates({}, 100.1)] == [TWO] for _ in range(20))


def test_who_takes_requests_tells_how_much_room_there_is_for_those_of_who_leaves():
    fleet = Fleet(health=Health(slow_start_s=10.0))
    three = worker("3", "tcp://127.0.0.1:3")
    prefill = worker("p", "tcp://127.0.0.1:4", role="prefill")
    for one in (ONE, TWO, three, prefill):
        fleet.connected(one.address, one, 0.0)
    fleet.report(TWO.address, WorkerLoad(free_pages=10, running=5, waiting=1), 1.0)
    fleet.report(three.address, WorkerLoad(free_pages=7, promised_pages=3), 1.0)
    assert fleet.leaving(TWO.address, 1.0) == [], "nobody leaves"
    fleet.report(ONE.address, WorkerLoad(draining=True, free_pages=100), 1.0)
    fleet.report(prefill.address, WorkerLoad(draining=True), 1.0)
    size, context, slots = TWO.page_size, TWO.max_model_len, TWO.max_num_seqs
    room = Room(10, size, slots - 6, context, routers=3)
    assert fleet.leaving(TWO.address, 1.0, routers=3) == [WorkerLeaving("1", "2", room, frozenset({"3"}))]
    room = Room(7, size, slots, context)
    assert fleet.leaving(three.address, 1.0) == [WorkerLeaving("1", "3", room, frozenset({"2"}))]
    for silent in (ONE, prefill):
        assert fleet.leaving(silent.address, 1.0) == []
    fleet.report(TWO.address, WorkerLoad(draining=True, free_pages=9), 2.0)
    told = fleet.leaving(three.address, 2.0)
    assert [(one.incarnation, one.others) for one in told] == [("1", frozenset()), ("2", frozenset())]
    fleet.report(three.address, WorkerLoad(draining=True), 2.0)
    assert fleet.leaving(three.address, 2.0) == [], "nobody is left"


@pytest.mark.parametrize(
    "full",
    [
        WorkerLoad(free_pages=9, running=TWO.max_num_seqs),
        WorkerLoad(free_pages=9, running=1, waiting=TWO.max_num_seqs),
        WorkerLoad(free_pages=0),
        WorkerLoad(free_pages=9, waiting=1, held_up=1),
    ],
)
def test_who_is_full_or_not_well_has_no_room(full: WorkerLoad):
    fleet = Fleet()
    for one in (ONE, TWO):
        fleet.connected(one.address, one, 0.0)
    fleet.report(ONE.address, WorkerLoad(draining=True), 1.0)
    fleet.report(TWO.address, WorkerLoad(free_pages=9), 1.0)
    assert len(fleet.leaving(TWO.address, 1.0)) == 1
    fleet.report(TWO.address, full, 1.0)
    assert fleet.leaving(TWO.address, 1.0) == []
    fleet.report(TWO.address, WorkerLoad(free_pages=9), 1.0)
    for _ in range(FAILURES):
        fleet.health.failed("2", "a request failed", 1.0)
    for now in (1.1, 100.0):  # broken, then probing: one request shows whether it is up, and no more
        assert fleet.leaving(TWO.address, now) == []


def test_what_moves_is_placed_where_it_was_told_to_go():
    fleet = Fleet(health=Health(slow_start_s=10.0))
    prefill = worker("p", "tcp://127.0.0.1:4", role="prefill")
    fleet.connected(ONE.address, ONE, 0.0)
    fleet.connected(prefill.address, prefill, 0.0)
    fleet.connected(TWO.address, TWO, 100.0)  # a stranger, to which hardly anything is sent

    def found(to: str) -> list[set[str]]:
        return [{c.worker.incarnation for c in fleet.candidates({}, 100.1, to)} for _ in range(5)]

    assert found("2") == [{"2", "p"}] * 5
    assert {"1", "p"} in found("gone")
    fleet.report(TWO.address, WorkerLoad(draining=True), 100.1)
    assert found("2") == [{"1", "p"}] * 5


def test_the_context_of_a_fleet_is_that_of_its_shortest_decode_worker():
    fleet = Fleet()
    assert fleet.context() == 0
    short = msgspec.structs.replace(TWO, max_model_len=ONE.max_model_len - 1)
    prefill = msgspec.structs.replace(worker("p", "tcp://127.0.0.1:4", role="prefill"), max_model_len=5)
    for one in (ONE, short, prefill):
        fleet.connected(one.address, one, 0.0)
    assert fleet.context() == short.max_model_len
    fleet.disconnected(short.address, 1.0)
    assert fleet.context() == ONE.max_model_len


def test_how_long_a_step_may_take_depends_on_how_much_goes_into_it():
    fleet = Fleet(health=Health(stall_timeout_s=30.0))
    larger = msgspec.structs.replace(TWO, step_tokens=4 * ONE.step_tokens)
    rates = MeasuredRates(
        prefill_tokens_per_s=ONE.step_tokens / 10.0
    )  # a full step takes the first 10 s: 30 are allowed
    for one in (ONE, larger):
        fleet.connected(one.address, one, 0.0)
        fleet.report(one.address, WorkerLoad(running=1, rates=rates), 1.0)
        fleet.report(one.address, WorkerLoad(running=1, rates=rates), 100.0)  # it answers, and no step has ended
    assert fleet.stalled(60.0) == []
    assert [one for one, _ in fleet.stalled(62.0)] == [ONE]
    assert [one for one, _ in fleet.stalled(129.0)] == []
    assert [one for one, _ in fleet.stalled(152.0)] == [larger]


def test_a_worker_is_at_work_on_prompts_while_it_computes_or_reads_them():
    fleet = Fleet()
    fleet.connected(ONE.address, ONE, 0.0)
    told = [(1, 500), (1, 500), (2, 300), (3, 0), (4, 0), (5, 10)]
    at_work = [fleet.report(ONE.address, WorkerLoad(steps=s, queued_tokens=q), 1.0) is not None for s, q in told]
    assert at_work == [True, False, True, False, False, True]
    read = [fleet.report(ONE.address, WorkerLoad(steps=5, transfer_bytes=b), 1.0) is not None for b in (7, 7, 9)]
    assert read == [True, False, True]
    assert fleet.report("tcp://127.0.0.1:9", WorkerLoad(steps=1, queued_tokens=1), 1.0) is None


def test_requests_are_taken_from_a_worker_only_if_a_usable_decode_worker_is_left():
    fleet = Fleet(health=Health(stall_timeout_s=30.0))
    prefill = worker("p", "tcp://127.0.0.1:3", role="prefill")
    for one in (ONE, prefill):
        fleet.connected(one.address, one, 0.0)
    assert fleet.has_other("p", 1.0) and not fleet.has_other("1", 1.0)
    fleet.report(prefill.address, WorkerLoad(), 1000.0)
    assert [one for one, _ in fleet.stalled(1000.0)] == [ONE]
    assert not fleet.has_other("p", 1000.0), "nobody is left who could compute its prompts"
    fleet.connected(TWO.address, TWO, 1000.0)
    assert fleet.has_other("p", 1000.0) and fleet.has_other("1", 1000.0)
