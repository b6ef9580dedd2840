"""Rates measured from steps and reads: the truth is found, never nonsense, and soon again after it has changed."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.least_squares import LeastSquares
from penstock.common.messages import MeasuredRates
from penstock.common.rate_estimator import WARM_UP_STEPS, RateEstimator
from penstock.router.rates import H200_LLAMA8B, measured

COEFFICIENT = st.floats(0.0, 1e3)
POINT = st.tuples(*[st.floats(0.0, 1e4)] * 3)


@given(st.lists(COEFFICIENT, min_size=3, max_size=3), st.integers(0, 1000))
def test_the_coefficients_of_exact_points_are_found(truth, seed):
    fit, chance = LeastSquares(3, 100.0), random.Random(seed)
    for _ in range(30):
        x = (1.0, chance.uniform(0, 500), chance.uniform(0, 20))
        fit.observe(x, sum(c * a for c, a in zip(truth, x, strict=True)))
    largest = max(truth) * 500 + 1e-9
    for scale, found, true in zip((1, 500, 20), fit.solve(), truth, strict=True):
        assert abs(found - true) * scale <= 1e-3 * largest


@given(st.lists(st.tuples(POINT, st.floats(0.0, 1e6)), max_size=40))
def test_whatever_is_observed_no_coefficient_is_negative_or_without_bounds(points):
    fit = LeastSquares(3, 10.0)
    for x, y in points:
        fit.observe(x, y)
        found = fit.solve()
        assert all(math.isfinite(c) and c >= 0 for c in found)


@given(st.floats(0.1, 100.0), st.integers(1, 50))
def test_features_that_always_come_together_still_predict(ms, tokens):
    fit = LeastSquares(3, 50.0)
    for _ in range(10):
        fit.observe((1.0, tokens, 2.0 * tokens), ms)
    assert sum(c * a for c, a in zip(fit.solve(), (1.0, tokens, 2.0 * tokens), strict=True)) == pytest.approx(
        ms, rel=1e-4
    )


@pytest.mark.parametrize("point", [((1.0,), 2.0), ((1.0, math.nan), 2.0), ((1.0, 2.0), math.inf)])
def test_points_that_are_none_are_refused(point):
    with pytest.raises(ValueError, match="not a point"):
        LeastSquares(2, 10.0).observe(*point)


def play(estimator: RateEstimator, steps: int, seed: int = 0, slower: float = 1.0) -> None:
    """Steps of a worker with 2 ms + 1 ms for prompts + 0.1 ms a prompt token + 0.05 ms a sequence + 1e-4 a context."""
    chance = random.Random(seed)
    for _ in range(steps):
        sequences, prompt = chance.randrange(1, 20), chance.choice((0, 0, chance.randrange(1, 200)))
        context = sequences * chance.randrange(10, 500)
        ms = 2 + (prompt > 0) + 0.1 * prompt + 0.05 * sequences + 1e-4 * context
        estimator.step(prompt + sequences, sequences, context, slower * ms / 1e3)


def test_a_worker_finds_its_own_speed():
    estimator = RateEstimator()
    play(estimator, WARM_UP_STEPS)
    assert estimator.rates() == MeasuredRates(), "the first steps say nothing"
    play(estimator, 400)
    for size in (1000, 50_000, 3000, 200_000):
        estimator.read(size, 1e-3 + size / 1e8)
    found = estimator.rates()
    expected = MeasuredRates(
        prefill_tokens_per_s=10_000.0, prefill_step_ms=3.0, decode_step_ms=2.0, decode_sequence_ms=0.05,
        decode_context_ms=1e-4, link_bytes_per_s=1e8, link_setup_ms=1.0,
    )  # fmt: skip
    for name in MeasuredRates.__struct_fields__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0.02), name
    assert estimator.rates() is found, "nothing new, nothing computed"


def test_a_change_of_speed_is_followed_and_a_stop_is_not():
    estimator = RateEstimator()
    play(estimator, 1000)
    before = measured(estimator.rates(), H200_LLAMA8B).step_ms(10, 2500)
    estimator.step(10, 10, 2500, 60.0)  # the process was stopped for a minute
    assert measured(estimator.rates(), H200_LLAMA8B).step_ms(10, 2500) == pytest.approx(before, rel=0.05)
    play(estimator, 4000, seed=1, slower=3.0)
    assert estimator.rates().prefill_tokens_per_s == pytest.approx(10_000 / 3, rel=0.05)


def test_what_has_not_happened_is_not_known():
    prefill, decode = RateEstimator(), RateEstimator()
    for tokens in range(2, 100):
        prefill.step(tokens, 1, 100, 1e-3 * tokens)
        decode.step(3, 3, 100, 5e-3)
    assert prefill.rates().decode_step_ms == 0 and prefill.rates().prefill_tokens_per_s == pytest.approx(1000, rel=0.01)
    assert decode.rates().prefill_tokens_per_s == 0
    rates = decode.rates()
    step = rates.decode_step_ms + 3 * rates.decode_sequence_ms + 100 * rates.decode_context_ms
    assert step == pytest.approx(5.0, rel=1e-3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(rates), type=MeasuredRates) == rates


def test_prompts_that_are_all_alike_cost_by_their_tokens():
    """Nothing tells then what a step takes beside them; a queue of ten takes ten times as long all the same."""
    estimator = RateEstimator()
    for _ in range(WARM_UP_STEPS + 50):
        estimator.step(2048, 1, 2048, 0.048)
        estimator.read(1 << 28, 0.008)
    found = measured(estimator.rates(), H200_LLAMA8B)
    assert found.prefill_ms(2048) == pytest.approx(48, rel=0.05)
    assert found.prefill_ms(20_480) == pytest.approx(480, rel=0.1)
    assert found.move_ms(10 << 28) == pytest.approx(80, rel=0.05)


def test_chunks_that_are_all_alike_beside_decodes_are_told_from_them():
    estimator, chance = RateEstimator(), random.Random(1)
    for number in range(600):
        sequences, chunk = chance.randrange(10, 30), 160 if number % 5 == 0 else 0
        ms = (7.0 if chunk else 4.4) + 0.1 * sequences
        estimator.step(chunk + sequences, sequences + (chunk > 0), 2000 * sequences, ms / 1e3)
    found = measured(estimator.rates(), H200_LLAMA8B)
    assert found.prefill_ms(160) == pytest.approx(7.0, rel=0.05) and found.step_ms(20, 40_000) == pytest.approx(
        6.4, 0.05
    )
