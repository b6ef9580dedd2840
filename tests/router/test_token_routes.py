"""/tokenize, /detokenize, and vLLM's small routes: /v1/models/{id}, /load, /ping, /invocations."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.router.fake_router import ANSWER, CONTEXT, VOCAB, Router, ids_of, running

MESSAGES = [{"role": "user", "content": "the water"}]


def test_a_prompt(router: Router) -> None:
    found = router.post("/tokenize", {"model": "tiny", "prompt": "the water", "return_token_strs": True}).json()
    assert found["tokens"] == ids_of("the water") and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == CONTEXT
    assert "".join(found["token_strs"]) == "theĠwater"
    assert router.post("/tokenize", {"prompt": "the water"}).json()["token_strs"] is None


def test_a_chat_is_what_a_chat_request_computes(router: Router) -> None:
    found = router.post("/tokenize", {"messages": MESSAGES}).json()
    router.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1})
    assert found["tokens"] == router.last.prompt_token_ids


@pytest.mark.parametrize("text", ["", "the water", "naïve 😀 <|end|>"])
def test_there_and_back(router: Router, text: str) -> None:
    tokens = router.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert router.post("/detokenize", {"tokens": tokens}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/tokenize", {}, 400, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "either prompt or messages"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "does not exist"),
        ("/tokenize", {"messages": []}, 400, "at least one message"),
        ("/tokenize", {"prompt": "a " * 100_000}, 400, "maximum context length"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [VOCAB]}, 400, "ids from 0 to"),
        ("/detokenize", {"tokens": [-1]}, 400, "ids from 0 to"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "does not exist"),
    ],
)
def test_errors(router: Router, path: str, body: dict[str, Any], status: int, words: str) -> None:
    response = router.post(path, body)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_a_body_that_is_not_json(router: Router) -> None:
    assert router.http.post("/tokenize", content=b"{").status_code == 400
    assert router.http.post("/invocations", content=b'{"messages"').status_code == 400


def test_one_model(router: Router) -> None:
    assert router.openai.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        router.openai.models.retrieve("other")


def test_a_models_name_may_hold_slashes() -> None:
    with running(served_model_name=("maker/model",)) as router:
        assert router.openai.models.retrieve("maker/model").id == "maker/model"


def test_ping_and_load(router: Router) -> None:
    assert router.http.get("/ping").status_code == router.http.post("/ping").status_code == 200
    router.service.is_ready = False
    assert router.http.get("/ping").status_code == 503
    assert router.http.get("/load").json() == {"server_load": 0}


def test_invocations_take_chats_and_completions(router: Router) -> None:
    chat = router.post("/invocations", {"messages": MESSAGES, "max_tokens": 99}).json()
    assert chat["object"] == "chat.completion" and chat["choices"][0]["message"]["content"] == ANSWER
    text = router.post("/invocations", {"prompt": 'about "messages"', "max_tokens": 99}).json()
    assert text["object"] == "text_completion" and text["choices"][0]["text"] == ANSWER
