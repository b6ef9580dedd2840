"""What a router takes for a worker's rates: its own, else those of others like it, else the defaults."""

from __future__ import annotations

import pytest

from penstock.common.messages import MeasuredRates, WorkerLoad
from penstock.router.fleet import Fleet
from penstock.router.rates import H200_LLAMA8B, measured, typical
from tests.router.test_fleet import ONE, TWO

PREFILL = MeasuredRates(prefill_tokens_per_s=1000.0, prefill_step_ms=4.0)
DECODE = MeasuredRates(decode_step_ms=10.0, decode_sequence_ms=0.5)


def test_only_what_was_measured_replaces_the_defaults():
    assert measured(MeasuredRates(), H200_LLAMA8B) is H200_LLAMA8B
    found = measured(DECODE, H200_LLAMA8B)
    assert (found.decode_step_ms, found.decode_sequence_ms, found.decode_context_ms) == (10.0, 0.5, 0.0)
    assert found.prefill_tokens_per_s == H200_LLAMA8B.prefill_tokens_per_s


def test_the_typical_worker_is_the_mean_of_those_that_know():
    slow = MeasuredRates(prefill_tokens_per_s=500.0, prefill_step_ms=6.0)
    found = typical([PREFILL, slow, MeasuredRates(), DECODE])
    assert (found.prefill_tokens_per_s, found.prefill_step_ms, found.decode_step_ms) == (750.0, 5.0, 10.0)
    assert typical([]) == H200_LLAMA8B
    assert found.prefill_ms(75) == 5.0 + 100.0 and found.prefill_ms(0) == 0.0


def test_a_new_worker_is_taken_to_be_like_the_others():
    fleet = Fleet()
    fleet.connected(ONE.address, ONE, 0.0)
    fleet.connected(TWO.address, TWO, 0.0)
    fleet.report(ONE.address, WorkerLoad(rates=PREFILL), 0.0)
    assert fleet.members[0].rates.prefill_tokens_per_s == 1000.0, "its own count at once"
    fleet.measure()
    assert [c.rates.prefill_tokens_per_s for c in fleet.candidates({}, 100.0)] == [1000.0, 1000.0]
    fleet.report(TWO.address, WorkerLoad(rates=MeasuredRates(prefill_tokens_per_s=50.0)), 0.0)
    assert [c.rates.prefill_ms(50) for c in fleet.candidates({}, 100.0)] == [pytest.approx(54.0), pytest.approx(1000.0)]
