"""The virtual fleet: times computed by hand, that nothing is lost whatever comes, that leaving out is exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.errors import ConfigError
from penstock.router.policies import POLICIES, make_policy
from penstock.router.policy import Candidate, Placement, Policy, RequestFacts, placement
from penstock.router.rates import WorkerRates
from penstock.simulate.fleet_view import FleetView
from penstock.simulate.result import Slo, oracle_hits
from penstock.simulate.runs import balance_bounds, compare, scaled
from penstock.simulate.simulator import FleetShape, Simulator
from penstock.simulate.trace import TracedRequest
from penstock.simulate.worker import StepTimes

# A token of a prompt takes 1 ms to compute and 0.1 ms to move; a step takes 10 ms, and 1 ms for each sequence.
RATES = WorkerRates(1000.0, 10.0, 1.0, 0.0, 1e6, 0.0)
PAGES = (0, 1, 2, 3, 4)


def shape(workers: int = 1, pages: int = 100, prefill: int = 0, seqs: int = 8) -> FleetShape:
    return FleetShape(workers, pages, 10, prefill, seqs, token_bytes=100, rates=RATES)


def ask(at_ms: float, tokens: int = 50, output: int = 3, pages: tuple[int, ...] = ()) -> TracedRequest:
    return TracedRequest(at_ms, tokens, output, pages)


class Scripted(Policy):
    """Places each request as told: (worker, worker whose pages it reads or None)."""

    name = "scripted"
    sees_all = True

    def __init__(self, *places: tuple[int, int | None]) -> None:
        self._places = list(places)

    def choose(
        self, facts: RequestFacts, candidates: Sequence[Candidate], min_remote_prefill_tokens: int = 0
    ) -> Placement:
        at, source = self._places.pop(0)
        holder = None if source is None else dataclasses.replace(candidates[source], held_tokens=facts.num_tokens)
        return placement(facts, candidates[at], None, holder)


def test_one_request_computes_then_decodes():
    result = Simulator(shape(), make_policy("cost")).run([ask(5.0)], Slo(50.0, 11.0))
    assert result.ttft_mean_ms == pytest.approx(50.0)
    assert result.span_s == pytest.approx(0.005 + 0.05 + 2 * 0.011), "one step a token after the first"
    assert result.itl_p99_ms == pytest.approx(11.0, rel=0.01)
    assert result.goodput == pytest.approx(1 / result.span_s) and result.slo_attainment == 1.0
    late = Simulator(shape(), make_policy("cost")).run([ask(5.0)], Slo(49.0, 11.0))
    assert late.slo_attainment == 0.0 == late.goodput


def test_prompts_queue_and_the_batch_moves_on_with_every_chunk():
    result = Simulator(shape(), make_policy("cost")).run([ask(0.0), ask(0.0)], Slo())
    # The second prompt's only chunk is also a step of the first request: 51 ms; then both step once, and one is left.
    assert result.ttft_mean_ms == pytest.approx((50 + 101) / 2)
    assert result.span_s == pytest.approx(0.101 + 0.012 + 0.011)


def test_a_prompt_begins_when_the_step_under_way_has_ended():
    result = Simulator(shape(), make_policy("cost")).run([ask(0.0, output=30), ask(65.0)], Slo())
    # Steps of 11 ms end at 61 and 72; the second prompt's is also a step of the first request.
    assert result.ttft_mean_ms == pytest.approx((50 + (72 + 51 - 65)) / 2)


def test_chunks_are_shorter_beside_sequences_that_decode():
    fleet = dataclasses.replace(shape(), max_num_batched_tokens=40, mixed_chunk_tokens=10)
    result = Simulator(fleet, make_policy("cost")).run([ask(0.0, output=30), ask(0.0)], Slo())
    assert result.ttft_mean_ms == pytest.approx((50 + (50 + 5 * 11)) / 2), "two chunks alone, then five of ten tokens"
    slow_start = dataclasses.replace(fleet, rates=dataclasses.replace(RATES, prefill_step_ms=7.0))
    result = Simulator(slow_start, make_policy("cost")).run([ask(0.0, output=30), ask(0.0)], Slo())
    chunks = 5 * (10 + 7 + 1)  # a step with a chunk has the prompt's fixed time instead of the decode step's
    assert result.ttft_mean_ms == pytest.approx((50 + 2 * 7 + (50 + 2 * 7 + chunks)) / 2)


def test_a_held_prefix_is_not_computed_but_the_last_token_is():
    requests = [ask(0.0, pages=PAGES), ask(1000.0, pages=PAGES), ask(2000.0, tokens=40, pages=(0, 1, 9, 3))]
    simulator = Simulator(shape(), make_policy("cost"))
    result = simulator.run(requests, Slo())
    assert simulator.computed() == [50, 1, 20]
    assert result.hit_ratio == pytest.approx((49 + 20) / 140), "a run from the first page"
    assert result.ttft_mean_ms == pytest.approx((50 + 1 + 20) / 3)
    assert result.fetched_ratio == 0.0


def test_a_prefix_read_from_another_worker_takes_the_link_and_hits():
    requests = [ask(0.0, pages=PAGES), ask(1000.0, pages=PAGES), ask(1000.0, pages=PAGES), ask(2000.0, pages=PAGES)]
    run = Simulator(shape(3), Scripted((0, None), (1, 0), (2, 0), (1, None)))
    result = run.run(requests, Slo())
    # 5000 bytes at 1 MB/s; the second reader waits for the first at the holder's link. What was read stays.
    assert result.ttft_mean_ms == pytest.approx((50 + (5 + 1) + (10 + 1) + 1) / 4)
    assert result.hit_ratio == pytest.approx(3 * 49 / 200) and result.fetched_ratio == pytest.approx(2 * 49 / 200)


def test_two_phases_hand_off():
    requests = [ask(0.0, pages=PAGES), ask(1000.0, pages=PAGES)]
    result = Simulator(shape(2, prefill=1), make_policy("cost")).run(requests[:1], Slo())
    assert result.ttft_mean_ms == pytest.approx(50.0), "the first token does not wait for the pages"
    assert result.span_s == pytest.approx(0.05 + 0.005 + 2 * 0.011), "the second one does"
    again = Simulator(shape(2, prefill=1), make_policy("cost")).run(requests, Slo())
    assert again.span_s == pytest.approx(1.0 + 0.001 + 2 * 0.011), "what the decode worker holds it computes alone"


def test_only_the_last_steps_pages_move_when_the_prompt_is_computed():
    """5000 tokens in 5 s; their pages take 0.5 s, those of the last step of 2048 tokens 0.2 s."""
    result = Simulator(shape(2, prefill=1, pages=1000), make_policy("cost")).run([ask(0.0, tokens=5000)], Slo())
    assert result.ttft_mean_ms == pytest.approx(5000.0)
    assert result.span_s == pytest.approx(5.0 + 0.2048 + 2 * 0.011)


@pytest.mark.parametrize(("link_bytes_per_s", "steps"), [(1e6, 2), (1e4, 3)])
def test_a_long_beginning_is_one_step_where_its_pages_move_in_time(link_bytes_per_s: float, steps: int):
    rates = dataclasses.replace(RATES, link_bytes_per_s=link_bytes_per_s, prefill_step_ms=1.0)
    fleet = dataclasses.replace(shape(2, prefill=1, pages=1000), rates=rates)
    result = Simulator(fleet, make_policy("cost")).run([ask(0.0, tokens=5000)], Slo())
    assert result.ttft_mean_ms == pytest.approx(5000.0 + steps)


def test_an_output_counts_as_expected_as_twice_as_long_and_at_last_as_it_was():
    seen: list[float] = []

    class Watching(Scripted):
        sees_all = False

        def choose(self, facts: RequestFacts, candidates: Sequence[Candidate], *rest: int) -> Placement:
            by_name = sorted(candidates, key=lambda candidate: candidate.worker.worker_id)
            seen.append(by_name[0].given_ms)
            return super().choose(facts, by_name, *rest)

    # Its token 257 comes at 50 + 256 * 11 ms, token 513 at 50 + 512 * 11, the last one at 50 + 599 * 11.
    others = [ask(at_ms, output=1) for at_ms in (1.0, 2860.0, 2870.0, 5675.0, 5690.0, 6630.0, 6645.0)]
    watching = Watching((0, None), *[(1, None)] * len(others))
    Simulator(shape(2), watching).run([ask(0.0, output=600), *others], Slo())
    expected = [RATES.prefill_ms(50) + RATES.output_ms(50, tokens) for tokens in (256, 256, 512, 512, 1024, 1024, 600)]
    assert seen[0] == 0.0 and seen[1:] == pytest.approx(expected)


def test_a_request_waits_for_a_slot_and_for_pages():
    for fleet in (shape(seqs=1), shape(pages=10)):
        result = Simulator(fleet, make_policy("cost")).run([ask(0.0), ask(0.0)], Slo())
        assert result.ttft_mean_ms == pytest.approx((50 + 50 + 22 + 50) / 2), "until the first one has ended"
    with pytest.raises(ConfigError, match="needs 6 pages, a worker has 5"):
        Simulator(shape(pages=5), make_policy("cost")).run([ask(0.0)], Slo())


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (dict(workers=0), "workers must be at least 1"),
        (dict(max_num_batched_tokens=0), "max_num_batched_tokens must be at least 1"),
        (dict(mixed_chunk_tokens=0), "mixed_chunk_tokens must be at least 1"),
        (dict(pages_per_worker=0), "pages_per_worker must be at least 1"),
        (dict(prefill_workers=2), "from 0 to one less than the 2 workers"),
        (dict(prefill_workers=-1), "from 0 to one less than the 2 workers"),
    ],
)
def test_fleets_that_cannot_be(wrong: dict[str, int], error: str):
    with pytest.raises(ConfigError, match=error):
        FleetShape(**{"workers": 2, "pages_per_worker": 10} | wrong)


def test_the_oracle_is_one_cache():
    requests = [ask(0.0, pages=PAGES), ask(1.0, pages=(5, 6, 7, 8, 9)), ask(2.0, pages=PAGES)]
    assert oracle_hits(requests, 10, 10) == [0, 0, 49]
    assert oracle_hits(requests, 9, 10) == [0, 0, 40], "the last page of a prompt goes first"


def test_arrivals_are_stretched_to_a_utilisation():
    requests = [ask(0.0, output=11), ask(1000.0, output=11)]
    assert scaled(requests, shape(), None) == requests
    assert scaled(requests, shape(), 0.5)[1].arrival_ms == pytest.approx(2 * (50 + 10) / 0.5)
    assert scaled(requests, shape(2, prefill=1), 0.5)[1].arrival_ms == pytest.approx(2 * 50 / 0.5), "the busier role"
    assert balance_bounds(requests, [50, 50], shape(2)).known == pytest.approx(1.0)
    assert balance_bounds(requests, [50, 50], shape(3)).known > 1.4
    assert balance_bounds(requests, [50, 1], shape(2)).known > 1.4, "the second one had most of it"


def test_who_knows_more_balances_better():
    requests = [TracedRequest(0.0, tokens, 1) for tokens in (1000, 1000, 2000)]
    found = balance_bounds(requests, [1000, 1000, 2000], shape(2))
    assert found.foreseen == pytest.approx(1.0) and found.known == pytest.approx(1.5)
    long_outputs = [TracedRequest(0.0, 1000, output) for output in (5000, 1, 5000, 1)]
    blind = balance_bounds(long_outputs, [1000] * 4, shape(2))
    assert blind.guessed > 1.5 and blind.known < 1.1, "both long ones go to one worker"
    with pytest.raises(ConfigError, match="do not all arrive at once"):
        scaled(requests[:1], shape(), 0.5)


def test_step_times_weigh_tokens():
    times = StepTimes()
    assert times.quantile(0.5) == 0.0
    times.add(10.0, 98.0)
    times.add(200.0, 2.0)
    assert times.quantile(0.5) == pytest.approx(10.0, rel=0.01)
    assert times.quantile(0.99) == pytest.approx(200.0, rel=0.01)


@st.composite
def traces(draw: Callable[[st.SearchStrategy[int]], int]) -> list[TracedRequest]:
    """Requests whose prompts begin with a branch of a small tree of pages."""
    requests, now, own = [], 0.0, 100
    for _ in range(draw(st.integers(1, 30))):
        now += draw(st.sampled_from([0, 5, 80]))
        branch, depth, tail = draw(st.integers(0, 2)), draw(st.integers(0, 4)), draw(st.integers(0, 3))
        pages = (0, *(10 * branch + step + 1 for step in range(depth)), *range(own, own + tail))
        own += tail
        requests.append(TracedRequest(now, 10 * len(pages) - draw(st.integers(0, 9)), draw(st.integers(1, 20)), pages))
    return requests


@given(traces(), st.sampled_from(POLICIES), st.integers(1, 5), st.integers(0, 2), st.integers(10, 40), st.booleans())
def test_nothing_is_lost_whatever_comes(
    requests: list[TracedRequest], name: str, workers: int, prefill: int, pages: int, fetch: bool
):
    """`run` itself checks that every request ended and that nothing stays held, reserved or wrongly indexed."""
    fleet = shape(workers + prefill, pages, prefill, seqs=3)
    (result,) = compare(requests, fleet, [name], Slo(), fetch, seed=1)
    assert result.requests == len(requests) and 0.0 <= result.fetched_ratio <= result.hit_ratio < 1.0
    assert 1.0 <= result.max_over_mean_load <= max(workers, prefill) + 1e-9
    assert result.ttft_p50_ms <= result.ttft_p99_ms
    assert compare(requests, fleet, [name], Slo(), fetch, seed=1) == [result], "the same again"


@pytest.mark.parametrize(("name", "fetch"), [("least-load", False), ("longest-prefix", False), ("cost", True)])
def test_leaving_workers_out_changes_no_choice(name: str, fetch: bool, monkeypatch: pytest.MonkeyPatch):
    chosen, shown = [], []

    def both(self: FleetView, pages: Sequence[int], prompt_tokens: int) -> Placement:
        few = self.shortlist(pages)
        depths = {c.worker.incarnation: c.held_tokens // 10 for c in few}
        everyone = []
        for number in range(80):
            run = [depth for depth, mask in self._index.runs(pages, 1 << number) if mask]
            everyone.append(self.candidate(number, run[0]))
        assert all(depths.get(c.worker.incarnation, c.held_tokens // 10) == c.held_tokens // 10 for c in everyone)
        facts = self.facts(prompt_tokens)
        choice = self._policy.choose(facts, few)
        assert choice is not None
        full = self._policy.choose(facts, everyone)
        assert full is not None and (choice.decode, choice.prefill) == (full.decode, full.prefill)
        assert (choice.source is None, choice.source_tokens) == (full.source is None, full.source_tokens)
        chosen.append(choice.decode.worker_id)
        shown.append(len(few))
        return choice

    monkeypatch.setattr(FleetView, "choose", both)
    requests = [
        ask(20.0 * n, 60, 30, (0, 1 + n % 7, 10 + n % 23, 100 + n % 71, 1000 + n, 2000 + n)) for n in range(400)
    ]
    Simulator(shape(80, 1000), make_policy(name, fetch=fetch)).run(requests, Slo())
    assert len(set(chosen)) > 2 and sum(shown) / len(shown) < 20


def test_virtual_workers_say_what_their_steps_are() -> None:
    fleet = dataclasses.replace(shape(3, prefill=1), max_num_batched_tokens=600, mixed_chunk_tokens=50)
    told = Simulator(fleet, make_policy("cost"))._view.candidate(2).worker
    assert (told.role, told.step_tokens, told.mixed_chunk_tokens) == ("decode", 600, 50)
