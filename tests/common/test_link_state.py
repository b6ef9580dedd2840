"""A link's half of a session, with a clock of its own: greetings, heartbeats, silence, back-off."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.common.bus import Connected, Disconnected
from penstock.common.link_state import BACKOFF_FIRST_S, BACKOFF_MOST_S, SILENT_LEASES, LinkState, Phase
from penstock.common.messages import PROTOCOL_VERSION, Goodbye, Heartbeat, Refused, Welcome, encode
from tests.worker_info import worker_info

WORKER = worker_info()
WELCOME = Welcome(protocol=PROTOCOL_VERSION, fingerprint="f", worker=encode(WORKER))


@pytest.mark.parametrize(("lease_s", "every_s"), [(9.0, 0.5), (0.9, 0.3)])
def test_a_link_connects_beats_and_is_lost(lease_s: float, every_s: float):
    state = LinkState("r", "router", 5, "", lease_s=lease_s)
    assert state.must_open(0.0) and state.opened(0.0).session == 5
    assert state.heartbeat_due(0.0) is None, "not before the Welcome"
    assert state.received(WELCOME, 1.0) == Connected(WORKER, 5)
    assert state.heartbeat_due(1.0) == Heartbeat(seq=1) and state.heartbeat_due(0.95 + every_s) is None
    assert state.heartbeat_due(1.01 + every_s) == Heartbeat(seq=2)
    assert state.lost("cut", 5.0) == Disconnected(5, "cut", greeted=True)
    assert state.lost("again", 5.0) is None, "one end per session"
    assert not state.must_open(5.0) and state.must_open(5.0 + BACKOFF_FIRST_S)
    assert state.opened(6.0).session == 6


def test_a_worker_that_says_goodbye_has_left():
    state = LinkState("r", "router", 1, "", 9.0)
    state.opened(0.0)
    state.received(WELCOME, 0.0)
    assert state.received(Goodbye(), 1.0) == Disconnected(1, "it has left", greeted=True, left=True)
    assert state.silent(1000.0) is None and state.must_open(1.0 + BACKOFF_FIRST_S)


def test_back_off_doubles_to_its_limit_and_starts_anew_after_a_welcome():
    state, now, waits = LinkState("r", "router", 1, "", 9.0), 0.0, []
    for _ in range(9):
        state.opened(now)
        state.lost("refused", now)
        wait = 0.0
        while not state.must_open(now + wait):
            wait += 0.05
        waits.append(wait)
        now += wait
    assert waits[0] == pytest.approx(BACKOFF_FIRST_S) and waits[-1] == pytest.approx(BACKOFF_MOST_S, abs=0.06)
    assert waits == sorted(waits)
    state.opened(now)
    state.received(WELCOME, now)
    state.lost("cut", now)
    assert state.must_open(now + BACKOFF_FIRST_S)


def test_only_long_silence_counts():
    state = LinkState("r", "router", 1, "", lease_s=10.0)
    state.opened(0.0)
    state.received(WELCOME, 0.0)
    assert state.silent(SILENT_LEASES * 10.0) is None
    end = state.silent(SILENT_LEASES * 10.0 + 1)
    assert end is not None and "silent" in end.reason


def test_a_router_knows_that_it_has_been_forgotten_while_it_stood_still():
    for role in ("router", "decode"):
        state = LinkState("r", role, 1, "", lease_s=1.0)
        state.opened(0.0)
        state.received(WELCOME, 0.0)
        assert not state.stood_still(WORKER.lease_s), "the lease is the worker's"
        state.heartbeat(5.0)
        assert not state.stood_still(5.0 + WORKER.lease_s)
        assert state.stood_still(5.1 + WORKER.lease_s) == (role == "router"), "between workers a long step is usual"
        state.lost("cut", 6.0)
        assert not state.stood_still(100.0)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (Refused(protocol=PROTOCOL_VERSION, code="draining", message=""), False),
        (Refused(protocol=PROTOCOL_VERSION, code="protocol", message=""), True),
        (Welcome(protocol=PROTOCOL_VERSION + 1, fingerprint="f", worker=b"anything"), True),
        (Welcome(protocol=PROTOCOL_VERSION, fingerprint="other", worker=b"anything"), True),
        (Welcome(protocol=PROTOCOL_VERSION, fingerprint="f", worker=b"\xc1"), True),
    ],
)
def test_a_bad_answer_ends_the_session(answer: Any, refused: bool):
    state = LinkState("d", "decode", 1, "f", 10.0)
    state.opened(0.0)
    end = state.received(answer, 0.0)
    assert isinstance(end, Disconnected) and not end.greeted and state.phase is Phase.LOST
    assert end.refused is refused and state.must_open(BACKOFF_MOST_S - 0.1) is not refused
