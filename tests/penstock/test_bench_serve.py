"""`penstock bench serve` against a server that notes when it sent what, and its pure parts against plain arithmetic."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from penstock.bench.arrivals import arrivals, ramp_up
from penstock.bench.serving_metrics import RequestRecord, percentile, summarise
from penstock.cli import main
from penstock.common.errors import ConfigError
from penstock.demo_model import CHECKPOINT
from penstock.http_client import Client, RequestError

FIRST_S, GAP_S = 0.02, 0.01
WITHIN = 0.03  # of what the server did


class Server:
    """Streams as many tokens as it is asked for, at the delays it is told; notes when it sent what."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Headers] = []
        self.sent: list[list[float]] = []  # of each request: when it came, and when its tokens left
        self.delays = lambda number: (FIRST_S, GAP_S)  # of request `number`: to its first token, between tokens
        self.url = ""
        self.fails = False

    @property
    def ids(self) -> list[str]:
        return [headers["x-request-id"] for headers in self.headers]

    async def models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": "m"}]})

    async def generate(self, request: Request) -> Response:
        times = [time.perf_counter()]
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.headers.append(request.headers)
        if self.fails:
            return JSONResponse({"error": {"message": "no room"}}, 429)
        self.sent.append(times)
        return StreamingResponse(self.stream(body, times, *self.delays(number)), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], times: list[float], first_s: float, gap_s: float) -> Any:
        chat = "messages" in body
        number = body["max_completion_tokens"] if chat else body["max_tokens"]

        def event(fields: dict[str, Any]) -> str:
            return f"data: {json.dumps(fields)}\n\n"

        if chat:
            yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for at in range(number):
            await asyncio.sleep(gap_s if at else first_s)
            times.append(time.perf_counter())
            text = {"delta": {"content": "a"}} if chat else {"text": "a"}
            yield event({"choices": [text]})
        yield event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": number}})
        yield "data: [DONE]\n\n"


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    routes = [Route("/v1/models", found.models)]
    routes += [Route(path, found.generate, methods=["POST"]) for path in ("/v1/completions", "/v1/chat/completions")]
    running = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        while not running.started:
            time.sleep(0.01)
        found.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield found
        running.should_exit = True
        thread.join()


def bench(server: Server, tmp_path: Path, *flags: str) -> dict[str, Any]:
    out = ["--result-dir", str(tmp_path), "--result-filename", "r.json", "--save-detailed", "--disable-tqdm"]
    assert main(["bench", "serve", "--base-url", server.url, *out, *flags]) == 0
    result: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    return result


def what_was_sent(sent: list[list[float]]) -> dict[str, float]:
    """The figures of requests from the moments at which the server got and answered them."""
    firsts = [times[1] - times[0] for times in sent]
    gaps = [later - earlier for times in sent for earlier, later in pairwise(times[1:])]
    lasted = max(times[-1] for times in sent) - min(times[0] for times in sent)
    return {
        "mean_ttft_ms": statistics.fmean(firsts) * 1e3,
        "mean_itl_ms": statistics.fmean(gaps) * 1e3,
        "mean_tpot_ms": statistics.fmean(gaps) * 1e3,
        "p50_itl_ms": statistics.median(gaps) * 1e3,
        "p100_e2el_ms": max(times[-1] - times[0] for times in sent) * 1e3,
        "request_goodput": sum(first <= 1.0 for first in firsts) / lasted,
    }


def test_it_measures_what_the_server_did(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Long delays: a client that runs late on a busy machine is late by much less.
    server.delays = lambda number: (0.6 if number % 2 else 1.4, 0.4)
    flags = ["--num-prompts", "6", "--output-len", "4", "--request-rate", "20"]
    flags += ["--trust-remote-code", "--tokenizer-mode", "auto", "--random-batch-size", "1"]
    flags += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,100"]
    for _ in range(8):  # a machine that stood still spoils a measurement; what measures wrongly is never right
        server.sent.clear()
        result = bench(server, tmp_path, *flags, "--goodput", "ttft:1000", "tpot:900")
        expected = what_was_sent(server.sent)
        if all(result[name] == pytest.approx(value, rel=WITHIN) for name, value in expected.items()):
            break
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=WITHIN)
    assert (result["completed"], result["failed"]) == (6, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (42, 24)
    assert [len(gaps) for gaps in result["itls"]] == [3] * 6 and result["generated_texts"] == ["aaaa"] * 6
    assert server.ids[0].startswith("bench-") and len(set(server.ids)) == len(server.ids) >= 6
    shown = capsys.readouterr().out
    assert "goodput" in shown and "ttft" in shown


def test_a_chat(server: Server, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    chat = ("--backend", "openai-chat", "--tokenizer", str(checkpoints["llama"]), "--temperature", "0")
    result = bench(
        server, tmp_path, "--num-prompts", "1", "--output-len", "3", "--input-len", "20", *chat, "--ignore-eos"
    )
    body = server.bodies[0]
    assert body["messages"][0]["content"] and body["temperature"] == 0 and body["ignore_eos"] is True
    assert result["ttfts"][0] > FIRST_S * 0.9, "the role's chunk is no token"
    assert len(result["itls"][0]) == 2 and result["backend"] == "openai-chat"


def test_prefixes_are_shared(server: Server, tmp_path: Path) -> None:
    flags = ["--dataset-name", "prefix_repetition", "--prefix-repetition-num-prefixes", "2", "--output-len", "1"]
    bench(server, tmp_path, "--num-prompts", "6", *flags, "--max-concurrency", "6")
    assert len({tuple(body["prompt"][:256]) for body in server.bodies}) == 2
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 6


def test_a_file_of_prompts(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two", "output_tokens": 2}\n')
    bench(server, tmp_path, "--dataset-name", "custom", "--dataset-path", str(path), "--output-len", "1")
    assert sorted(body["prompt"] for body in server.bodies) == ["one", "two"]


@pytest.mark.parametrize("source", ["mooncake", "azure"])
def test_a_trace_at_its_own_times(source: str, server: Server, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    if source == "mooncake":
        rows = [(0, 600, [1, 2]), (300, 700, [1, 3]), (400, 5000, [4, *range(5, 14)])]
        names = ("timestamp", "input_length", "hash_ids", "output_length")
        path.write_text("\n".join(json.dumps(dict(zip(names, (*row, 2), strict=True))) for row in rows))
    else:
        lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
        lines += [
            f"2023-11-16 18:17:03.{tenths}000000,{tokens},2" for tenths, tokens in ((1, 600), (4, 700), (5, 5000))
        ]
        path.write_text("\n".join(lines))
    flags = ["--dataset-name", "trace", "--dataset-path", str(path), "--trace-max-len", "1000"]
    result = bench(server, tmp_path, *flags, "--num-warmups", "1")
    warm_up, first, second = (body["prompt"] for body in server.bodies)
    assert (len(first), len(second)) == (600, 700) and warm_up == first
    assert (first[:512] == second[:512]) == (source == "mooncake") and first[512:] != second[512:600]
    assert [body["max_tokens"] for body in server.bodies] == [2, 2, 2] and result["completed"] == 2
    apart = server.sent[2][0] - server.sent[1][0]
    assert apart > 0.2, "sent together, in spite of the trace's times"


def test_a_rate_that_rises(server: Server, tmp_path: Path) -> None:
    rates = ["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "5", "--ramp-up-end-rps", "50"]
    result = bench(server, tmp_path, "--num-prompts", "8", "--output-len", "1", *rates, "--burstiness", "inf")
    gaps = [later - earlier for earlier, later in pairwise(sorted(result["start_times"]))]
    assert sum(gaps) == pytest.approx(sum(1 / (5 + 45 * i / 7) for i in range(1, 8)), abs=0.2)
    assert result["ramp_up_strategy"] == "linear" and result["ramp_up_end_rps"] == 50.0


def test_results_are_appended_and_headers_sent(server: Server, tmp_path: Path) -> None:
    out = ["--result-dir", str(tmp_path / "new"), "--result-filename", "r.jsonl", "--append-result", "--disable-tqdm"]
    flags = ["--num-prompts", "1", "--output-len", "1", "--header", "x-a=1", "x-b=2=3", "--served-model-name", "other"]
    for _ in range(2):
        assert main(["bench", "serve", "--base-url", server.url + "/v1/", *out, *flags]) == 0
    lines = (tmp_path / "new" / "r.jsonl").read_text().splitlines()
    assert [json.loads(line)["model_id"] for line in lines] == ["other", "other"]
    assert (server.headers[0]["x-a"], server.headers[0]["x-b"]) == ("1", "2=3")
    assert server.bodies[0]["model"] == "other"


def test_it_waits_for_a_server_that_starts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    async def models(client: Client) -> list[str]:
        asked.append(0.0)
        if len(asked) < 3:
            raise RequestError("nobody there")
        return ["m"]

    monkeypatch.setattr(Client, "models", models)
    flags = ["--num-prompts", "1", "--output-len", "1", "--ready-check-timeout-sec", "60", "--disable-tqdm"]
    assert main(["bench", "serve", "--base-url", server.url, *flags]) == 0 and len(asked) == 3


def test_requests_that_fail_are_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.fails = True
    assert main(["bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--disable-tqdm"]) == 1
    said = capsys.readouterr()
    assert "429 Too Many Requests: no room" in said.err and "requests that failed" in said.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--base-url", "http://127.0.0.1:9"], "no server at"),
        (["--goodput", "itl:5"], "itl is none of ttft, tpot, e2el"),
        (["--goodput", "ttft:fast"], "a number is wrong"),
        (["--percentile-metrics", "ttft,x"], "x is none of"),
        (["--metric-percentiles", "0"], "percentiles must be in"),
        (["--goodput", "ttft:nan"], "objectives at least 0 ms"),
        (["--request-rate", "0"], "--request-rate: must be at least 1e-06"),
        (["--request-rate", "1e-320"], "--request-rate: must be at least 1e-06"),
        (["--ramp-up-end-rps", "nan"], "--ramp-up-end-rps: must be from 1e-06 to 1e+09, got nan"),
        (["--ready-check-timeout-sec", "nan"], "--ready-check-timeout-sec: must be from 0 to 1e+09, got nan"),
        (["--base-url", "http://["], "--base-url: give http://"),
        (["--host", "a b"], "--host a b: give http://"),
        (["--host", "::1", "--port", "9"], "no server at http://[::1]:9"),
        (["--save-result", "--result-dir", "/proc/x"], "cannot write /proc/x/result.json"),
        (["--save-result", "--result-filename", "/proc"], "cannot write /proc: it is a folder"),
        (["--ramp-up-strategy", "linear"], "needs --ramp-up-start-rps and"),
        (["--ramp-up-end-rps", "3"], "need --ramp-up-strategy"),
        (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "3", "--ramp-up-end-rps", "2"], "must rise"),
        (["--ramp-up-strategy", "steep"], "invalid choice"),
        (["--header", "x"], "--header takes KEY=VALUE"),
        (["--hf-name", "x"], "vLLM's --hf-name is not supported: give the data set as a file"),
        (["--num-prompts", "0"], "--num-prompts: must be at least 1"),
        (["--random-batch-size", "2"], "invalid choice: 2 (choose from 1)"),
        (["--lora-modules", "a"], "LoRA adapters are not supported"),
        (["--num-promts", "3"], "unknown option --num-promts; did you mean --num-prompts?"),
        (["--extra-body", "[]"], "must be a JSON object"),
    ],
)
def test_mistakes(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("custom", '{"prompt": "a", "output_tokens": Infinity}'),
        ("custom", '{"prompt": "\\ud800"}'),
        ("custom", "[" * 100_000),
        ("lengths", "[" * 100_000),
        ("sharegpt", '[{"conversations": 5}]'),
        ("sharegpt", '[{"conversations": null}]'),
        ("sharegpt", '[{"conversations": {"a": 1, "b": 2}}]'),
        ("sharegpt", '[{"conversations": [{"value": "\\ud800"}, {"value": "b"}]}]'),
        ("trace", '{"timestamp": Infinity, "input_length": 512, "output_length": 5, "hash_ids": [1]}'),
    ],
)
def test_datasets_that_cannot_be(server: Server, tmp_path: Path, kind: str, text: str) -> None:
    (tmp_path / "data").write_text(text)
    flags = ["--dataset-name", kind, "--dataset-path", str(tmp_path / "data"), "--tokenizer", str(CHECKPOINT)]
    assert main(["bench", "serve", "--base-url", server.url, *flags]) == 2
    assert server.bodies == []


@given(st.integers(1, 200), st.floats(0.1, 1000), st.sampled_from([0.2, 1.0, 4.0, float("inf")]), st.integers(0, 9))
def test_arrivals_keep_the_rate(number: int, rate: float, burstiness: float, seed: int) -> None:
    times = arrivals(number, rate, burstiness, random.Random(seed))
    assert times == sorted(times) and len(times) == number
    assert times[-1] == pytest.approx(number / rate)


@given(st.integers(1, 100), st.floats(0.1, 10), st.floats(1, 20), st.sampled_from(["linear", "exponential"]))
def test_a_ramp_goes_from_one_rate_to_the_other(number: int, start: float, factor: float, strategy: str) -> None:
    times = [0.0, *ramp_up(number, strategy, start, start * factor, float("inf"), random.Random(0))]
    rates = [1 / (later - earlier) for earlier, later in pairwise(times)]
    assert rates[0] == pytest.approx(start) and (number == 1 or rates[-1] == pytest.approx(start * factor))
    middle = [b - a for a, b in pairwise(rates)] if strategy == "linear" else [b / a for a, b in pairwise(rates)]
    assert middle == pytest.approx(middle[:1] * len(middle), rel=1e-3, abs=1e-6)


def test_arrivals_all_at_once_and_wrong_ones() -> None:
    assert arrivals(3, float("inf"), 1.0, random.Random(0)) == [0.0, 0.0, 0.0]
    assert arrivals(0, 5.0, 1.0, random.Random(0)) == []
    for rate, burstiness in ((0.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="must be above 0"):
            arrivals(3, rate, burstiness, random.Random(0))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0.1, 100))
def test_percentiles_are_numpys(values: list[float], percentage: float) -> None:
    np = pytest.importorskip("numpy")
    assert percentile(values, percentage) == pytest.approx(float(np.percentile(values, percentage)), abs=1e-9)


def test_nothing_done_is_zeros_and_a_failure_is_no_latency() -> None:
    lost = RequestRecord(5, error="gone")
    result = summarise([lost], 2.0, [99], ["ttft", "itl"], {"ttft": 5})
    assert result["failed"] == 1 and result["mean_ttft_ms"] == 0.0 and result["request_goodput"] == 0.0
    one = RequestRecord(5, start=1.0, ttft=0.5, latency=1.5, itl=[0.25, 0.75], output_len=3)
    result = summarise([one, lost], 2.0, [50], ["tpot"], {"tpot": 500, "e2el": 1500})
    assert result["mean_tpot_ms"] == 500 and result["request_goodput"] == 0.5
    assert (result["max_concurrent_requests"], result["max_output_tokens_per_s"]) == (1, 2.0)


def test_without_a_tokenizer_a_chat_cannot_be_made(server: Server) -> None:
    from penstock.bench.serve import run_serve

    with pytest.raises(ConfigError, match="give --tokenizer"):
        run_serve(["--base-url", server.url, "--backend", "openai-chat"])
