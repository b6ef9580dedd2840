"""Routing policies: each rule with the smallest fleet that shows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.config import ROUTING_POLICIES
from penstock.common.errors import ConfigError
from penstock.common.messages import WorkerLoad
from penstock.router.cost import CostPolicy
from penstock.router.policies import POLICIES, make_policy
from penstock.router.policy import (
    DECODE_TOKENS,
    Candidate,
    Moving,
    Placement,
    Policy,
    RequestFacts,
    moved,
)
from penstock.router.rates import WorkerRates
from penstock.router.shares import MOST_OWED_MS, WorkShares
from tests.worker_info import worker_info


def candidate(
    name: str, role: str = "decode", held: int = 0, reserved: int = 0, fingerprint: str = "f", **load: Any
) -> Candidate:
    worker = worker_info(name, f"{name}-1", role, fingerprint=fingerprint, max_model_len=1 << 20)
    return Candidate(worker, WorkerLoad(**load), held, reserved)


def names(placement: Placement | None) -> tuple[str, str | None] | None:
    if placement is None:
        return None
    return placement.decode.worker_id, placement.prefill.worker_id if placement.prefill else None


FACTS = RequestFacts(1000)


def choose(facts: RequestFacts, fleet: list[Candidate], minimum: int = 0) -> Placement | None:
    return CostPolicy().choose(facts, fleet, minimum)


def but(one: Candidate, **changes: Any) -> Candidate:
    return dataclasses.replace(one, **changes)


def test_nobody_there():
    assert choose(FACTS, []) is None
    assert choose(FACTS, [candidate("p", "prefill")]) is None, "every request ends on a decode worker"
    assert choose(FACTS, [candidate("d", draining=True)]) is None


def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt():
    placement = choose(FACTS, [candidate("d", held=400)])
    assert names(placement) == ("d", None) and placement is not None
    assert (placement.decode_tokens, placement.prefill_tokens) == (DECODE_TOKENS, 600)


def test_with_one_the_prefill_worker_does():
    placement = choose(FACTS, [candidate("d"), candidate("p", "prefill", held=100)])
    assert names(placement) == ("d", "p") and placement is not None
    assert (placement.decode_tokens, placement.prefill_tokens) == (DECODE_TOKENS, 900)


def test_short_or_mostly_cached_prompts_stay_local():
    prefill = candidate("p", "prefill")
    assert names(choose(FACTS, [candidate("d", held=900), prefill], 128)) == ("d", None)
    assert names(choose(FACTS, [candidate("d", held=800), prefill], 128)) == ("d", "p")
    assert names(choose(RequestFacts(127), [candidate("d"), prefill], 128)) == ("d", None)
    assert names(choose(FACTS, [candidate("d", held=1000), prefill])) == ("d", None), "nothing to compute"


def test_the_longest_prefix_wins_until_its_queue_outweighs_it():
    assert names(choose(FACTS, [candidate("a"), candidate("b", held=500)])) == ("b", None)
    assert names(choose(FACTS, [candidate("a"), candidate("b", held=500, queued_tokens=499)])) == ("b", None)
    assert names(choose(FACTS, [candidate("a"), candidate("b", held=500, queued_tokens=501)])) == ("a", None)
    assert names(choose(FACTS, [candidate("a"), candidate("b", held=500, reserved=501)])) == ("a", None)


def test_report_and_reservations_speak_of_the_same_requests():
    assert candidate("a", queued_tokens=300, reserved=200).queued_tokens == 300
    assert candidate("a", queued_tokens=100, reserved=200).queued_tokens == 200


def test_only_pairs_of_one_fingerprint():
    decoders = [candidate("d1", fingerprint="x"), candidate("d2", queued_tokens=10_000)]
    prefill = candidate("p", "prefill")
    assert names(choose(FACTS, [*decoders, prefill])) == ("d1", None), "d1 computes alone rather than wait at d2"
    assert names(choose(FACTS, [decoders[1], prefill])) == ("d2", "p")
    busy = [candidate("d1", fingerprint="x", queued_tokens=10_000), candidate("d2")]
    assert names(choose(FACTS, [*busy, prefill])) == ("d2", "p")


def test_the_prefill_worker_with_prefix_and_without_queue():
    p1, p2 = candidate("p1", "prefill"), candidate("p2", "prefill", held=600, queued_tokens=500)
    assert names(choose(FACTS, [but(candidate("d"), prompt_tokens=100), p1, p2])) == ("d", "p2")
    p2 = candidate("p2", "prefill", held=600, queued_tokens=700)
    assert names(choose(FACTS, [but(candidate("d"), prompt_tokens=100), p1, p2])) == ("d", "p1")


def test_a_retry_avoids_who_failed_it_if_there_is_another():
    retry = RequestFacts(1000, frozenset({"a-1", "p-1"}))
    assert names(choose(retry, [candidate("a", held=1000), candidate("b", queued_tokens=5000)])) == ("b", None)
    assert names(choose(retry, [candidate("a"), candidate("b", draining=True)])) == ("a", None)
    assert names(choose(retry, [candidate("a"), candidate("p", "prefill")])) == ("a", "p")
    better = candidate("p", "prefill", held=900)
    assert names(choose(retry, [candidate("b"), better, candidate("q", "prefill")])) == ("b", "q")
    apart = RequestFacts(1000, avoid_pairs=frozenset({("p-1", "b-1")}))
    assert names(choose(apart, [candidate("b"), better, candidate("q", "prefill")])) == ("b", "q")
    assert names(choose(apart, [candidate("b"), better])) == ("b", None)


@pytest.mark.parametrize("name", ["round-robin", "least-load", "longest-prefix", "cost"])
def test_equal_workers_share_a_burst(name: str):
    policy = make_policy(name)
    reserved = {"a": 0, "b": 0, "c": 0}
    counts = dict.fromkeys(reserved, 0)
    for _ in range(30):
        fleet = [candidate(worker, reserved=tokens) for worker, tokens in reserved.items()]
        placement = policy.choose(RequestFacts(100), fleet)
        assert placement is not None
        reserved[placement.decode.worker_id] += placement.decode_tokens + placement.prefill_tokens
        counts[placement.decode.worker_id] += 1
    assert counts == {"a": 10, "b": 10, "c": 10}


fleets = st.lists(
    st.builds(
        lambda i, role, held, reserved, queued, draining, fp: candidate(
            f"w{i}", role, held, reserved, fp, queued_tokens=queued, draining=draining
        ),
        st.integers(0, 999),
        st.sampled_from(["prefill", "decode"]),
        st.integers(0, 2000),
        st.integers(0, 5000),
        st.integers(0, 5000),
        st.booleans(),
        st.sampled_from(["f", "g"]),
    ),
    max_size=6,
    unique_by=lambda c: c.worker.incarnation,
)


@pytest.mark.parametrize("name", POLICIES)
@given(fleets, st.integers(1, 1500), st.integers(0, 500))
def test_whatever_the_fleet(name: str, fleet: list[Candidate], tokens: int, minimum: int):
    placement = make_policy(name, seed=1).choose(RequestFacts(tokens), fleet, minimum)
    fit = {c.worker.incarnation: c for c in fleet if not c.load.draining}
    if placement is None:
        assert not [c for c in fit.values() if c.worker.role == "decode"]
        return
    decode = fit[placement.decode.incarnation]
    assert decode.worker.role == "decode" and placement.decode_tokens == DECODE_TOKENS and placement.source is None
    computing = decode
    if placement.prefill is not None:
        computing = fit[placement.prefill.incarnation]
        assert computing.worker.role == "prefill" and computing.worker.fingerprint == decode.worker.fingerprint
        assert tokens - decode.held_tokens >= max(1, minimum)
    assert placement.prefill_tokens == max(0, tokens - computing.held_tokens)


@given(fleets, st.integers(1, 1500))
def test_the_choice_is_one_of_the_fleets_pairs_taken_alone(fleet: list[Candidate], tokens: int):
    """Leaving out everybody else changes nothing: no choice depends on workers that are not chosen."""
    placement = CostPolicy().choose(RequestFacts(tokens), fleet)
    if placement is not None:
        chosen = {placement.decode.incarnation, placement.prefill and placement.prefill.incarnation}
        assert (
            CostPolicy().choose(RequestFacts(tokens), [c for c in fleet if c.worker.incarnation in chosen]) == placement
        )


def test_every_policy_has_a_name_that_the_configuration_takes():
    assert set(POLICIES) == set(ROUTING_POLICIES)
    assert all(make_policy(name).name == name and isinstance(make_policy(name), Policy) for name in POLICIES)
    with pytest.raises(ConfigError, match="'costs'; there are random, round-robin"):
        make_policy("costs")


def test_what_sets_the_simple_policies_apart():
    fleet = [candidate("a", queued_tokens=10), candidate("b", held=500, queued_tokens=5000), candidate("c", held=100)]
    assert names(make_policy("least-load").choose(FACTS, fleet)) == ("c", None)
    assert names(make_policy("longest-prefix").choose(FACTS, fleet)) == ("b", None)
    turns = make_policy("round-robin")
    assert [names(turns.choose(FACTS, fleet)) for _ in range(4)] == [("a", None), ("b", None), ("c", None), ("a", None)]
    drawn = [names(make_policy("random", seed).choose(FACTS, fleet)) for seed in range(20)]
    assert len(set(drawn)) == 3 and drawn == [
        names(make_policy("random", seed).choose(FACTS, fleet)) for seed in range(20)
    ]


def test_a_prefix_is_read_where_that_is_cheaper_than_computing_or_waiting():
    holder, idle = candidate("a", held=800, queued_tokens=2000), candidate("b")
    read = CostPolicy(fetch=True).choose(FACTS, [holder, idle])
    assert names(read) == ("b", None) and read is not None and read.source == holder.worker
    assert (read.source_tokens, read.prefill_tokens) == (800, 200)
    slow = dataclasses.replace(WorkerRates(), link_bytes_per_s=1.0)
    over_a_slow_link = CostPolicy(fetch=True).choose(FACTS, [but(holder, rates=slow), idle])
    assert over_a_slow_link is not None and over_a_slow_link.source is None, "the slower end counts"
    elsewhere = CostPolicy(fetch=True).choose(FACTS, [candidate("a", "prefill", 800, fingerprint="x"), idle])
    assert elsewhere is not None and elsewhere.source is None, "another model's pages"


def test_workers_get_what_fits_into_their_context():
    long, short = candidate("long", queued_tokens=50_000), candidate("short")
    prefill = candidate("prefill", "prefill")
    long = but(long, worker=msgspec.structs.replace(long.worker, max_model_len=1100))
    short = but(short, worker=msgspec.structs.replace(short.worker, max_model_len=1099))
    prefill = but(prefill, worker=msgspec.structs.replace(prefill.worker, max_model_len=1001))
    whole = RequestFacts(1000, most_tokens=1100)
    assert names(choose(whole, [long, short, prefill])) == ("long", "prefill")
    assert names(choose(RequestFacts(1000, most_tokens=1099), [long, short, prefill])) == ("short", "prefill")
    assert names(choose(RequestFacts(1001, most_tokens=1099), [short, prefill])) == ("short", None)
    assert names(choose(whole, [short])) == ("short", None), "there is no other, and it may still stop before"
    avoiding = RequestFacts(1000, frozenset({"long-1"}), most_tokens=1100)
    assert names(choose(avoiding, [long, short])) == ("long", None)


def kept(tokens: int, num_tokens: int = 101, held: int = 0, minimum: int = 0) -> Placement:
    """Where a request goes that moves from "old", which keeps the pages of so many tokens."""
    there = choose(RequestFacts(num_tokens), [candidate("d"), candidate("p", "prefill", held=held)], minimum)
    assert there is not None
    return moved(there, Moving(candidate("old").worker, tokens, "d-1"), num_tokens)


def test_what_a_draining_worker_keeps_goes_with_its_requests():
    whole = kept(100)  # pages of four
    assert names(whole) == ("d", None) and whole.source is not None and whole.source.worker_id == "old"
    assert (whole.source_tokens, whole.prefill_tokens) == (100, 1)
    assert whole.prefill_ms == whole.rates.prefill_ms(1)
    half = kept(48)
    assert names(half) == ("d", "p") and half.source is not None
    assert (half.source_tokens, half.prefill_tokens) == (48, 53)
    nothing = kept(0)
    assert names(nothing) == ("d", "p") and nothing.source is None and nothing.prefill_tokens == 101
    assert half.prefill_ms == pytest.approx(nothing.prefill_ms * 53 / 101)
    there_already = kept(48, held=60)
    assert there_already.source is None and there_already.prefill_tokens == 41, "more than was kept"
    by_a_page, within_one = kept(96), kept(97)
    assert names(by_a_page) == ("d", "p") and names(within_one) == ("d", None)
    all_of_it = kept(104)
    assert (all_of_it.source_tokens, all_of_it.prefill_tokens) == (100, 1), "the last token is always computed"
    for old in (candidate("other", fingerprint="x"), candidate("d")):
        there = choose(RequestFacts(101), [candidate("d")])
        assert there is not None and moved(there, Moving(old.worker, 48, "d-1"), 101) == there, "nothing to read there"
    beside = kept(48, minimum=1000)
    assert names(beside) == ("d", None) and (beside.source_tokens, beside.prefill_tokens) == (48, 53)


def test_each_term_decides_between_workers_that_are_alike_else():
    a, b = candidate("a"), candidate("b")
    assert names(choose(FACTS, [a, b])) == ("a", None)
    no_decoding = WorkerRates(decode_sequence_ms=0.0, decode_context_ms=0.0)  # a step takes what it takes
    one = dict(running=1, num_pages=100_000)
    idle = but(b, load=WorkerLoad(free_pages=100_000, **one))
    long_contexts = but(a, load=WorkerLoad(free_pages=50_000, **one))
    assert names(choose(FACTS, [long_contexts, idle])) == ("b", None), "decode"
    terms = {
        "slots": but(a, load=WorkerLoad(running=8, num_pages=1000, free_pages=1000), rates=no_decoding),
        "pages": but(a, load=WorkerLoad(running=1, num_pages=300, free_pages=200), rates=no_decoding),
        "share": but(a, given_ms=1000.0),
        "rate": but(a, rates=WorkerRates(prefill_tokens_per_s=1000.0)),
    }
    for term, dearer in terms.items():
        assert names(choose(FACTS, [dearer, b])) == ("b", None), term


def test_what_is_displaced_counts_as_often_as_prompts_hit():
    holder, idle = candidate("a", held=500, queued_tokens=900), candidate("b")
    assert names(choose(FACTS, [holder, idle])) == ("b", None), "900 tokens of queue for 500 of prefix"
    assert names(choose(RequestFacts(1000, hit_share=0.5), [holder, idle])) == ("a", None), "or 500 displaced elsewhere"


def test_rates_are_numbers_that_end():
    rates = WorkerRates(prefill_tokens_per_s=2000.0, link_bytes_per_s=1e9, link_setup_ms=1.0)
    assert rates.prefill_ms(500) == 250.0 and rates.move_ms(2e6) == 3.0
    for wrong in (-1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"prefill_tokens_per_s|above 0"):
            WorkerRates(prefill_tokens_per_s=wrong)


def test_shares_only_compare_and_nobody_is_owed_for_ever():
    shares = WorkShares()
    shares.join("a")
    shares.join("b")
    shares.give("a", 100.0)
    shares.join("c")
    assert (shares.of("a"), shares.of("b"), shares.of("c")) == (100.0, 0.0, 50.0), "who joins starts at the mean"
    shares.give("a", 10 * MOST_OWED_MS)
    mean_ms = (100.0 + 10 * MOST_OWED_MS + 50.0) / 3
    assert shares.of("b") == pytest.approx(mean_ms - MOST_OWED_MS)
    shares.give("gone", 5.0)
    shares.keep({"b", "c"})
    assert (shares.of("b"), shares.of("c")) == (0.0, 50.0), "what is owed counts against those that are there"
    shares.keep(())
    shares.join("b")
    assert shares.of("b") == 0.0
