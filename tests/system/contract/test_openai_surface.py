"""The official `openai` client against real fleets, one-phase and 1 + 1: text, usage, the other routes, mistakes."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
import tokenizers
from prometheus_client.parser import text_string_to_metric_families

from tests.system.fleets import assert_idle, metric, router_metric
from tests.system.openai_servers import (
    CONTEXT,
    GREEDY,
    MESSAGES,
    MESSAGES_AS_TEXT,
    PAGE,
    TEXT,
    WILD,
    Server,
)
from tests.tiny_models import random_prompts

pytestmark = pytest.mark.system
COMPUTED = "vllm:request_prefill_kv_computed_tokens_sum"


# ------------------------------------------------------------ text


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("skip", [True, False])
def test_joined_streams_equal_whole_answers_of_any_bytes(
    server: Server, tokenizer: tokenizers.Tokenizer, chat: bool, skip: bool
) -> None:
    fields = {"n": 6, "seed": 2, "temperature": 2.0, "max_tokens": 64, "skip_special_tokens": skip}
    whole = server.ask(chat=chat, **fields)
    assert server.ask(chat=chat, stream=True, **fields) == whole
    assert [answer.text for answer in whole] == [tokenizer.decode(a.ids, skip_special_tokens=skip) for a in whole]
    assert any(char > "\x7f" and char != "\ufffd" for answer in whole for char in answer.text), (
        "no multi-byte character"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server: Server, tokenizer: tokenizers.Tokenizer, stream: bool) -> None:
    prompt = "水力発電, naïve"
    [plain] = server.ask(prompt=prompt, **GREEDY)
    [echoed] = server.ask(prompt=prompt, echo=True, stream=stream, **GREEDY)
    assert echoed.text == prompt + plain.text and echoed.ids == plain.ids
    [echoed] = server.ask(prompt=tokenizer.encode(prompt).ids, echo=True, stream=stream, **GREEDY)
    assert echoed.text == prompt + plain.text


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts(server: Server, stream: bool) -> None:
    prompts = ["The river", "A water mill turns", "水"]
    alone = [choice for prompt in prompts for choice in server.ask(prompt=prompt, n=2, seed=5, **WILD)]
    assert server.ask(prompt=prompts, n=2, seed=5, stream=stream, **WILD) == alone
    ids = random_prompts([5, 11], seed=2)
    assert [a.ids for a in server.ask(prompt=ids, **GREEDY)] == [server.ask(prompt=p, **GREEDY)[0].ids for p in ids]


def test_token_ids_are_there_when_asked_for(server: Server, tokenizer: tokenizers.Tokenizer) -> None:
    answer = server.client.completions.create(
        model="tiny", prompt=TEXT, extra_body={"return_token_ids": True}, **GREEDY
    )
    assert answer.choices[0].prompt_token_ids == tokenizer.encode(TEXT).ids  # type: ignore[attr-defined]
    answer = server.client.completions.create(model="tiny", prompt=TEXT, **GREEDY)
    assert not hasattr(answer.choices[0], "token_ids")


@pytest.mark.parametrize("stream", [False, True])
def test_scored_tokens_are_named_by_their_ids_when_asked_for(server: Server, stream: bool) -> None:
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True, "ignore_eos": True}
    fields: Any = {"model": "tiny", "stream": stream, "extra_body": extra, **GREEDY}
    answer: Any = server.client.completions.create(prompt=TEXT, logprobs=2, **fields)
    names, ids = [], []
    for choice in (chunk.choices[0] for chunk in (answer if stream else [answer])):
        names += choice.logprobs.tokens if choice.logprobs else []
        ids += choice.token_ids
        tops = choice.logprobs.top_logprobs if choice.logprobs else []
        assert all(name.startswith("token_id:") for top in tops for name in top)
    assert names == [f"token_id:{token}" for token in ids] and len(ids) == 12
    chat: Any = server.client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **fields)
    names, ids = [], []
    for choice in (chunk.choices[0] for chunk in (chat if stream else [chat])):
        scored = choice.logprobs.content if choice.logprobs else []
        names += [token.token for token in scored]
        ids += getattr(choice, "token_ids", None) or []
        assert all(top.token.startswith("token_id:") for token in scored for top in token.top_logprobs)
    assert names == [f"token_id:{token}" for token in ids] and len(ids) == 12


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_a_chat(server: Server, stream: bool) -> None:
    """A last message of the assistant's, which the answer goes on from, is put before it; nothing else is."""
    begun = [*MESSAGES, {"role": "assistant", "content": "Because 水"}]
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}

    def ask(messages: Any, **extra: Any) -> str:
        answer: Any = server.client.chat.completions.create(
            model="tiny", messages=messages, stream=stream, extra_body=extra, **GREEDY
        )
        if not stream:
            return str(answer.choices[0].message.content)
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    assert ask(begun, echo=True, **goes_on) == "Because 水" + ask(begun, **goes_on)
    assert ask(MESSAGES, echo=True) == ask(MESSAGES)


# ------------------------------------------------------------ usage and timeline


@pytest.mark.parametrize("chat", [False, True])
def test_usage_counts_exactly(server: Server, tokenizer: tokenizers.Tokenizer, chat: bool) -> None:
    prompt = tokenizer.encode(MESSAGES_AS_TEXT if chat else TEXT, add_special_tokens=False).ids
    create: Any = server.client.chat.completions.create if chat else server.client.completions.create
    given = {"messages": MESSAGES} if chat else {"prompt": TEXT}
    values = {"model": "tiny", "n": 2, "seed": 1, "extra_body": {"ignore_eos": True}, **WILD, **given}
    numbers = (len(prompt), 24, len(prompt) + 24)
    usage = create(**values).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == numbers
    chunks = list(create(**values, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    usage = chunks[-1].usage
    assert chunks[-1].choices == []
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == numbers
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(create(**(values | {"n": 1}), stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert counts == sorted(counts) and counts[-1] == 12 and len(set(counts)) > 3
    assert all(chunk.usage is None for chunk in create(**values, stream=True))


def test_cached_tokens_and_salts(server: Server) -> None:
    [prompt] = random_prompts([26], seed=101)

    def cached(**extra: Any) -> int:
        answer = server.client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **GREEDY)
        assert answer.usage and answer.usage.prompt_tokens_details
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert [cached(), cached(), cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b")] == [
        0,
        24,
        0,
        24,
        0,
    ]
    assert cached(stop_token_ids=list(range(400))) == 24  # ends with its first token
    text = server.ask(prompt=prompt, **GREEDY)[0].text
    assert cached(stop=text[:1]) == cached(stop=text[-4:]) == 24  # the router ends it, no worker does
    with pytest.raises(openai.BadRequestError) as caught:
        cached(cache_salt="")
    assert caught.value.param == "cache_salt"


def test_choices_share_the_pages_of_their_prompt(server: Server) -> None:
    """Counted: four choices of 20 full pages and a part have them computed, and in a hand-off moved, once."""

    def figures() -> tuple[float, float]:
        """(pages that the decode worker read, tokens computed anywhere), of all that has ended."""
        assert_idle(server.fleet)
        pages = metric(server.fleet, "penstock:kv_transfer_pages_total", "decode")
        return pages, router_metric(server.fleet.url, COMPUTED)

    def ask() -> list[Any]:
        values: dict[str, Any] = {"model": "tiny", "prompt": prompt, "n": 4, "seed": 3, **WILD}
        answer = server.client.completions.create(**values, extra_body={"return_token_ids": True, "ignore_eos": True})
        return [choice.token_ids for choice in answer.choices]  # type: ignore[attr-defined]

    [prompt] = random_prompts([20 * PAGE + 2], seed=92)
    moved, computed = figures()
    outputs = ask()
    now = figures()
    assert now[0] - moved == (21 if server.fleet.config.prefill_workers else 0)
    assert now[1] - computed <= len(prompt) + 3 * PAGE
    assert ask() == outputs


@pytest.mark.parametrize("stream", [False, True])
def test_timeline(server: Server, stream: bool) -> None:
    paired = server.fleet.config.prefill_workers > 0
    [prompt] = random_prompts([37], seed=200 + stream)
    answer: Any = server.client.completions.create(
        model="tiny",
        prompt=prompt,
        stream=stream,
        extra_headers={"X-Penstock-Timeline": "1"},
        extra_body={"ignore_eos": True},
        **GREEDY,
    )
    timeline = list(answer)[-1].timeline if stream else answer.timeline
    names = [entry["name"] for entry in timeline]
    if paired:
        before, after = ["admission", "queue", "prefill"], ["transfer", "decode"]
    else:
        before, after = ["queue", "prefill"], ["decode"]
    assert names == ["received", "tokenised", "routed", *before, "first_token", *after, "finished"]
    marks = [entry["ms"] for entry in timeline if entry["kind"] == "mark"]
    assert marks[0] == 0 and marks == sorted(marks)
    entries = {entry["name"]: entry for entry in timeline}
    assert (entries["prefill"]["cached_tokens"], entries["prefill"]["computed_tokens"]) == (0, 37)
    if paired:
        moved = entries["transfer"]
        assert moved["transfer_bytes"] > 0 and moved["transfer_pages"] >= 37 // PAGE
        assert moved["transport"] in ("nixl", "shm") and moved["checksum_failures"] == 0
    assert not hasattr(server.client.completions.create(model="tiny", prompt=prompt, **GREEDY), "timeline")


def test_request_ids(server: Server) -> None:
    answer = server.client.completions.with_raw_response.create(
        model="tiny", prompt="a", extra_headers={"X-Request-Id": "mine"}, **GREEDY
    )
    assert answer.headers["x-request-id"] == "mine" and answer.parse().id == "cmpl-mine"
    for header, body, wanted in (({}, "mine", "mine"), ({"X-Request-Id": "first"}, "mine", "first")):
        chat = server.client.chat.completions.create(
            model="tiny", messages=MESSAGES, extra_headers=header, extra_body={"request_id": body}, **GREEDY
        )
        assert chat.id == f"chatcmpl-{wanted}"


# ------------------------------------------------------------ the other routes


def test_models_health_version(server: Server) -> None:
    [card] = server.client.models.list().data
    assert (card.id, card.owned_by, card.max_model_len) == ("tiny", "penstock", CONTEXT)  # type: ignore[attr-defined]
    health = server.http.get("/health")
    workers = {"prefill": server.fleet.config.prefill_workers, "decode": 1}
    assert health.status_code == 200 and health.json()["workers"] == workers
    assert server.http.get("/version").json()["version"]


def test_metrics_parse_and_have_vllms_names(server: Server) -> None:
    server.ask(**GREEDY)
    families = {family.name: family for family in text_string_to_metric_families(server.http.get("/metrics").text)}
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens", "generation_tokens",
        "prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "request_success",
        "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
        "request_prompt_tokens", "request_generation_tokens", "request_queue_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds",
    ):  # fmt: skip
        samples = families[f"vllm:{name}"].samples
        assert samples and all(sample.labels["model_name"] == "tiny" for sample in samples), name
    finished = families["vllm:request_success"].samples
    assert sum(sample.value for sample in finished if sample.labels["finished_reason"] == "length") >= 1
    engines = {sample.labels["engine"] for sample in families["vllm:num_requests_running"].samples}
    assert engines == set(server.fleet.workers())


def test_keys(servers: dict[str, Server]) -> None:
    guarded, free = servers["pair"], servers["one-phase"]
    for key in ("sk-wrong", "sk", "none"):
        with openai.OpenAI(base_url=f"{guarded.fleet.url}/v1", api_key=key, max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.completions.create(model="tiny", prompt="a")
            assert caught.value.status_code == 401 and caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
    for key, url in (("sk-second", guarded.fleet.url), ("anything", free.fleet.url)):
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            assert client.models.list().data
    assert httpx.get(f"{guarded.fleet.url}/health", timeout=60).status_code == 200
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert httpx.post(guarded.fleet.url + path, json=body, timeout=60).status_code == 401
        assert guarded.http.post(path, json=body, timeout=60).status_code == 200
        assert httpx.post(free.fleet.url + path, json=body, timeout=60).status_code == 200


# ------------------------------------------------------------ mistakes


def test_unknown_models_are_404(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="`gpt-0` does not exist"):
        server.client.completions.create(model="gpt-0", prompt="a")
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(model="gpt-0", messages=MESSAGES)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_too_long_gives_both_numbers(server: Server, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=rf"{CONTEXT} tokens: a prompt of 300 tokens") as caught:
        server.client.completions.create(model="tiny", prompt=[9] * 300, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=rf"{CONTEXT} tokens.*{CONTEXT - 10} in the prompt, 20 for"):
        server.client.completions.create(model="tiny", prompt=[9] * (CONTEXT - 10), max_tokens=20, stream=stream)
    with pytest.raises(openai.BadRequestError, match=rf"{CONTEXT} tokens.*\d+ (in the prompt|characters)"):
        server.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": TEXT * 20}], stream=stream
        )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": [400]}, "stop_token_ids"),
        ({"seed": 2**70}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"400": 1}}, "logit_bias"),
        ({"allowed_token_ids": [400]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_wrong_values_are_400_and_named(
    servers: dict[str, Server], path: str, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "tiny", **({"prompt": "a"} if path == "/v1/completions" else {"messages": MESSAGES}), **fields}
    answer = servers["pair"].http.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and param in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b"{"),
        ("/v1/completions", b"[]"),
        ("/v1/completions", b"{}"),
        ("/v1/completions", b'{"prompt": ""}'),
        ("/v1/completions", b'{"prompt": [400]}'),
        ("/v1/completions", b'{"prompt": {"a": 1}}'),
        ("/v1/completions", b'{"prompt": "a", "logprobs": 21}'),
        ("/v1/chat/completions", b"{}"),
        ("/v1/chat/completions", b'{"messages": []}'),
        ("/v1/chat/completions", b'{"messages": [{"content": "no role"}]}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}'),
    ],
)
def test_wrong_bodies_are_400(servers: dict[str, Server], path: str, body: bytes) -> None:
    answer = servers["pair"].http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error" and answer.json()["error"]["message"]


def test_unknown_fields_are_ignored(server: Server) -> None:
    plain = server.ask(**GREEDY)
    answer = server.client.completions.create(
        model="tiny", prompt=TEXT, user="somebody", extra_body={"ignore_eos": True, "no_such_field": 3}, **GREEDY
    )
    assert answer.choices[0].text == plain[0].text
