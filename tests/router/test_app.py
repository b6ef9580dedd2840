"""Routes, keys, health, errors before and during an answer, disconnects, the timeline, and the shutdown."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import httpx
import openai
import pytest
from llguidance import LLTokenizer

from penstock.common import grammar
from penstock.common.errors import Overloaded, PenstockError, QueueTimeout, Unavailable, WorkerLost
from penstock.common.messages import Finish, GenerateRequest, TokenDelta
from tests.router.fake_router import ANSWER, SPANS, FakeService, Router, delta, ids_of, running, say

BODY = {"prompt": "the water", "max_tokens": 99}
CHAT = {"messages": [{"role": "user", "content": "a"}]}


def events(response: httpx.Response) -> list[Any]:
    """Payloads of a finished stream; it must end in [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_models_version_health(router: Router) -> None:
    models = router.openai.models.list().data
    assert [model.id for model in models] == ["tiny", "alias"]
    assert models[0].max_model_len == 512 and models[0].root == "/models/tiny" and models[0].owned_by == "penstock"
    assert router.http.get("/version").json()["version"]
    assert router.http.get("/health").status_code == 200
    router.service.is_ready = False
    response = router.http.get("/health")
    assert response.status_code == 503 and "no decode worker" in response.json()["reason"]
    router.service.known = False
    assert "no worker is known" in router.http.get("/health").json()["reason"]
    assert router.post("/v1/completions", BODY).status_code == 503


def test_names_of_models(router: Router) -> None:
    assert router.post("/v1/completions", BODY).json()["model"] == "tiny"
    assert router.post("/v1/completions", BODY | {"model": "alias"}).json()["model"] == "alias"
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        router.openai.completions.create(model="other", prompt="a")
    assert caught.value.param == "model" and caught.value.type == "not_found_error"


def test_routes_and_methods_that_do_not_exist(router: Router) -> None:
    response = router.http.get("/v1/nothing")
    assert response.status_code == 404 and response.json()["error"]["type"] == "not_found_error"
    response = router.http.get("/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST" and response.json()["error"]["message"]


def test_keys() -> None:
    with running(api_key=("first", "secret")) as router:
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"authorization": "Basic secret"},
        ):
            for path in ("/v1/models", "/v1/nothing", "/v1"):
                response = router.http.get(path, headers=header)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert router.post("/v1/completions", BODY, **header).status_code == 401
            for path in ("/invocations", "/tokenize", "/detokenize"):
                assert router.post(path, BODY, **header).status_code == 401
        assert router.service.requests == []
        assert router.openai.completions.create(model="tiny", prompt="a").choices  # "secret"
        assert router.http.get("/v1/models", headers={"authorization": "bearer first"}).status_code == 200
        assert router.http.get("/health").status_code == 200 and router.http.get("/metrics").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{router.url}/v1", api_key="x", max_retries=0).models.list()


def test_the_vocabulary_is_prepared_before_there_are_workers_whose_streams_would_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    prepare, start = grammar.make_vocabulary, FakeService.start

    def told_prepare(*arguments: Any, **options: Any) -> LLTokenizer:
        vocabulary = prepare(*arguments, **options)
        done.append("prepared")
        return vocabulary

    async def told_start(service: FakeService) -> None:
        done.append("started")
        await start(service)

    monkeypatch.setattr(grammar, "make_vocabulary", told_prepare)
    monkeypatch.setattr(FakeService, "start", told_start)
    with running() as router:
        assert router.post("/v1/completions", BODY | {"structured_outputs": {"regex": "a+"}}).status_code == 200
    assert done == ["prepared", "started"]


def test_request_ids(router: Router) -> None:
    for _ in range(2):  # a client that repeats its id confuses nobody
        response = router.post("/v1/completions", BODY, **{"X-Request-Id": "mine-1"})
        assert response.json()["id"] == "cmpl-mine-1" and response.headers["x-request-id"] == "mine-1"
    assert len({request.request_id for request in router.service.requests}) == 2
    response = router.post("/v1/chat/completions", CHAT, **{"X-Request-Id": ""})
    assert response.json()["id"] == f"chatcmpl-{response.headers['x-request-id']}" != "chatcmpl-"


@pytest.mark.parametrize("name", ["two words: a/b?c=1#d", "größe ✓", "a" * 256, '"quoted" {json}', "%0d%0aX-Forged: 1"])
def test_request_ids_are_taken_as_they_are(router: Router, name: str) -> None:
    headers = {"X-Request-Id": name.encode()}
    whole = router.http.post("/v1/completions", json=BODY, headers=headers)
    streamed = router.http.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=headers)
    assert whole.json()["id"] == f"cmpl-{name}" and {event["id"] for event in events(streamed)} == {f"chatcmpl-{name}"}
    for response in (whole, streamed, router.http.post("/tokenize", json={"prompt": "a"}, headers=headers)):
        assert dict(response.headers.raw)[b"x-request-id"] == name.encode() and "x-forged" not in response.headers
    assert router.post("/v1/completions", BODY | {"request_id": name}).json()["id"] == f"cmpl-{name}"


@pytest.mark.parametrize("name", ["a" * 257, "a\tb", "a\x85b", "\u2028", b"\xff", b"a\xc3"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize"])
def test_request_ids_that_cannot_be_are_refused(router: Router, path: str, name: str | bytes) -> None:
    given = name if isinstance(name, bytes) else name.encode()
    response = router.http.post(path, json=BODY | CHAT, headers={"X-Request-Id": given})
    assert response.status_code == 400 and "X-Request-Id must be" in response.json()["error"]["message"]
    made_up = response.headers["x-request-id"]
    assert made_up.isalnum() and not router.service.requests
    if isinstance(name, str) and path == "/v1/completions":
        assert router.post(path, BODY | {"request_id": name}).json()["error"]["param"] == "request_id"


@pytest.mark.parametrize("name", [b"a\rX-Forged: 1", b"a\nX-Forged: 1", b"a\r\n X-Forged: 1", b"a\0b", b"a\x1b[31m"])
def test_no_header_is_forged_through_a_request_id(router: Router, name: bytes) -> None:
    address = router.http.base_url.host, router.http.base_url.port
    with socket.create_connection(address, timeout=60) as client, client.makefile("rb") as answer:
        body = json.dumps(BODY).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Request-Id: "
        client.sendall(head + name + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        lines = answer.read().partition(b"\r\n\r\n")[0].split(b"\r\n")
    names = [line.partition(b":")[0].lower() for line in lines]
    assert lines[0].startswith((b"HTTP/1.1 400", b"HTTP/1.1 200")) and b"x-forged" not in names
    assert all(byte >= 0x20 for line in lines for byte in line)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "error", [Unavailable("no worker"), Overloaded("full"), QueueTimeout("late")], ids=lambda e: e.code
)
def test_errors_before_the_first_token_have_their_status(
    router: Router, error: PenstockError, n: int, stream: bool
) -> None:
    router.service.refusal = error
    for _ in range(2):  # refused at once, then given up while it waits
        response = router.post("/v1/completions", BODY | {"stream": stream, "n": n})
        assert response.status_code == error.status and response.headers["content-type"] == "application/json"
        assert response.json()["error"] == {
            "message": error.message, "type": error.openai_type, "param": None, "code": error.code,
        }  # fmt: skip
        assert response.headers["retry-after"] == "1" and response.headers["x-request-id"]
        router.service.refusal, router.service.script = None, lambda _: [error]


def failing(error: PenstockError | Finish) -> Any:
    def script(request: GenerateRequest) -> list[TokenDelta | PenstockError]:
        first = delta(request, 0, ids_of("a"))
        return [first, delta(request, 1, [], error) if isinstance(error, Finish) else error]

    return script


@pytest.mark.parametrize("error", [WorkerLost("died"), Finish(reason="error", code="worker_lost", message="died")])
def test_an_error_after_the_first_token(router: Router, error: PenstockError | Finish) -> None:
    router.service.script = failing(error)
    expected = {"message": "died", "type": "server_error", "param": None, "code": "worker_lost"}
    first, last = events(router.post("/v1/completions", BODY | {"stream": True}))
    assert first["choices"][0]["text"] == "a" and last == {"error": expected}
    with pytest.raises(openai.APIError, match="died"):
        list(router.openai.completions.create(model="tiny", prompt="a", stream=True))
    response = router.post("/v1/completions", BODY)
    assert response.status_code == 503 and response.json()["error"] == expected


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses", "messages"])
def test_a_request_that_has_been_tried_too_often_ends_in_an_error_on_every_route(
    router: Router, path: str, stream: bool
) -> None:
    router.service.script = failing(WorkerLost("gave up after 3 attempts"))
    bodies = {"completions": BODY, "responses": {"input": "a"}, "messages": CHAT | {"max_tokens": 9}}
    answer = router.post(f"/v1/{path}", bodies.get(path, CHAT) | {"model": "tiny", "stream": stream})
    assert answer.status_code == (200 if stream else 503)
    *_, last = [line for line in answer.text.splitlines() if line and line != "data: [DONE]"]
    told = json.loads(last.removeprefix("data: "))
    error = (told.get("response") or told)["error"]
    assert error["message"] == "gave up after 3 attempts"
    assert error.get("code") in ("worker_lost", "server_error") or error["type"] == "overloaded_error", error


def test_one_failing_choice_ends_all(router: Router) -> None:
    def script(request: GenerateRequest) -> list[TokenDelta | PenstockError]:
        said = say("b" * 60)(request)
        return [*said[:20], WorkerLost("died")] if request.choice else said

    router.service.script = script
    router.service.step = 1
    assert "error" in events(router.post("/v1/completions", BODY | {"stream": True, "n": 2}))[-1]
    assert (router.last.request_id, 0) in router.service.cancelled


def test_a_fault_of_ours_is_a_500_and_the_server_lives_on(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    router.service.script = lambda r: [TokenDelta(r.request_id, 0, r.choice, 0, ["bug"])]  # type: ignore[list-item]
    response = router.post("/v1/completions", BODY)
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert router.service.cancelled == [(router.last.request_id, 0)]
    assert router.last.request_id in [getattr(record, "request_id", "") for record in caplog.records]
    router.service.script = say(ANSWER)
    assert router.post("/v1/completions", BODY).json()["choices"][0]["text"] == ANSWER


@pytest.mark.parametrize("finish", ["abort", "length"])
def test_other_ends(router: Router, finish: str) -> None:
    router.service.script = say("a", finish=finish)
    assert router.post("/v1/completions", BODY).json()["choices"][0]["finish_reason"] == finish


@pytest.mark.parametrize("pause", [0, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_a_stream_frees_every_choice(router: Router, pause: int, n: int) -> None:
    router.service.pause_after = pause
    with leaving(router, BODY | {"stream": True, "n": n}) as asked:
        wait_for(lambda: len(router.service.quiet) == n)
        if pause:
            assert asked.getresponse().read1()
    wait_for(lambda: len(router.service.cancelled) >= n)
    assert sorted(router.service.cancelled) == [(router.last.request_id, choice) for choice in range(n)]


def test_a_client_that_leaves_while_it_waits_for_a_whole_answer(router: Router) -> None:
    router.service.pause_after = 2
    with leaving(router, BODY):
        wait_for(lambda: len(router.service.quiet) == 1)
    assert router.service.cancel_heard.wait(60)
    assert router.service.cancelled == [(router.last.request_id, 0)]


@contextlib.contextmanager
def leaving(router: Router, body: dict[str, Any]) -> Iterator[HTTPConnection]:
    """A client that has asked, and hangs up when the block ends."""
    with contextlib.closing(HTTPConnection(router.url.partition("://")[2], timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        yield connection


def wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def check_timeline(timeline: list[dict[str, Any]]) -> None:
    names = [entry["name"] for entry in timeline]
    assert names == [
        "received", "tokenised", "routed", "admission", "prefill", "first_token", "transfer", "decode", "finished",
    ]  # fmt: skip
    marks = [entry["ms"] for entry in timeline if entry["kind"] == "mark"]
    assert marks == sorted(marks) and marks[0] == 0.0
    facts = {name: value for entry in timeline for name, value in entry.items()}
    assert (facts["transfer_bytes"], facts["transfer_pages"], facts["transport"]) == (4096, 2, "shm")
    assert (facts["cached_tokens"], facts["computed_tokens"]) == (3, 4)
    assert next(entry["ms"] for entry in timeline if entry["name"] == "prefill") == SPANS.prefill_ms


def test_timeline(router: Router) -> None:
    asked = {"X-Penstock-Timeline": "1"}
    router.service.step = 1
    check_timeline(router.post("/v1/completions", BODY, **asked).json()["timeline"])
    last = events(router.post("/v1/chat/completions", CHAT | {"stream": True}, **asked))[-1]
    assert last["choices"] == [] and "usage" not in last
    check_timeline(last["timeline"])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    last = events(router.post("/v1/chat/completions", CHAT | options, **asked))[-1]
    check_timeline(last["timeline"])
    assert last["usage"]["completion_tokens"] and "timeline" not in router.post("/v1/completions", BODY).json()


class BackgroundStream(threading.Thread):
    """A client that reads one stream to its end."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.url, self.text = f"{router.url}/v1/completions", ""
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self.url, json=BODY | {"stream": True}, timeout=60) as response:
            for part in response.iter_text():
                self.text += part
                self.begun.set()


def test_running_streams_end_before_the_server_does() -> None:
    with running() as router:
        router.service.script = say("the water " * 9)
        client = BackgroundStream(router)
        assert client.begun.wait(60)
    client.join(60)
    assert client.text.endswith("data: [DONE]\n\n") and '"finish_reason":"stop"' in client.text


def test_a_stream_that_outlasts_the_drain_ends_in_an_error() -> None:
    with running() as router:
        router.service.pause_after = 3
        client = BackgroundStream(router)
        assert client.begun.wait(60)
    client.join(60)
    assert client.text.endswith("data: [DONE]\n\n") and "shutting down" in client.text
