"""`penstock chat` and `penstock complete` against the fake router: what is asked, what is printed, what goes wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.common.errors import Unavailable
from tests.router.fake_router import ANSWER, Router, ids_of, running, say


@pytest.fixture(scope="module")
def shared() -> Iterator[Router]:
    with running(api_key=("secret",)) as router:
        yield router


@pytest.fixture
def router(shared: Router, monkeypatch: pytest.MonkeyPatch) -> Router:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("PENSTOCK_CLIENT_URL", shared.url + "/v1")
    shared.service.requests.clear()
    shared.service.refusal, shared.service.script = None, say(ANSWER)
    return shared


def prompts(router: Router) -> list[str]:
    from tests.tiny_tokenizers import byte_level

    return [byte_level().decode(r.prompt_token_ids, skip_special_tokens=False) for r in router.service.requests]


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))


def test_a_quick_chat_prints_the_answer_and_nothing_else(router: Router, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--system-prompt", "Be brief.", "--max-tokens", "99", "--temperature", "0.5"]
    assert main(["chat", "-q", "Why?", *flags]) == 0
    assert capsys.readouterr() == (ANSWER + "\n", "")
    assert router.last.sampling.max_tokens == 99 and router.last.sampling.temperature == 0.5
    assert "system\nBe brief." in prompts(router)[0] and "user\nWhy?" in prompts(router)[0]


def test_a_conversation_goes_on_until_it_is_cleared(
    router: Router, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "one", "", "two", "/clear", "three")
    assert main(["chat", "--url", router.url, "--system-prompt", "Sys", "--model-name", "alias"]) == 0
    first, second, third = prompts(router)
    assert "one" in second and ANSWER in second and "two" in second and "two" not in first
    assert "one" not in third and "three" in third and "Sys" in third
    assert capsys.readouterr().out == (ANSWER + "\n") * 3


def test_completions_are_asked_line_by_line(
    router: Router, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "The river", "The mill")
    assert main(["complete", "--max-tokens", "99"]) == 0
    assert [r.prompt_token_ids for r in router.service.requests] == [ids_of("The river"), ids_of("The mill")]
    assert capsys.readouterr().out == (ANSWER + "\n") * 2
    assert main(["complete", "--quick", "Once", "--max-tokens", "3"]) == 0
    assert router.last.sampling.max_tokens == 3


def test_a_line_that_is_not_utf_8_is_asked_all_the_same(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    for errors in ("strict", "surrogateescape"):  # as the locale has it
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff\xfe b\n"), "utf-8", errors))
        assert main(["complete"]) == 0
        assert router.last.prompt_token_ids == ids_of("a \ufffd\ufffd b")


def test_without_an_input_there_is_nothing_to_ask(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat"]) == 0
    assert router.service.requests == []


def test_a_refusal_is_said_and_forgotten(
    router: Router, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    router.service.refusal = Unavailable("no pages left")
    assert main(["chat", "-q", "Why?"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("penstock: error: ") and "no pages left" in err
    typed(monkeypatch, "first")
    assert main(["chat"]) == 1
    capsys.readouterr()
    assert main(["complete", "-q", "x", "--api-key", "wrong"]) == 1
    assert "401" in capsys.readouterr().err
    assert main(["chat", "-q", "x", "--url", "http://127.0.0.1:9"]) == 1
    assert "cannot connect to 127.0.0.1 port 9: Connection refused" in capsys.readouterr().err


def test_options_from_a_file_the_environment_and_the_command_line(
    router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text("max_tokens: 5\nsystem-prompt: from the file\ntemperature: 0.25\n")
    monkeypatch.setenv("PENSTOCK_CLIENT_TEMPERATURE", "0.5")
    assert main(["chat", "-q", "x", "--config", str(path), "--max_tokens", "7"]) == 0
    sampling = router.last.sampling
    assert (sampling.max_tokens, sampling.temperature) == (7, 0.5) and "from the file" in prompts(router)[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["chat", "--url", "ftp://x"], "give http:// or https://"),
        (["complete", "--url", "http://["], "give http:// or https://"),
        (["chat", "--sytem-prompt", "x"], "unknown option --sytem-prompt; did you mean --system-prompt?"),
        (["chat", "hello"], "unexpected argument 'hello'"),
        (["complete", "--max-tokens", "many"], "invalid int value"),
        (["complete", "--config", "{file}"], "unknown option max_token; did you mean --max-tokens?"),
        (["chat", "--config", "{list}"], "expected true or false"),
    ],
)
def test_mistakes(flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.json").write_text(json.dumps({"max_token": 3}))
    (tmp_path / "list.json").write_text(json.dumps({"insecure": ["x"]}))
    files = {name: str(tmp_path / f"{name}.json") for name in ("file", "list")}
    assert main([flag.format(**files) for flag in flags]) == 2
    assert words in capsys.readouterr().err
