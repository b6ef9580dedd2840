"""GET /fleet and the page at /ui, over the fake service."""

from __future__ import annotations

from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.router.fleet_view import fleet_view
from tests.router.fake_router import Router, running
from tests.worker_info import worker_info


def worker(name: str, role: str) -> WorkerInfo:
    return worker_info(
        name, f"{name}/1", role, address="tcp://h:1", page_size=16, page_bytes=2048, max_model_len=64,
        status_url="http://h:2", version="1",
    )  # fmt: skip


def test_prefill_workers_first_then_by_name() -> None:
    loads = [
        (worker(name, role), WorkerLoad()) for name, role in (("d1", "decode"), ("d0", "decode"), ("p", "prefill"))
    ]
    found = fleet_view(["m"], {"in_flight": 2}, loads, 5.0)
    assert [w["worker_id"] for w in found["workers"]] == ["p", "d0", "d1"]
    assert found["time_s"] == 5.0 and found["router"] == {"in_flight": 2} and found["models"] == ["m"]


def test_what_it_says_of_a_worker() -> None:
    load = WorkerLoad(
        running=3, waiting=2, queued_tokens=70, num_pages=100, free_pages=60, lent_pages=5, quarantined_pages=1,
        draining=True, steps=9, prompt_tokens=80, prefix_queries=50, prefix_hits=20, transfer_bytes=4096,
        transports={"prefill-0": "nixl"},
    )  # fmt: skip
    (found,) = fleet_view(["m"], {}, [(worker("d", "decode"), load)], 0.0)["workers"]
    assert found["pages"] == {
        "size_tokens": 16, "size_bytes": 2048, "total": 100, "held": 40, "lent": 5, "quarantined": 1,
    }  # fmt: skip
    assert (found["running"], found["waiting"], found["queued_tokens"], found["draining"]) == (3, 2, 70, True)
    assert (found["state"], found["reason"]) == ("draining", "")
    assert found["transports"] == {"prefill-0": "nixl"}
    assert found["totals"]["prefix_hits"] == 20 and found["totals"]["transfer_bytes"] == 4096


def test_before_its_first_report_a_worker_holds_nothing() -> None:
    (found,) = fleet_view(["m"], {}, [(worker("d", "decode"), WorkerLoad())], 0.0)["workers"]
    assert found["pages"]["held"] == 0 and found["pages"]["total"] == 100


def test_the_route(router: Router) -> None:
    found = router.http.get("/fleet").json()
    assert [w["worker_id"] for w in found["workers"]] == ["decode-0"]
    assert found["workers"][0]["pages"]["held"] == 25
    assert found["router"]["retries"] == 4
    assert (found["workers"][0]["state"], found["workers"][0]["reason"]) == ("stalled", "no step for 30 s")
    assert found["broken_pairs"] == [{"prefill": "prefill-0", "decode": "decode-0", "retry_in_s": 1.2}]


def test_the_page_brings_all_it_needs(router: Router) -> None:
    assert router.http.get("/", follow_redirects=False).headers["location"] == "/ui"
    page = router.http.get("/ui")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text, "nothing is loaded from elsewhere"


def test_addresses_are_for_those_with_a_key() -> None:
    with running(api_key=("secret",)) as router:
        assert router.http.get("/fleet").status_code == 401
        assert router.http.get("/fleet", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert router.http.get("/ui").status_code == 200
