"""The official `openai` client against real fleets, one-phase and 1 prefill + 1 decode: what is generated, both ways.

What the answers must be comes from Hugging Face: its tokens, its logits, its penalties. A stream's pieces, joined, must
be the answer that comes in one piece.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from tests.system.openai_servers import (
    CONTEXT,
    END_IDS,
    GREEDY,
    MESSAGES,
    MESSAGES_AS_TEXT,
    TEXT,
    WILD,
    Change,
    Reference,
    Server,
    Text,
)
from tests.tiny_models import random_prompts

pytestmark = pytest.mark.system


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
    fields.pop("return_token_ids")
    chunks = server.client.completions.create(
        model="tiny", prompt=prompt, n=4, max_tokens=8, stream=True, extra_body=fields
    )
    texts = [chunk.choices[0] for chunk in chunks]  # the text of each comes whole, when the search has ended
    assert [(c.index, c.text, c.finish_reason) for c in texts] == [
        (c.index, c.text, c.finish_reason) for c in answer.choices
    ]


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
            assert found[str(token)]["logprob"] == pytest.approx(row[token].item(), abs=1e-4)
    echoed = server.client.completions.create(model="tiny", prompt=prompt, echo=True, logprobs=1, **GREEDY)
    scores = echoed.choices[0].logprobs
    assert scores and scores.token_logprobs and scores.token_logprobs[0] is None and len(scores.token_logprobs) == 57
    given = [row[token].item() for token, row in zip(prompt[1:], expected, strict=True)]
    assert scores.token_logprobs[1:45] == pytest.approx(given, abs=1e-4)


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
