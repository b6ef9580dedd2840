"""A decode worker computes prompts beside prefill workers: when it is worth it, and what is expected of it then."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.messages import MeasuredRates, WorkerLoad
from penstock.router.cost import DEFAULT_WEIGHTS, CostPolicy
from penstock.router.expected import computing_ms, expected, of_placement, quickest
from penstock.router.fleet import Fleet
from penstock.router.policy import Candidate, RequestFacts
from penstock.router.rates import WorkerRates
from tests.router.test_fleet import worker
from tests.worker_info import worker_info

RATES = WorkerRates(1000.0, 10.0, 1.0, 0.0, 1e9, 0.0)  # 1 ms a prompt token; a step 10 ms, and 1 ms for each sequence
CHUNK = 20


def place(
    name: str, role: str, *, queued: int = 0, running: int = 0, held: int = 0, given_ms: float = 0.0
) -> Candidate:
    large = {"max_num_seqs": 64, "num_pages": 100_000, "max_model_len": 1 << 20}
    info = worker_info(name, f"{name}-1", role, mixed_chunk_tokens=CHUNK, **large)
    load = WorkerLoad(running=running, num_pages=100_000, free_pages=100_000)
    return Candidate(info, load, held, queued, RATES, given_ms, queued)


def local(tokens: int, fleet: list[Candidate], hit_share: float = 0.0) -> bool:
    chosen = CostPolicy().choose(RequestFacts(tokens, hit_share=hit_share), fleet)
    assert chosen is not None
    return chosen.prefill is None


def test_chunks_move_the_sequences_on_with_them():
    assert computing_ms(place("d", "decode", running=3), 50) == 50 + 3 * 3, "three chunks, each with three sequences"
    assert computing_ms(place("d", "decode"), 50) == 50 == computing_ms(place("p", "prefill", running=3), 50)
    slow = dataclasses.replace(RATES, prefill_step_ms=7.0)
    assert computing_ms(dataclasses.replace(place("d", "decode", running=3), rates=slow), 50) == 50 + 3 * (7 + 3)
    many = place("d", "decode", running=16)
    assert computing_ms(many, 88) == 88 + 2 * 16, "chunks of 44 tokens"
    short = dataclasses.replace(many, worker=msgspec.structs.replace(many.worker, step_tokens=38))
    assert computing_ms(short, 88) == 88 + 4 * 16, "a step has room for 22 of them"
    placed = dataclasses.replace(place("d", "decode"), placed=2)
    assert computing_ms(placed, 50) == 50 + 3 * 2, "those that it has not reported yet count, too"


def test_the_decode_worker_takes_prompts_when_the_queue_is_long():
    decode = place("d", "decode", running=4)
    queues = range(0, 400, 5)
    taken = [local(100, [decode, place("p", "prefill", queued=queued)]) for queued in queues]
    # 5 chunks of 24 ms, where the prefill worker needs 100 ms and what is queued.
    assert taken == [100 + queued > DEFAULT_WEIGHTS.beside * 120 for queued in queues]
    behind = dataclasses.replace(decode, prompt_tokens=100, reserved_tokens=100)
    assert not local(100, [behind, place("p", "prefill", queued=100)]), "its own queue counts"
    assert local(100, [behind, place("p", "prefill", queued=400)])


def test_a_report_of_a_queue_that_may_be_gone_is_not_enough():
    idle = place("p", "prefill")
    reported = dataclasses.replace(idle, load=WorkerLoad(queued_tokens=5000))
    assert not local(100, [place("d", "decode", running=4), reported])


def test_what_it_holds_counts():
    queue = place("p", "prefill", queued=20)
    assert not local(100, [place("d", "decode", running=4), queue])
    assert local(100, [place("d", "decode", running=4, held=40), queue])
    assert not local(100, [place("d", "decode", running=4, held=40), place("p", "prefill", queued=50, held=80)])


def test_what_roles_were_given_and_displace_is_not_compared():
    decode, prefill = place("d", "decode", running=4), place("p", "prefill", queued=20, given_ms=1e6)
    assert not local(100, [decode, prefill])
    assert not local(100, [decode, prefill], hit_share=0.9), "a hand-off displaces pages twice; time decides"
    prefill = place("p", "prefill", queued=200)
    assert local(100, [dataclasses.replace(decode, given_ms=1e6), prefill])


@st.composite
def fleets(draw: Any, most_queued: int = 2000) -> list[Candidate]:
    """One to three workers of each role, with what they have to do."""

    def some(role: str) -> list[Candidate]:
        return [
            place(
                f"{role}{number}",
                role,
                queued=draw(st.integers(0, most_queued)) if role == "prefill" else draw(st.integers(0, 200)),
                running=draw(st.integers(0, 40)) if role == "decode" else 0,
                held=draw(st.integers(0, 300)),
                given_ms=draw(st.floats(0.0, 1e4)),
            )
            for number in range(draw(st.integers(1, 3)))
        ]

    return some("decode") + some("prefill")


HIT_SHARES = st.sampled_from([0.0, 0.3, 0.9])


@given(fleets(), st.integers(1, 1000), HIT_SHARES, st.integers(0, 2), st.integers(1, 2000))
def test_a_longer_queue_never_speaks_against_the_decode_worker(
    fleet: list[Candidate], tokens: int, hit_share: float, which: int, more: int
):
    if local(tokens, fleet, hit_share):
        prefillers = [c for c in fleet if c.worker.role == "prefill"]
        one = prefillers[which % len(prefillers)]
        longer = dataclasses.replace(
            one, reserved_tokens=one.reserved_tokens + more, prompt_tokens=one.prompt_tokens + more
        )
        assert local(tokens, [longer if c is one else c for c in fleet], hit_share)


@given(fleets(most_queued=0), st.integers(1, 1000), HIT_SHARES)
def test_without_a_queue_every_prompt_is_handed_off(fleet: list[Candidate], tokens: int, hit_share: float):
    if all(c.held_tokens < tokens for c in fleet if c.worker.role == "decode"):
        assert not local(tokens, fleet, hit_share)


@given(fleets(), st.integers(1, 1000))
def test_far_behind_enough_the_prefill_workers_get_nothing(fleet: list[Candidate], tokens: int):
    drowned = [
        dataclasses.replace(c, reserved_tokens=1_000_000, prompt_tokens=1_000_000) if c.worker.role == "prefill" else c
        for c in fleet
    ]
    assert local(tokens, drowned)
    found = quickest(RequestFacts(tokens), drowned)
    assert found is not None and found.prefill is None


@given(fleets(), st.integers(1, 1000))
def test_the_quickest_knows_both_ways(fleet: list[Candidate], tokens: int):
    facts = RequestFacts(tokens)
    found = quickest(facts, fleet)
    assert found is not None
    decoders, prefillers = ([c for c in fleet if c.worker.role == role] for role in ("decode", "prefill"))
    soonest = min(expected(facts, d, c).ttft_ms for d in decoders for c in (d, *prefillers))
    if all(d.held_tokens < tokens for d in decoders):
        assert of_placement(facts, found, fleet).ttft_ms == pytest.approx(soonest)


def test_a_decode_worker_that_never_computed_a_prompt_is_like_the_prefill_workers():
    fleet = Fleet()
    for one in (worker("p", "tcp://127.0.0.1:1", role="prefill"), worker("d", "tcp://127.0.0.1:2")):
        fleet.connected(one.address, one, 0.0)
    fleet.report("tcp://127.0.0.1:1", WorkerLoad(rates=MeasuredRates(prefill_tokens_per_s=500.0)), 0.0)
    fleet.report("tcp://127.0.0.1:2", WorkerLoad(rates=MeasuredRates(decode_step_ms=7.0)), 0.0)
    fleet.measure()
    rates = {c.worker.incarnation: c.rates for c in fleet.candidates({}, 1.0)}
    assert rates["d"].prefill_tokens_per_s == 500.0 and rates["d"].decode_step_ms == 7.0
