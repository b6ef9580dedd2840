"""`penstock top`: the picture of two answers, and the command against a router."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from penstock.cli import main
from penstock.common.messages import WorkerLoad
from penstock.router.fleet_view import fleet_view
from penstock.top import render
from tests.router.fake_router import running
from tests.worker_info import worker_info

INFO = worker_info(page_size=16, page_bytes=2048)


def answer(time_s: float, **load: int) -> dict[str, object]:
    return fleet_view(["m"], {"in_flight": 1, "finished": 7}, [(INFO, WorkerLoad(num_pages=100, **load))], time_s)


def test_rates_are_of_two_answers() -> None:
    before = answer(10.0, prompt_tokens=100, generation_tokens=10, free_pages=100)
    after = answer(
        12.0, prompt_tokens=500, generation_tokens=30, free_pages=60, running=2, prefix_queries=10, prefix_hits=5,
        transfer_bytes=3 << 20,
    )  # fmt: skip
    summary, head, line = render(after, before)
    assert summary.startswith("m: 1 in flight, 7 finished, 0 failed")
    assert dict(zip(head.split(), line.replace(" %", "%").replace(" MiB", "MiB").split(), strict=False)) == {
        "WORKER": "decode-0", "ROLE": "decode", "RUN": "2", "WAIT": "0", "QUEUED": "0", "PAGES": "40/100",
        "HELD": "40%", "HITS": "50%", "PROMPT/S": "200", "OUT/S": "10", "MOVED/S": "1.5MiB",
    }  # fmt: skip


@pytest.mark.parametrize("restarted", [False, True])
def test_without_an_earlier_answer_of_it_a_worker_has_no_rates(restarted: bool) -> None:
    before = answer(10.0, prompt_tokens=100, free_pages=100) if restarted else None
    if before is not None:
        before["workers"][0]["incarnation"] = "earlier"  # type: ignore[index]
    line = render(answer(12.0, free_pages=100), before)[-1]
    assert line.split()[-3:] == ["-", "-", "-"]


def test_columns_stand_below_each_other() -> None:
    _, head, line = render(answer(1.0, free_pages=0, running=123456), None)
    assert head.index("RUN") + len("RUN") == line.index("123456") + len("123456")


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that says this to whoever comes first; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_one() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=answer_one)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_once(capsys: pytest.CaptureFixture[str]) -> None:
    with running() as router:
        assert main(["top", "--once", "--interval", "0.05", "--url", str(router.http.base_url)]) == 0
    shown = capsys.readouterr().out
    assert "decode-0" in shown and "25/100" in shown and "\x1b" not in shown
    assert "stalled: no step for 30 s" in shown
    assert "hand-offs from prefill-0 to decode-0 fail; next try in 1 s" in shown


def test_why_it_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    with running(api_key=("secret",)) as router:
        url = str(router.http.base_url)
        assert main(["top", "--once", "--url", url]) == 1
        assert "the API key is missing or wrong" in capsys.readouterr().err
        assert main(["top", "--once", "--interval", "0.01", "--url", url, "--api-key", "secret"]) == 0
    assert main(["top", "--url", "http://127.0.0.1:9"]) == 1
    assert "does not tell of its fleet: " in capsys.readouterr().err
    with answering(b"+PONG\r\n") as url:  # no HTTP at all
        assert main(["top", "--url", url]) == 1
        assert "does not tell of its fleet: +PONG" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--interval", "inf"],
        ["--interval", "nan"],
        ["--interval", "1e10"],
        ["--interval", "0"],
        *(["--url", url] for url in ("nowhere", "http://", "http://[", "http://a:b", "http://a b", "http://\udcff")),
    ],
)
def test_mistakes(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"penstock: error: argument {argv[0]}: ") and error.count("\n") == 1
