"""Workers that a router cannot use: each is told of once, however often its link tries."""

from __future__ import annotations

import logging
import socket

import pytest

from penstock.common import peers
from penstock.common.messages import PROTOCOL_VERSION
from penstock.router.unfit import Unfit
from tests.router.services import play, running, until
from tests.worker_info import worker_info

ADDRESS = "tcp://h:1"


def test_one_that_dies_while_it_is_met_is_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    unfit = Unfit()
    for _ in range(2):
        unfit.refuse(ADDRESS, "handshake failed")
        assert not unfit
        unfit.forget(ADDRESS)
    assert not caplog.records and unfit.counters["workers_refused"] == 0


def test_each_case_is_told_of_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    unfit, first, second = Unfit(), worker_info("d1", "i1"), worker_info("d1", "i2")
    with caplog.at_level(logging.INFO, "penstock"):
        for _ in range(3):
            unfit.refuse(ADDRESS, "another protocol")
            unfit.miss(ADDRESS, "cut")
            unfit.warn(ADDRESS, first, "another template")
        assert unfit and unfit.counters == {"workers_refused": 1, "template_mismatches": 1}
        for worker in (first, first, second):
            unfit.refuse(ADDRESS, "another model", worker)
        assert unfit.counters["workers_refused"] == 3
        unfit.accept(ADDRESS)
        assert not unfit
        unfit.miss(ADDRESS, "cut")
        unfit.warn(ADDRESS, first, "another template")
    refused = [(record.levelname, record.message.partition(" at ")[0]) for record in caplog.records]
    assert refused == [
        ("INFO", "nobody answers for the worker"),
        ("WARNING", "worker d1 (decode)"),
        ("ERROR", "the worker"),
        ("ERROR", "worker d1 (decode)"),
        ("ERROR", "worker d1 (decode)"),
        ("INFO", "nobody answers for the worker"),
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, f"protocol {PROTOCOL_VERSION}, this worker speaks 99"), ({"cluster_key": "ours"}, "cluster key")],
)
def test_a_worker_that_lets_nobody_in_is_told_of(redis_server, start_worker, monkeypatch, caplog, options, reason):
    monkeypatch.setattr(peers, "PROTOCOL_VERSION", 99)
    start_worker("d1")

    async def scenario() -> None:
        async with running(redis_server.url, 0, **options) as service:
            await until(lambda: service.counters()["workers_refused"] == 1)
            assert service.why_not_ready() == "no worker fits this router: its log says why"
            (link,) = service._links.values()
            assert not link.connected

    play(scenario())
    (told,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "is not used" in told and reason in told


def test_where_nobody_answers_nothing_is_refused(redis_server, start_worker, caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        start_worker("d1", announced=address)

        async def scenario() -> None:
            async with running(redis_server.url, 0) as service:
                await until(lambda: service._links)
                (link,) = service._links.values()
                first = link.state.session
                await until(lambda: link.state.session >= first + 2)
                assert service.why_not_ready() == "no worker is known yet"
                assert service.counters()["workers_refused"] == 0

        with caplog.at_level(logging.INFO, "penstock"):
            play(scenario())
    told = [record.message for record in caplog.records if address in record.message]
    assert len(told) == 1 and told[0].startswith("nobody answers")
