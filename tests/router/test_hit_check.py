"""Predicted against realised hits: what is counted, what is not, and when somebody is warned."""

from __future__ import annotations

from penstock.common.messages import Spans
from penstock.router.hit_check import WARN_EVERY_S, WINDOW, HitCheck


def spans(cached: int, worker: str = "w") -> Spans:
    return Spans(worker=worker, cached_tokens=cached)


def window(check: HitCheck, held_pages: int, cached: int, now: float) -> list[str]:
    """A window of requests of 101 tokens in pages of 10."""
    warnings = []
    for i in range(WINDOW):
        check.predicted((f"r{i}", 0), 0, "w", held_pages, 10, 101)
        warnings.append(check.reported((f"r{i}", 0), 0, spans(cached), now))
    return [warning for warning in warnings if warning]


def test_each_request_counts_once_at_the_worker_that_computes_it() -> None:
    check = HitCheck()
    check.predicted(("r", 0), 1, "w", 3, 10, 101)
    for report in ((("r", 0), 0, spans(9)), (("r", 0), 1, spans(9, "other")), (("r", 1), 1, spans(9))):
        assert check.reported(*report, 0.0) == ""
    assert check.counters() == {"predicted_hit_tokens": 0, "realised_hit_tokens": 0, "missed_hit_tokens": 0}
    check.reported(("r", 0), 1, spans(20), 0.0)
    check.reported(("r", 0), 1, spans(20), 0.0)  # its last delta says it again
    assert check.counters() == {"predicted_hit_tokens": 30, "realised_hit_tokens": 20, "missed_hit_tokens": 10}
    check.predicted(("more", 0), 1, "w", 3, 10, 101)
    check.reported(("more", 0), 1, spans(90), 0.0)
    assert check.counters() == {"predicted_hit_tokens": 60, "realised_hit_tokens": 110, "missed_hit_tokens": 10}


def test_of_choices_that_find_what_their_first_one_computes_nothing_is_predicted() -> None:
    check = HitCheck()
    for choice, worker, cached in ((1, "w", 0), (0, "w", 100), (2, "other", 0), (1, "w", 0)):
        check.keep({("r", 1), ("r", 2)})
        check.predicted(("r", choice), 0, worker, 0, 10, 101)
        check.reported(("r", choice), 0, spans(cached, worker), 0.0)
    assert check.counters()["realised_hit_tokens"] == 0
    check.keep({})
    check.predicted(("r", 0), 1, "w", 10, 10, 101)
    check.reported(("r", 0), 1, spans(100), 0.0)
    assert check.counters()["realised_hit_tokens"] == 100


def test_a_prompt_that_is_cached_whole_is_computed_from_its_last_page() -> None:
    check = HitCheck()
    check.predicted(("r", 0), 0, "w", 10, 10, 100)
    check.reported(("r", 0), 0, spans(90), 0.0)
    assert check.counters()["predicted_hit_tokens"] == 90 and check.counters()["missed_hit_tokens"] == 0


def test_predictions_of_requests_that_have_ended_are_forgotten() -> None:
    check = HitCheck()
    for i in range(5):
        check.predicted((f"r{i}", 0), 0, "w", 1, 10, 100)
    check.keep({("r3", 0): "under way"})
    for i in range(5):
        check.reported((f"r{i}", 0), 0, spans(10), 0.0)
    assert check.counters()["predicted_hit_tokens"] == 10


def test_a_warning_when_they_part_and_not_for_little() -> None:
    check = HitCheck()
    assert window(check, 10, 100, 0.0) == [] and window(check, 5, 60, 0.0) == []
    (warning,) = window(check, 8, 0, 1.0)
    assert f"{80 * WINDOW} were predicted" in warning and "and 0 were" in warning
    assert window(check, 8, 0, 1.0 + WARN_EVERY_S / 2) == [], "not again and again"
    (warning,) = window(check, 0, 80, 2.0 + WARN_EVERY_S)
    assert f"and {80 * WINDOW} were" in warning
    assert f"{80 * WINDOW} tokens differ" in warning
