"""`penstock run-batch`: every line gets an answer, in order; over the fake router, and once over a fleet of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.cli import main
from penstock.demo_model import CHECKPOINT
from penstock.run_batch import read_lines
from tests.router.fake_router import ANSWER, running

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 99}


def line(custom_id: str, url: str = "/v1/chat/completions", body: Any = CHAT, **fields: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **fields})


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


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


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    flags = ["-i", str(source), "-o", str(out), "--base-url", "http://127.0.0.1:9", "--disable-tqdm"]
    assert main(["run-batch", *flags]) == 1
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


@pytest.mark.system
def test_a_fleet_of_its_own(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(str(i), body=CHAT | {"temperature": 0, "max_tokens": 8}) for i in range(3)))
    fleet = [str(CHECKPOINT), "--device", "cpu", "--kv-cache-memory-bytes", "16MiB"]
    assert main(["run-batch", "-i", str(source), "-o", str(out), "--disable-tqdm", *fleet]) == 0
    texts = {answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers(out)}
    assert len(texts) == 1 and texts != {""}
