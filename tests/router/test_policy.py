"""Routing policy: each rule with the smallest fleet that shows it."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.router.policy import DECODE_TOKENS, Candidate, Placement, RequestFacts, choose


def candidate(
    name: str, role: str = "decode", held: int = 0, reserved: int = 0, fingerprint: str = "f", **load: Any
) -> Candidate:
    worker = WorkerInfo(
        worker_id=name,
        incarnation=f"{name}-1",
        role=role,
        address="tcp://127.0.0.1:1",
        fingerprint=fingerprint,
        model="m",
        served_models=["m"],
        page_size=4,
        num_pages=100,
        page_bytes=64,
        max_model_len=128,
        max_num_seqs=8,
        vocab_size=256,
    )
    return Candidate(worker, WorkerLoad(**load), held, reserved)


def names(placement: Placement | None) -> tuple[str, str | None] | None:
    if placement is None:
        return None
    return placement.decode.worker_id, placement.prefill.worker_id if placement.prefill else None


FACTS = RequestFacts(1000)


def test_nobody_there():
    assert choose(FACTS, []) is None
    assert choose(FACTS, [candidate("p", "prefill")]) is None, "every request ends on a decode worker"
    assert choose(FACTS, [candidate("d", draining=True)]) is None


def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt():
    placement = choose(FACTS, [candidate("d", held=400)])
    assert names(placement) == ("d", None) and placement is not None
    assert (placement.decode_tokens, placement.prefill_tokens) == (600 + DECODE_TOKENS, 0)


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
    assert names(choose(FACTS, [candidate("d"), p1, p2])) == ("d", "p2")
    p2 = candidate("p2", "prefill", held=600, queued_tokens=700)
    assert names(choose(FACTS, [candidate("d"), p1, p2])) == ("d", "p1")


def test_a_retry_avoids_who_failed_it_if_there_is_another():
    retry = RequestFacts(1000, frozenset({"a-1", "p-1"}))
    assert names(choose(retry, [candidate("a", held=1000), candidate("b", queued_tokens=5000)])) == ("b", None)
    assert names(choose(retry, [candidate("a"), candidate("b", draining=True)])) == ("a", None)
    assert names(choose(retry, [candidate("a"), candidate("p", "prefill")])) == ("a", "p")


def test_equal_workers_share_a_burst():
    reserved = {"a": 0, "b": 0, "c": 0}
    counts = dict.fromkeys(reserved, 0)
    for _ in range(30):
        placement = choose(RequestFacts(100), [candidate(name, reserved=tokens) for name, tokens in reserved.items()])
        assert placement is not None
        reserved[placement.decode.worker_id] += placement.decode_tokens
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


@given(fleets, st.integers(1, 1500), st.integers(0, 500))
def test_whatever_the_fleet(fleet: list[Candidate], tokens: int, minimum: int):
    placement = choose(RequestFacts(tokens), fleet, minimum)
    fit = {c.worker.incarnation: c for c in fleet if not c.load.draining}
    if placement is None:
        assert not [c for c in fit.values() if c.worker.role == "decode"]
        return
    decode = fit[placement.decode.incarnation]
    assert decode.worker.role == "decode" and placement.decode_tokens >= DECODE_TOKENS
    if placement.prefill is not None:
        prefill = fit[placement.prefill.incarnation]
        assert prefill.worker.role == "prefill" and prefill.worker.fingerprint == decode.worker.fingerprint
        assert tokens - decode.held_tokens >= max(1, minimum)
