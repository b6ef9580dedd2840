"""Taps of a bus socket: bounded by credit, forgotten without renewal, and nothing to do without one."""

from __future__ import annotations

import time

import msgpack
import zmq
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.bus import BusServer
from penstock.common.bus_tap import LEASE_S, MAX_CREDIT, Taps
from penstock.common.messages import Abort, Hello


def test_a_request_is_two_frames_with_a_number() -> None:
    taps = Taps()
    for frames in ([b"tap"], [b"tap", b""], [b"tap", b"-1"], [b"tap", b"x"], [b"pat", b"1"], [b"tap", b"1", b"2"], []):
        assert not taps.asked(b"t", frames, 0.0)
    assert not taps
    assert taps.asked(b"t", [b"tap", b"9" * 40], 0.0) and taps
    assert len([1 for _ in range(2 * MAX_CREDIT) if taps.copies(b"in", b"p", b"", 0.0)]) == MAX_CREDIT


@given(st.lists(st.one_of(st.integers(0, 5), st.none(), st.floats(0.1, 10.0)), max_size=40))
def test_copies_against_a_plain_count(events: list[int | float | None]) -> None:
    """Events: a number is a request with that credit, None a message, a float time that passes."""
    taps, now, credit, missed, ends_at = Taps(), 0.0, 0, 0, -1.0
    for event in events:
        if isinstance(event, float):
            now += event
        elif isinstance(event, int):
            assert taps.asked(b"t", [b"tap", b"%d" % event], now)
            missed = missed if ends_at >= 0 else 0
            credit, ends_at = event, now + LEASE_S
        else:
            copies = taps.copies(b"out", b"peer", b"payload", now)
            if now >= ends_at:
                assert copies == [] and not taps
                missed, ends_at = 0, -1.0
            elif credit:
                credit -= 1
                assert copies == [(b"t", b"out", b"peer", b"payload", b"%d" % missed)]
            else:
                missed += 1
                assert copies == []


def test_both_directions_are_copied_as_they_travel_and_a_tap_that_left_is_forgotten() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server = BusServer("127.0.0.1", 0, "")
    peer, tap = (context.socket(zmq.DEALER) for _ in range(2))
    try:
        peer.setsockopt(zmq.ROUTING_ID, b"router-1/1")
        for socket in (peer, tap):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, 60_000)
            socket.connect(server.address)
        tap.send_multipart((b"tap", b"9999"))
        deadline = time.monotonic() + 60
        while not server._taps:
            assert time.monotonic() < deadline and server.receive() == []
        said = msgpack.packb({"type": "abort", "request_id": "r", "attempt": 0})
        peer.send(said)
        received = []
        while not received:
            assert time.monotonic() < deadline
            received = server.receive()
        assert received == [(b"router-1/1", Abort(request_id="r", attempt=0))]
        assert tap.recv_multipart() == [b"in", b"router-1/1", said, b"0"]
        server.send(b"router-1/1", Hello(protocol=1, peer_id="p", session=1, role="decode", fingerprint=""))
        direction, identity, copied, _ = tap.recv_multipart()
        assert (direction, identity, copied) == (b"out", b"router-1/1", peer.recv())
        tap.close()
        while server._taps:
            assert time.monotonic() < deadline
            server.send(b"router-1/1", Abort(request_id="r", attempt=1))
            time.sleep(0.001)
        assert server.dropped_sends == 0
    finally:
        for socket in (peer, tap):
            socket.close()
        context.term()
        server.close()
