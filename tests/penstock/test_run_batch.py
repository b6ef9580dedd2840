"""`penstock run-batch`: every line gets an answer, in order; over the fake router, and once over a fleet of its own."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import run_batch
from penstock.cli import main
from penstock.common.config import ServeConfig
from penstock.common.errors import Overloaded, PenstockError, Unavailable
from penstock.common.messages import GenerateRequest, TokenDelta
from penstock.demo_model import CHECKPOINT
from penstock.http_client import Reply
from penstock.run_batch import DOUBLINGS, MAX_OPEN, Retries, read_lines
from tests.router.fake_router import ANSWER, Script, running, say

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 99}


def line(custom_id: str, url: str = "/v1/chat/completions", body: Any = CHAT, **fields: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **fields})


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().split("\n") if text]


def run(source: Path, out: Path, *flags: str) -> int:
    return main(["run-batch", "-i", str(source), "-o", str(out), "--disable-tqdm", *flags])


def test_answers_come_in_the_order_of_the_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    completion = line("b", "/v1/completions", {"prompt": "x", "max_tokens": 99})
    response = line("r", "/v1/responses", {"input": "x", "max_output_tokens": 99})
    source.write_text("\n".join([line("a"), "", completion, response, *(line(f"c{i}") for i in range(20))]))
    with running() as router:
        files = ["-i", str(source), "-o", str(out)]
        assert main(["run-batch", *files, "--base-url", router.url + "/v1", "--disable-tqdm"]) == 0
    found = answers(out)
    assert [answer["custom_id"] for answer in found] == ["a", "b", "r", *(f"c{i}" for i in range(20))]
    assert found[0]["response"]["body"]["choices"][0]["message"]["content"] == ANSWER
    assert found[1]["response"]["body"]["choices"][0]["text"] == ANSWER
    assert found[2]["response"]["body"]["output"][0]["content"][0]["text"] == ANSWER
    assert all(answer["error"] is None and answer["response"]["status_code"] == 200 for answer in found)
    assert found[0]["response"]["request_id"] in found[0]["response"]["body"]["id"]
    assert "23 requests, 0 without an answer" in capsys.readouterr().err


def test_what_is_wrong_with_a_line_is_its_own_matter(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line("bad", body={"messages": []}), "{", line("good"), line("far", "/v1/embeddings")]
    source.write_text("\n".join(lines))
    with running(api_key=("secret",)) as router:
        flags = ["-i", str(source), "-o", str(out), "--base-url", router.url, "--api-key", "secret"]
        assert main(["run-batch", *flags, "--disable-tqdm"]) == 1
    bad, broken, good, far = answers(out)
    assert (
        bad["response"]["status_code"] == 400 and "at least one message" in bad["response"]["body"]["error"]["message"]
    )
    assert broken["custom_id"] is None and broken["error"]["message"].startswith("line 2: no JSON")
    assert good["response"]["status_code"] == 200
    assert far["error"]["code"] == "invalid_request" and "/v1/embeddings" in far["error"]["message"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "an object with custom_id"),
        ('{"custom_id": 3}', "an object with custom_id"),
        (line("a", method="GET"), "method must be POST"),
        (line("a", body=[]), "body must be an object"),
        (line("a", body={"stream": True}), "body.stream must not be set"),
    ],
)
def test_lines_that_cannot_be_sent(text: str, reason: str) -> None:
    (found,) = read_lines(text)
    assert reason in found.error


def test_lines_end_at_newlines_only() -> None:
    body = {"prompt": "a\u2028b\u2029c\u0085d", "max_tokens": 2}
    text = json.dumps(json.loads(line("a", "/v1/completions", body)), ensure_ascii=False)
    found = read_lines(f"{text}\r\n\r\n{text}\n")
    assert [(each.body, each.error) for each in found] == [(body, "")] * 2


def test_half_a_surrogate_pair_is_written_as_it_was_read(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([line("\ud800"), line("wörld 😀")]))
    with running() as router:
        assert run(source, out, "--base-url", router.url) == 0
    assert [answer["custom_id"] for answer in answers(out)] == ["\ud800", "wörld 😀"]
    assert "wörld 😀" in out.read_text()


def test_a_line_nested_too_deeply_is_its_own_matter(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    limit = sys.getrecursionlimit()  # of json, too, less the calls it is under: what it reads it may fail to write
    depths = [limit // 2, *range(limit - 80, limit, 3), 100_000]
    deep = [line(str(d), field=0).replace('"body": {', '"body": {"a": ' + "[" * d + "]" * d + ", ") for d in depths]
    source.write_text("\n".join([*deep, line("good")]))
    with running() as router:
        assert run(source, out, "--base-url", router.url) == 1
    *found, good = answers(out)
    assert len(found) == len(deep) and good["response"]["status_code"] == 200
    assert found[-1]["error"]["message"].endswith("nested too deeply")


def refusing(refusals: Sequence[PenstockError]) -> Script:
    """One request after another is refused, then all are answered."""
    left = list(refusals)

    def script(request: GenerateRequest) -> list[TokenDelta | PenstockError]:
        return [left.pop(0)] if left else say(ANSWER)(request)

    return script


def test_lines_that_a_server_has_no_room_for_are_tried_again(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(str(i)) for i in range(5)))
    with running() as router:
        router.service.script = refusing([Overloaded("full"), Unavailable("away"), Overloaded("full")])
        assert run(source, out, "--base-url", router.url) == 0
        assert len(router.service.requests) == 5 + 3
    assert [answer["custom_id"] for answer in answers(out)] == [str(i) for i in range(5)]


def test_tries_come_to_an_end(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(str(i)) for i in range(4)))
    with running() as router:
        router.service.refusal = Overloaded("full", retry_after_s=60)
        assert run(source, out, "--base-url", router.url, "--retry-timeout-s", "59") == 1
        assert len(router.service.requests) == 4
    assert [answer["response"]["status_code"] for answer in answers(out)] == [429] * 4


NEW_YEAR = 1767225600.0  # 2026-01-01 00:00:00 UTC


@pytest.mark.parametrize(
    ("status", "headers", "tries", "wait_s"),
    [
        (200, {}, 0, None),
        (400, {"retry-after": "1"}, 0, None),
        (500, {"retry-after": "1"}, 0, None),
        (429, {"retry-after": "7"}, 0, 7),
        (503, {"retry-after": "7"}, 2, 7),
        (503, {"retry-after": "7"}, 3, 8),
        (503, {"retry-after": "Thu, 01 Jan 2026 00:00:20 GMT"}, 0, 20),
        (503, {"retry-after": "Wed, 31 Dec 2025 00:00:00 GMT"}, 0, 1),
        (429, {"retry-after": "-3"}, 0, 1),
        (429, {"retry-after": "nan"}, 0, 1),
        (429, {"retry-after": "soon"}, 1, 2),
        (429, {}, 5, 2**DOUBLINGS),
        (429, {}, 5000, 2**DOUBLINGS),
        (429, {"retry-after": "60"}, 0, 60),
        (429, {"retry-after": "61"}, 0, None),
        (429, {"retry-after": "inf"}, 0, None),
        (429, {"retry-after": "1", "x-should-retry": "false"}, 0, None),  # it will never fare better
    ],
)
def test_when_a_line_is_tried_again(status: int, headers: dict[str, str], tries: int, wait_s: float | None) -> None:
    retries = Retries(60.0, now=1000.0)
    assert retries.wait_s(Reply(status, headers, ""), tries, 1000.0, NEW_YEAR) == wait_s


def test_lines_wait_as_long_as_others_are_answered() -> None:
    retries, full = Retries(60.0, now=0.0), Reply(429, {"retry-after": "1"}, "")
    for minute in range(1, 100):  # behind a hundred others, a minute each
        assert retries.wait_s(full, 0, 60.0 * minute - 1.0, 0.0) == 1.0
        assert retries.wait_s(Reply(200, {}, ""), 0, 60.0 * minute, 0.0) is None
    assert retries.wait_s(full, 0, 60.0 * 100 - 0.5, 0.0) is None


def test_a_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    out.write_text("yesterday's\n")
    assert run(source, out, "--base-url", "http://127.0.0.1:9") == 2
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
    assert out.read_text() == "yesterday's\n"


def test_a_server_that_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did not answer says so."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    monkeypatch.setattr(run_batch, "_server", lambda options, rest: contextlib.nullcontext(options.base_url))
    assert run(source, out, "--base-url", "http://127.0.0.1:9") == 1
    assert answers(out)[0]["error"]["code"] == "connection_error"


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(line("a"))
    for flags, words in (
        (["-i", "nowhere", "-o", "x"], "cannot be read"),
        (["-i", str(source), "-o", "/proc/x/y", "--base-url", "http://h"], "cannot be written"),
        (["-i", str(source), "-o", str(tmp_path / "o"), "--base-url", "http://h", "MODEL"], "unexpected argument"),
        (["-i", str(source), "-o", str(tmp_path / "o")], "MODEL is missing"),
    ):
        assert main(["run-batch", *flags]) == 2
        assert words in capsys.readouterr().err


def test_what_was_there_outlives_a_start_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    out.write_text("yesterday's\n")
    assert run(source, out) == 2
    assert "MODEL is missing" in capsys.readouterr().err
    for url in ("ftp://h", "http://[", "h:8000", "http://h:port", ""):
        with pytest.raises(SystemExit, match="2"):
            run(source, out, "--base-url", url)
        assert "--base-url: give http:// or https://" in capsys.readouterr().err
    assert out.read_text() == "yesterday's\n"


def test_what_was_there_is_replaced_by_the_answers(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    out.write_text("yesterday's\n" * 1000)
    with running() as router:
        assert run(source, out, "--base-url", router.url) == 0
    assert [answer["custom_id"] for answer in answers(out)] == ["a"]


def test_the_input_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, linked, hard = tmp_path / "in.jsonl", tmp_path / "linked", tmp_path / "hard"
    source.write_text(line("a"))
    linked.symlink_to(source)
    hard.hardlink_to(source)
    for out in (source, linked, hard):
        assert run(source, out, "--base-url", "http://127.0.0.1:9") == 2
        assert "is the input file" in capsys.readouterr().err
    assert source.read_text() == line("a")


def test_a_full_disk_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(line(str(i)) for i in range(20)))
    with running() as router:
        assert run(source, Path("/dev/full"), "--base-url", router.url) == 2
    assert "--output-file /dev/full cannot be written: [Errno 28]" in capsys.readouterr().err


def test_answers_may_go_into_a_pipe(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(line("a"))
    read, write = os.pipe()
    with open(read) as pipe, running() as router:
        try:
            assert run(source, Path(f"/dev/fd/{write}"), "--base-url", router.url) == 0
        finally:
            os.close(write)
        assert json.loads(pipe.read())["custom_id"] == "a"


LIMITS = ["--max-inflight", "2", "--max-queued", "1", "--queue-timeout-s", "0.001", "--progress-timeout-s", "0.5"]


def test_in_a_fleet_of_its_own_everything_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, shared = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "serve.json"
    source.write_text(line("a"))
    shared.write_text(json.dumps({"api_key": ["k", "l"], "api_key_weights": ["3", "1"], "slo_ttft": 5, "slo_tpot": 5}))
    configs: list[ServeConfig] = []

    @contextlib.contextmanager
    def fleet(config: ServeConfig) -> Iterator[SimpleNamespace]:
        configs.append(config)
        with running() as router:
            yield SimpleNamespace(url=router.url)

    monkeypatch.setattr("penstock.fleet.Fleet", fleet)
    assert run(source, out, str(CHECKPOINT), "--config", str(shared), *LIMITS) == 0
    (config,) = configs
    assert min(config.max_inflight, config.max_queued) >= MAX_OPEN * 1024  # a request's choices: docs/http.md
    assert min(config.queue_timeout_s, config.progress_timeout_s) > 30 * 86400
    assert (config.slo_ttft, config.slo_tpot, config.api_key) == (0, 0, ())


@pytest.mark.system
def test_a_fleet_of_its_own(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = CHAT | {"temperature": 0, "max_tokens": 8, "n": 4}
    source.write_text("\n".join(line(str(i), body=body) for i in range(16)))
    fleet = [str(CHECKPOINT), "--device", "cpu", "--kv-cache-memory-bytes", "16MiB", "--max-num-seqs", "1", *LIMITS]
    assert run(source, out, "--retry-timeout-s", "0", *fleet) == 0
    texts = {answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers(out)}
    assert len(texts) == 1 and texts != {""}
