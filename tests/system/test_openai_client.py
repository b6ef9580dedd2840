"""The official `openai` client against real fleets, one-phase and 1 prefill + 1 decode: every parameter, both ways.

What the answers must be comes from Hugging Face: its tokens, its logits, its penalties. A stream's pieces, joined, must
be the answer that comes in one piece.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from tests.system.fleets import fleet
from tests.system.openai_servers import MESSAGES, MESSAGES_AS_TEXT, TEXT, Change, Reference, Server, Text
from tests.tiny_models import random_prompts

pytestmark = pytest.mark.system

KEY = "sk-first"
CONTEXT = 160
PAGE = 4
END_IDS = (1, *range(40, 60))  # in generation_config.json only, but for the first
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
WILD: dict[str, Any] = {"temperature": 4.0, "max_tokens": 12}
MODES = ("one-phase", "pair")


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("client") / "model"
    shutil.copytree(checkpoints["qwen2"], path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(END_IDS)}))
    return path


@pytest.fixture(scope="module")
def servers(model: Path) -> Iterator[dict[str, Server]]:
    # Tests here look at hand-offs that succeed: on a busy machine a short lease may end before its pages have landed.
    options: dict[str, dict[str, Any]] = {
        "one-phase": {},
        "pair": {"prefill_workers": 1, "decode_workers": 1, "api_key": (KEY, "sk-second"), "lease_s": 30.0},
    }
    with contextlib.ExitStack() as stack:
        found = {}
        for mode in MODES:
            running = stack.enter_context(
                fleet(model, max_model_len=CONTEXT, block_size=PAGE, max_num_batched_tokens=16, **options[mode])
            )
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=60)
            http = httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
            found[mode] = Server(running, stack.enter_context(client), stack.enter_context(http))
        yield found


@pytest.fixture(params=MODES)
def server(servers: dict[str, Server], request: pytest.FixtureRequest) -> Server:
    return servers[request.param]


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


# ------------------------------------------------------------ tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_greedy_text_is_hugging_faces(
    server: Server, tokenizer: tokenizers.Tokenizer, reference: Reference, chat: bool, stream: bool
) -> None:
    prompt = tokenizer.encode(MESSAGES_AS_TEXT if chat else TEXT, add_special_tokens=False).ids
    [answer] = server.ask(chat=chat, stream=stream, **GREEDY)
    assert answer.ids == reference.greedy(tuple(prompt), 12)
    assert answer.text == tokenizer.decode(answer.ids)
    assert (answer.finish_reason, answer.stop_reason) == ("length", None)


def test_generation_ends_where_hugging_faces_does(server: Server, reference: Reference) -> None:
    ended = 0
    for prompt in random_prompts([3, 9, 14, 22], seed=21):
        expected = reference.generate(prompt, 40)
        [answer] = server.ask(prompt=prompt, temperature=0, max_tokens=40, ignore_eos=False)
        assert answer.ids == expected
        if len(expected) < 40:
            ended += 1
            assert expected[-1] in END_IDS and (answer.finish_reason, answer.stop_reason) == ("stop", None)
            [longer] = server.ask(prompt=prompt, temperature=0, max_tokens=40)
            assert longer.ids[: len(expected)] == expected and len(longer.ids) == 40
            [least] = server.ask(prompt=prompt, temperature=0, max_tokens=40, min_tokens=39, ignore_eos=False)
            assert len(least.ids) >= 39 and not set(least.ids[:38]) & set(END_IDS)
    assert ended >= 2


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_favoured_and_ruled_out(
    server: Server, tokenizer: tokenizers.Tokenizer, reference: Reference, chat: bool
) -> None:
    """From the first token, which a prefill worker draws, on; a banned word may span both workers."""
    prompt = tuple(tokenizer.encode(MESSAGES_AS_TEXT if chat else TEXT, add_special_tokens=False).ids)
    plain = reference.greedy(prompt, 8)
    bias = {plain[0]: -100.0, plain[3]: 2.0}

    def biased(logits: torch.Tensor, _: list[int], __: list[int]) -> torch.Tensor:
        for token, value in bias.items():
            logits[token] += value
        return logits

    [answer] = server.ask(chat=chat, temperature=0, max_tokens=8, logit_bias={str(t): v for t, v in bias.items()})
    assert answer.ids == reference.greedy(prompt, 8, biased) and plain[0] not in answer.ids
    allowed = [token for token in range(5, 400) if tokenizer.decode([token]).isascii() and token not in plain]
    others = torch.tensor([token for token in range(400) if token not in allowed])

    def only_allowed(logits: torch.Tensor, _: list[int], __: list[int]) -> torch.Tensor:
        return logits.index_fill(0, others, float("-inf"))

    [answer] = server.ask(chat=chat, temperature=0, max_tokens=8, allowed_token_ids=allowed)
    letters = reference.greedy(prompt, 8, only_allowed)
    assert answer.ids == letters
    pairs = [letters[at : at + 2] for at in range(7)]
    pair = next(p for p in pairs if tokenizer.encode((tokenizer.decode(p)).lstrip(), add_special_tokens=False).ids == p)
    word = tokenizer.decode(pair)
    spaced = tokenizer.encode(" " + word, add_special_tokens=False).ids
    banned = NoBadWordsLogitsProcessor([pair, spaced])

    def without_word(logits: torch.Tensor, _: list[int], output: list[int]) -> torch.Tensor:
        return banned(torch.tensor([output], dtype=torch.long), only_allowed(logits, [], [])[None])[0]

    [answer] = server.ask(chat=chat, temperature=0, max_tokens=8, allowed_token_ids=allowed, bad_words=[word])
    assert answer.ids == reference.greedy(prompt, 8, without_word) != letters


@pytest.mark.parametrize("chat", [False, True])
def test_max_tokens_and_max_completion_tokens(server: Server, chat: bool) -> None:
    if chat:
        [answer] = server.ask(chat=True, temperature=0, max_completion_tokens=3, max_tokens=9)
        assert len(answer.ids) == 3
        whole = server.client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"ignore_eos": True})
        assert whole.usage and whole.usage.total_tokens == CONTEXT  # open: the rest of the context
        assert whole.choices[0].finish_reason == "length"
    else:
        assert len(server.ask(temperature=0)[0].ids) == 16  # OpenAI's default
        assert len(server.ask(temperature=0, max_tokens=5)[0].ids) == 5


@pytest.mark.parametrize("chat", [False, True])
def test_seeds_and_choices(servers: dict[str, Server], chat: bool) -> None:
    answers = [
        server.ask(chat=chat, n=3, seed=9, stream=stream, top_p=0.9, top_k=50, **WILD)
        for server in servers.values()
        for stream in (False, True, False)
    ]
    assert all(answer == answers[0] for answer in answers)
    assert len({tuple(choice.ids) for choice in answers[0]}) == 3
    for server in servers.values():
        assert server.ask(chat=chat, seed=9, top_p=0.9, top_k=50, **WILD) == answers[0][:1]
        assert server.ask(chat=chat, n=3, seed=10, top_p=0.9, top_k=50, **WILD) != answers[0]
        assert server.ask(chat=chat, **WILD) != server.ask(chat=chat, **WILD)  # without a seed


# ------------------------------------------------------------ stopping


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_stop_strings(server: Server, tokenizer: tokenizers.Tokenizer, chat: bool, include: bool) -> None:
    [free] = server.ask(chat=chat, **GREEDY)
    ends = [len(tokenizer.decode(free.ids[: count + 1])) for count in range(12)]
    first = next(at for at in range(4, 9) if ends[at - 1] < ends[at] < ends[at + 1])
    stop = free.text[ends[first] - 1 : ends[first] + 1]  # begins in one token and ends in the next
    position = free.text.index(stop)
    fields = {"stop": ["never in there", stop], "include_stop_str_in_output": include, **GREEDY}
    [whole] = server.ask(chat=chat, **fields)
    assert whole.text == free.text[: position + len(stop) * include]
    assert (whole.finish_reason, whole.stop_reason) == ("stop", stop)
    kept = next(count for count, end in enumerate(ends, 1) if end >= position + len(stop))
    assert whole.ids == free.ids[:kept] and kept < 12
    assert server.ask(chat=chat, stream=True, **fields) == [whole]
    assert server.ask(chat=chat, **(fields | {"stop": stop})) == [whole]


def test_the_first_token_may_be_the_last(server: Server, tokenizer: tokenizers.Tokenizer) -> None:
    """The prefill worker samples it: whatever ends there must end on both sides."""
    [free] = server.ask(**GREEDY)
    for stream in (False, True):
        [answer] = server.ask(stream=stream, stop_token_ids=[free.ids[0]], **GREEDY)
        assert (answer.ids, answer.text) == (free.ids[:1], "")
        assert (answer.finish_reason, answer.stop_reason) == ("stop", free.ids[0])
        [answer] = server.ask(stream=stream, temperature=0, max_tokens=1)
        assert (answer.ids, answer.finish_reason) == (free.ids[:1], "length")
        first = tokenizer.decode(free.ids[:1])
        [answer] = server.ask(stream=stream, stop=first, **GREEDY)
        assert (answer.ids, answer.text, answer.stop_reason) == (free.ids[:1], "", first)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_stop_token_ids_and_min_tokens(
    server: Server, tokenizer: tokenizers.Tokenizer, chat: bool, stream: bool
) -> None:
    [free] = server.ask(chat=chat, **GREEDY)
    stop, first = free.ids[5], free.ids.index(free.ids[5])
    [answer] = server.ask(chat=chat, stream=stream, stop_token_ids=[stop], **GREEDY)
    assert answer.ids == free.ids[: first + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == tokenizer.decode(free.ids[:first])
    [later] = server.ask(chat=chat, stream=stream, stop_token_ids=[stop], min_tokens=11, **GREEDY)
    assert len(later.ids) >= 11 and stop not in later.ids[:10]


# ------------------------------------------------------------ scores


def _agree(answer: Text, expected: torch.Tensor) -> None:
    assert len(answer.logprobs) == len(answer.ids) == len(expected)
    chosen = expected[range(len(answer.ids)), answer.ids]
    assert [logprob for logprob, _ in answer.logprobs] == pytest.approx(chosen.tolist(), abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, {**WILD, "seed": 4}], ids=["greedy", "sampled"])
def test_logprobs_of_completions(
    server: Server, tokenizer: tokenizers.Tokenizer, reference: Reference, sampling: dict[str, Any], stream: bool
) -> None:
    [answer] = server.ask(stream=stream, logprobs=3, **sampling)
    expected = reference.scores(tokenizer.encode(TEXT).ids, answer.ids)
    _agree(answer, expected)
    for (logprob, top), row in zip(answer.logprobs, expected, strict=True):
        # Broken bytes share a key, as everywhere in this API: what is there must be right, the best always is.
        best = row.topk(3).values.tolist()
        assert max(top.values()) == pytest.approx(best[0], abs=1e-4)
        assert all(min(abs(value - known) for known in [*best, logprob]) < 1e-4 for value in top.values())
    [alone] = server.ask(stream=stream, logprobs=0, **sampling)
    assert [logprob for logprob, _ in alone.logprobs] == [logprob for logprob, _ in answer.logprobs]
    assert all(len(top) == 1 for _, top in alone.logprobs)


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_beam_search_is_hugging_faces(
    server: Server, tokenizer: tokenizers.Tokenizer, model: Path, penalty: float
) -> None:
    [prompt] = random_prompts([21], seed=19)
    ids = torch.tensor([prompt])
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=4, num_return_sequences=4, length_penalty=penalty,
        max_new_tokens=8, do_sample=False, early_stopping=False, pad_token_id=0, eos_token_id=list(END_IDS),
    )  # fmt: skip
    expected = []
    for output in out[:, len(prompt) :].tolist():
        end = next((at for at, token in enumerate(output) if token in END_IDS), len(output))
        expected.append(output[: end + 1])
    fields = {"use_beam_search": True, "length_penalty": penalty, "return_token_ids": True}
    answer = server.client.completions.create(
        model="tiny", prompt=prompt, n=4, max_tokens=8, logprobs=1, extra_body=fields
    )
    assert [choice.token_ids for choice in answer.choices] == expected  # type: ignore[attr-defined]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, output in zip(answer.choices, expected, strict=True):
        ended = output[-1] in END_IDS
        assert choice.finish_reason == ("stop" if ended else "length")
        assert choice.text == tokenizer.decode(output[:-1] if ended else output)
        assert choice.logprobs and len(choice.logprobs.token_logprobs or ()) == len(output)
    assert answer.usage and answer.usage.completion_tokens == sum(map(len, expected))


def test_logprobs_of_prompts(server: Server, reference: Reference) -> None:
    """Twice: the second time the prompt is in the prefix cache. In the hand-off the prefill worker scores it."""
    [prompt] = random_prompts([45], seed=17)
    expected = reference.scores(prompt[:1], prompt[1:])
    body = {"model": "tiny", "prompt": prompt, "prompt_logprobs": 2, "max_tokens": 4, "temperature": 0, "priority": 1}
    for _ in range(2):
        answer = server.http.post("/v1/completions", json=body).json()
        [choice] = answer["choices"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == 45
        for token, found, row in zip(prompt[1:], choice["prompt_logprobs"][1:], expected, strict=True):
            assert set(found) == {str(token), *map(str, row.topk(2).indices.tolist())}
            assert found[str(token)]["rank"] == int((row > row[token]).sum()) + 1
            assert found[str(token)]["logprob"] == pytest.approx(row[token].item(), abs=2e-4)
    echoed = server.client.completions.create(model="tiny", prompt=prompt, echo=True, logprobs=1, **GREEDY)
    scores = echoed.choices[0].logprobs
    assert scores and scores.token_logprobs and scores.token_logprobs[0] is None and len(scores.token_logprobs) == 57
    given = [row[token].item() for token, row in zip(prompt[1:], expected, strict=True)]
    assert scores.token_logprobs[1:45] == pytest.approx(given, abs=2e-4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, {**WILD, "seed": 4}], ids=["greedy", "sampled"])
def test_logprobs_of_chats(
    server: Server, tokenizer: tokenizers.Tokenizer, reference: Reference, sampling: dict[str, Any], stream: bool
) -> None:
    [answer] = server.ask(chat=True, stream=stream, logprobs=True, top_logprobs=4, **sampling)
    expected = reference.scores(tokenizer.encode(MESSAGES_AS_TEXT, add_special_tokens=False).ids, answer.ids)
    _agree(answer, expected)
    for (_, top), row in zip(answer.logprobs, expected, strict=True):
        best = row.topk(4)
        assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-4)
        texts = [tokenizer.decode([token], skip_special_tokens=False) for token in best.indices.tolist()]
        assert [data.decode(errors="replace") for data, _ in top] == texts
    [plain] = server.ask(chat=True, stream=stream, logprobs=True, **sampling)
    assert [top for _, top in plain.logprobs] == [[]] * 12


def test_text_offsets(server: Server) -> None:
    answer = server.client.completions.create(model="tiny", prompt=TEXT, logprobs=0, **GREEDY)
    found = answer.choices[0].logprobs
    assert found and found.tokens and found.text_offset
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)
    if "\ufffd" not in answer.choices[0].text:
        assert found.text_offset == [0, *accumulate(map(len, found.tokens))][:-1]


# ------------------------------------------------------------ sampling


def _repetition(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    scores = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([prompt + output]), logits[None])
    return scores[0]


def _repetition_of_output(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    return _repetition(logits, [], output) if output else logits


def _presence(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    for token in set(output):
        logits[token] -= 2.0
    return logits


def _frequency(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    for token, count in Counter(output).items():
        logits[token] -= 2.0 * count
    return logits


@pytest.mark.parametrize(
    ("fields", "change", "lesser"),
    [
        ({"repetition_penalty": 1.4}, _repetition, _repetition_of_output),
        ({"presence_penalty": 2.0}, _presence, None),
        ({"frequency_penalty": 2.0}, _frequency, _presence),
    ],
    ids=["repetition", "presence", "frequency"],
)
def test_penalties(
    server: Server, reference: Reference, fields: dict[str, float], change: Change, lesser: Change | None
) -> None:
    """Where it matters that the penalty is this one and no `lesser` one, the greedy text is the reference's."""
    prompts = [tuple(prompt) for prompt in random_prompts([12, 15, 18, 21, 24, 27, 30, 33], seed=31)]
    telling = (p for p in prompts if reference.greedy(p, 48, change) != reference.greedy(p, 48, lesser))
    for prompt in (next(telling), next(telling)):
        [answer] = server.ask(prompt=list(prompt), temperature=0, max_tokens=48, **fields)
        assert answer.ids == reference.greedy(prompt, 48, change)


@pytest.mark.parametrize("fields", [{"top_k": 2}, {"top_p": 0.4}, {"min_p": 0.3}], ids=str)
def test_filters_keep_only_likely_tokens(
    server: Server, tokenizer: tokenizers.Tokenizer, reference: Reference, fields: dict[str, float]
) -> None:
    def outside(answer: Text) -> int:
        rows = (reference.scores(tokenizer.encode(TEXT).ids, answer.ids) / 3.0).softmax(-1)
        count = 0
        for token, row in zip(answer.ids, rows, strict=True):
            likelier = row[row > row[token]]
            allowed = {
                "top_k": len(likelier) < 2,
                "top_p": likelier.sum() < 0.4 + 1e-5,
                "min_p": row[token] >= 0.3 * row.max() - 1e-6,
            }
            count += not allowed[next(iter(fields))]
        return count

    common: dict[str, Any] = {"temperature": 3.0, "max_tokens": 40, "seed": 1}
    assert outside(server.ask(**common)[0]) > 5
    [answer] = server.ask(**common, **fields)
    assert outside(answer) == 0
    assert answer.ids != server.ask(temperature=0, max_tokens=40)[0].ids
    assert server.ask(temperature=3.0, max_tokens=12, top_k=1)[0].ids == server.ask(**GREEDY)[0].ids


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
    assert httpx.get(f"{guarded.fleet.url}/health").status_code == 200


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
        ({"response_format": {"type": "json_object"}}, "response_format"),
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
