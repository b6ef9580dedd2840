"""The wire, byte for byte: every message against what the independent `msgpack` package writes and reads.

A change here is a change of the protocol: raise PROTOCOL_VERSION and write down why, or make it an optional field.
"""

from __future__ import annotations

import contextlib
import re
import struct
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common import messages as m
from penstock.common.sampling import SamplingParams

REQUEST = m.GenerateRequest(
    request_id="r1",
    attempt=1,
    choice=2,
    prompt_token_ids=[1, 300, 70000],
    output_token_ids=[5],
    sampling=SamplingParams(temperature=0.5, top_k=40, seed=-(2**63), max_tokens=9, stop=["é"], logprobs=2),
    eos_token_ids=[2],
    cache_salt="salt",
    queue_timeout_s=1.5,
    priority=-3,
)
REQUEST_MAP = {
    "request_id": "r1",
    "attempt": 1,
    "choice": 2,
    "prompt_token_ids": [1, 300, 70000],
    "output_token_ids": [5],
    "sampling": {
        "temperature": 0.5,
        "top_k": 40,
        "seed": -(2**63),
        "max_tokens": 9,
        "stop": ["é"],
        "logprobs": 2,
    },
    "eos_token_ids": [2],
    "cache_salt": "salt",
    "queue_timeout_s": 1.5,
    "priority": -3,
}
WORKER = m.WorkerInfo(
    worker_id="decode-0",
    incarnation="abc",
    role="decode",
    address="tcp://127.0.0.1:5555",
    fingerprint="f",
    model="m",
    served_models=["m", "n"],
    page_size=16,
    num_pages=100,
    page_bytes=2**21,
    max_model_len=4096,
    max_num_seqs=64,
    vocab_size=32000,
    eos_token_ids=[2],
    transports={"shm": b"\x00\xff"},
)
WORKER_MAP = {
    "worker_id": "decode-0",
    "incarnation": "abc",
    "role": "decode",
    "address": "tcp://127.0.0.1:5555",
    "fingerprint": "f",
    "model": "m",
    "served_models": ["m", "n"],
    "page_size": 16,
    "num_pages": 100,
    "page_bytes": 2**21,
    "max_model_len": 4096,
    "max_num_seqs": 64,
    "vocab_size": 32000,
    "eos_token_ids": [2],
    "transports": {"shm": b"\x00\xff"},
}

GOLDEN: list[tuple[m.Message, dict[str, Any]]] = [
    (
        m.Hello(protocol=1, peer_id="router-1", session=3, role="router", fingerprint=""),
        {"type": "hello", "protocol": 1, "peer_id": "router-1", "session": 3, "role": "router", "fingerprint": ""},
    ),
    (
        m.Welcome(protocol=1, fingerprint="f", worker=b"\x80"),
        {"type": "welcome", "protocol": 1, "fingerprint": "f", "worker": b"\x80"},
    ),
    (
        m.Refused(protocol=1, code="fingerprint", message="no"),
        {"type": "refused", "protocol": 1, "code": "fingerprint", "message": "no"},
    ),
    (m.Goodbye(), {"type": "goodbye"}),
    (m.Heartbeat(seq=7), {"type": "heartbeat", "seq": 7}),
    (
        m.HeartbeatAck(seq=7, load=m.WorkerLoad(running=2, free_pages=300, draining=True)),
        {"type": "heartbeat_ack", "seq": 7, "load": {"running": 2, "free_pages": 300, "draining": True}},
    ),
    (
        m.Submit(request=REQUEST, prefill=WORKER, source=WORKER),
        {"type": "submit", "request": REQUEST_MAP, "prefill": WORKER_MAP, "source": WORKER_MAP},
    ),
    (m.Abort(request_id="r1", attempt=1, choice=2), {"type": "abort", "request_id": "r1", "attempt": 1, "choice": 2}),
    (
        m.Prefill(request=REQUEST, router_id="router-1", held_tokens=32),
        {"type": "prefill", "request": REQUEST_MAP, "router_id": "router-1", "held_tokens": 32},
    ),
    (m.Move(request_id="r1", attempt=1, choice=2), {"type": "move", "request_id": "r1", "attempt": 1, "choice": 2}),
    (m.Drain(), {"type": "drain"}),
    (
        m.Fetch(request_id="r1", attempt=1, first_page=2, hashes=[b"\x01", b"\x02"]),
        {"type": "fetch", "request_id": "r1", "attempt": 1, "first_page": 2, "hashes": [b"\x01", b"\x02"]},
    ),
    (
        m.FetchDone(request_id="r1", attempt=1, num_pages=2),
        {"type": "fetch_done", "request_id": "r1", "attempt": 1, "num_pages": 2},
    ),
    (
        m.PagesReady(
            request_id="r1",
            attempt=1,
            first_page=2,
            pages=[[5, 6]],
            checksums=[[2**64 - 1, 0]],
            num_tokens=64,
            blobs={"hidden": b"\x01"},
        ),
        {
            "type": "pages_ready",
            "request_id": "r1",
            "attempt": 1,
            "first_page": 2,
            "pages": [[5, 6]],
            "checksums": [[2**64 - 1, 0]],
            "num_tokens": 64,
            "blobs": {"hidden": b"\x01"},
        },
    ),
    (
        m.PrefillDone(
            request_id="r1",
            attempt=1,
            token_ids=[11],
            finish=m.Finish(reason="stop", stop_reason=2),
            spans=m.Spans(prefill_ms=1.25, computed_tokens=3),
            held_ms=2.5,
        ),
        {
            "type": "prefill_done",
            "request_id": "r1",
            "attempt": 1,
            "token_ids": [11],
            "finish": {"reason": "stop", "stop_reason": 2},
            "spans": {"prefill_ms": 1.25, "computed_tokens": 3},
            "held_ms": 2.5,
        },
    ),
    (
        m.PrefillFailed(request_id="r1", attempt=1, code="overloaded", message="full"),
        {"type": "prefill_failed", "request_id": "r1", "attempt": 1, "code": "overloaded", "message": "full"},
    ),
    (m.PagesLanded(request_id="r1", attempt=1), {"type": "pages_landed", "request_id": "r1", "attempt": 1}),
    (
        m.TokenBatch(
            deltas=[
                m.TokenDelta("r1", 1, 2, 40, [7]),
                m.TokenDelta(
                    "r2",
                    0,
                    0,
                    0,
                    [8, 9],
                    m.Finish(reason="error", code="timeout", message="late", retryable=True),
                    [m.TokenLogprobs(-0.5, 1, [8, 3], [-0.5, -1.5])],
                    m.Spans(transport="shm"),
                    [m.TokenLogprobs(-2.5, 7, [], [])],
                ),
            ]
        ),
        {
            "type": "tokens",
            "deltas": [
                ["r1", 1, 2, 40, [7], None, None, None, None],
                [
                    "r2",
                    0,
                    0,
                    0,
                    [8, 9],
                    {"reason": "error", "code": "timeout", "message": "late", "retryable": True},
                    [[-0.5, 1, [8, 3], [-0.5, -1.5]]],
                    {"transport": "shm"},
                    [[-2.5, 7, [], []]],
                ],
            ],
        },
    ),
]
names = [type(message).__name__ for message, _ in GOLDEN]


def test_every_message_is_here():
    assert sorted(names) == sorted(cls.__name__ for cls in get_args(m.AnyMessage))


def test_the_version_has_its_history():
    assert m.__doc__ is not None
    history = [int(n) for n in re.findall(r"^(\d+)  ", m.__doc__, flags=re.MULTILINE)]
    assert history == list(range(1, m.PROTOCOL_VERSION + 1))


@pytest.mark.parametrize(("message", "as_map"), GOLDEN, ids=names)
def test_golden(message: m.Message, as_map: dict[str, Any]):
    assert msgpack.unpackb(m.encode(message)) == as_map
    assert list(msgpack.unpackb(m.encode(message))) == list(as_map), "in this order"
    assert m.decode(msgpack.packb(as_map)) == message


def test_golden_token_rules():
    sampling = SamplingParams(
        logit_bias={70000: -1.5, 3: 100.0}, allowed_token_ids=[3, 9], bad_words_token_ids=[[1, 2]]
    )
    request = m.GenerateRequest(request_id="r", prompt_token_ids=[1], sampling=sampling)
    as_map = {
        "type": "submit",
        "request": {
            "request_id": "r",
            "prompt_token_ids": [1],
            "sampling": {
                "logit_bias": {70000: -1.5, 3: 100.0},
                "allowed_token_ids": [3, 9],
                "bad_words_token_ids": [[1, 2]],
            },
        },
    }
    assert msgpack.unpackb(m.encode(m.Submit(request=request)), strict_map_key=False) == as_map
    assert m.decode(msgpack.packb(as_map)) == m.Submit(request=request)


def test_golden_worker_record():
    assert msgpack.unpackb(m.encode(WORKER)) == WORKER_MAP
    assert m.decode_worker_info(msgpack.packb(WORKER_MAP)) == WORKER


def test_bytes_written_down_once():
    """Not even a common change of both packages would go unseen."""
    assert m.encode(m.Heartbeat(seq=7)) == b"\x82\xa4type\xa9heartbeat\xa3seq\x07"
    delta = m.TokenBatch(deltas=[m.TokenDelta("r", 0, 0, 300, [65536])])
    tail = b"\x99\xa1r\x00\x00\xcd\x01\x2c\x91\xce" + struct.pack(">I", 65536) + 4 * b"\xc0"
    assert m.encode(delta) == b"\x82\xa4type\xa6tokens\xa6deltas\x91" + tail


def test_a_newer_peer_may_say_more():
    assert m.decode(msgpack.packb({"type": "heartbeat", "seq": 1, "news": {"deep": [1]}})) == m.Heartbeat(seq=1)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgpack.packb({"type": "nobody"}),
        msgpack.packb({"seq": 1}),
        msgpack.packb({"type": "heartbeat"}),
        msgpack.packb({"type": "heartbeat", "seq": "1"}),
        msgpack.packb({"type": "tokens", "deltas": [["r", 0]]}),
        msgpack.packb({"type": "submit", "request": {**REQUEST_MAP, "sampling": {"temperature": -1.0}}}),
    ],
)
def test_what_is_not_ours_raises_one_family_of_errors(payload: bytes):
    with pytest.raises(msgspec.DecodeError):
        m.decode(payload)


@given(st.binary(max_size=200))
def test_no_bytes_do_worse(payload: bytes):
    with contextlib.suppress(msgspec.DecodeError):
        m.decode(payload)
