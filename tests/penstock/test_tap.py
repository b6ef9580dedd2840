"""`penstock tap`: what a line shows, what a filter lets through, and a real fleet tapped while it answers."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from penstock.cli import main
from penstock.tap import Filter, Seen, Tap, as_json, describe, read, shortened
from tests.conftest import free_port
from tests.system import fleets

CHECKOUT = Path(__file__).parents[2]


def seen(**body: Any) -> Seen:
    return Seen(1.25, "decode-0", "in", "router-1", 99, body)


def test_a_line_is_short_whatever_the_message() -> None:
    long = seen(type="submit", request={"prompt_token_ids": list(range(5000)), "text": "x" * 500}, key=b"\0" * 300)
    line = describe(long)
    assert "router-1 -> decode-0  submit  99 B  " in line and len(line) < 300
    assert (
        "0, 1, 2, 3, 4, 5, 6, 7" in line and "4992 more" in line and "<300 bytes>" in line and "500 characters" in line
    )
    assert json.loads(as_json(long))["body"]["request"]["prompt_token_ids"][-1] == "... 4992 more"
    assert "decode-0 -> router-1  " in describe(Seen(0.0, "decode-0", "out", "router-1", 1, "not MessagePack"))
    assert shortened([1, 2]) == [1, 2]


def test_filters() -> None:
    tokens = seen(type="tokens", deltas=[["req-7", 0, 0, 0, [5]]])
    heartbeat = seen(type="heartbeat", seq=1)
    assert Filter().wants(tokens) and not Filter().wants(heartbeat)
    assert Filter(heartbeats=True).wants(heartbeat) and Filter(tags=("heartbeat",)).wants(heartbeat)
    assert not Filter(tags=("submit",)).wants(tokens)
    assert Filter(request_id="req-7").wants(tokens) and Filter(request_id="req").wants(tokens)
    assert not Filter(request_id="req-8").wants(tokens)


def test_what_cannot_be_read_is_shown_as_such() -> None:
    assert read(msgpack.packb({"type": "x", "n": 1})) == {"type": "x", "n": 1}
    for rubbish in (b"", b"\xc1", b"\x82\xa1a", b"\x01\x02"):
        assert str(read(rubbish)).startswith("not MessagePack")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--url", "localhost:8000"], "--url: give http://"),
        (["--limit", "-1"], "--limit: must be at least 0, got -1"),
        (["--url", f"http://127.0.0.1:{free_port()}"], "does not tell of its fleet"),
        (["--url", "http://["], "--url: give http://"),
        (["--bus", "nonsense"], "is not the address of a bus"),
        (["--bus", "tcp://127.0.0.1:99999"], "is not the address of a bus"),
        (["--bus", "inproc://x"], "is not the address of a bus"),
        (["--bus", "tcp://\udcff:1"], "--bus: is not UTF-8"),
        (["--cluster-key", "\udcff"], "--cluster-key: is not UTF-8"),
        (["--bus", "tcp://127.0.0.1:1", "--worker", "x"], "no such worker; there are tcp://127.0.0.1:1"),
    ],
)
def test_mistakes(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tap", *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_dead_address_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    turns: Iterator[list[Seen]] = iter([[], []])

    def receive(tap: Tap) -> list[Seen]:
        for seen in turns:
            return seen
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.tap.SILENT_S", 0.0)
    monkeypatch.setattr(Tap, "receive", receive)
    assert main(["tap", "--bus", "tcp://127.0.0.1:1"]) == 0
    assert capsys.readouterr().err == "penstock tap: nothing comes from tcp://127.0.0.1:1\n"


def test_a_worker_that_is_gone_for_long_ends_no_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes what asks it for more copies; the other workers' still come."""
    monkeypatch.setattr("penstock.tap.LEASE_S", 0.0)  # so every turn asks
    with zmq.Context[zmq.Socket[bytes]]() as context, context.socket(zmq.ROUTER) as worker:
        port = worker.bind_to_random_port("tcp://127.0.0.1")
        gone = f"tcp://127.0.0.1:{free_port()}"
        with Tap({"gone": gone, "there": f"tcp://127.0.0.1:{port}"}, {}) as tap:
            for _ in range(2000):  # of which a socket keeps half
                tap.receive(0.0)
            identity, *_ = worker.recv_multipart()
            worker.send_multipart((identity, b"in", b"router-1/1", msgpack.packb({"type": "x"}), b"0"))
            assert [seen.worker for seen in tap.receive(20.0)] == ["there"]


@pytest.mark.system
def test_a_request_is_seen_from_submit_to_its_last_token(checkpoints: dict[str, Path]) -> None:
    """On an encrypted bus: a tap without the fleet's key would see nothing."""
    cluster_key = "a secret of the fleet"
    with fleets.fleet(
        checkpoints["llama"], prefill_workers=1, cluster_key=cluster_key, routing_policy="round-robin"
    ) as running:
        command = [sys.executable, "-m", "penstock", "tap", "--json", "--url", running.url]
        environ = {**os.environ, "PENSTOCK_CLUSTER_KEY": cluster_key, "PENSTOCK_API_KEY": ""}
        heartbeats = subprocess.run([*command, "--tag", "heartbeat", "--limit", "1"], env=environ, cwd=CHECKOUT,
                                    capture_output=True, text=True, timeout=60)  # fmt: skip
        assert json.loads(heartbeats.stdout)["tag"] == "heartbeat", heartbeats.stderr
        tap = subprocess.Popen([*command, "--heartbeats"], env=environ, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
        assert tap.stdout is not None
        lines = []
        workers: set[str] = set()
        while workers < {"prefill-0", "decode-0"}:  # both have accepted the tap
            lines.append(json.loads(tap.stdout.readline()))
            workers.add(lines[-1]["worker"])

        async def ask() -> list[int]:
            async with fleets.open_client(running.url) as client:
                return await fleets.complete(client, list(range(3, 40)), 4)

        answered = asyncio.run(ask())
        deadline = time.monotonic() + 60
        while not any(line["tag"] == "pages_landed" for line in lines) or _tokens(lines) != answered:
            assert time.monotonic() < deadline, [line["tag"] for line in lines]
            lines.append(json.loads(tap.stdout.readline()))
        tap.terminate()
        tap.stdout.close()
        tap.wait()
    order = [line["tag"] for line in lines if "heartbeat" not in line["tag"]]
    assert "submit" in order  # from decode-0; what two workers send has no order
    for earlier, later in (("prefill", "pages_ready"), ("pages_ready", "pages_landed")):
        assert order.index(earlier) < order.index(later)
    prefill = next(line for line in lines if line["tag"] == "prefill")
    assert (prefill["worker"], prefill["direction"], prefill["peer"]) == ("prefill-0", "in", "decode-0")


def _tokens(lines: list[dict[str, Any]]) -> list[int]:
    """Token ids in the deltas seen so far, by index."""
    deltas = [delta for line in lines if line["tag"] == "tokens" for delta in line["body"]["deltas"]]
    return [token for delta in sorted(deltas, key=lambda delta: delta[3]) for token in delta[4]]
