"""A step's deltas on their way to routers: few messages, none too large to be read in one go."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.common.bus import MAX_MESSAGE_BYTES
from penstock.common.messages import GenerateRequest, TokenBatch, TokenDelta, TokenLogprobs, encode
from penstock.common.sampling import SamplingParams
from penstock.engine.replies import MAX_DELTAS, Replies, prompt_scores_bytes


def test_a_large_step_is_several_messages_and_any_other_one_a_router() -> None:
    sent: list[tuple[bytes, Any]] = []
    replies = Replies(lambda router, message: sent.append((router, message)))
    deltas = [TokenDelta(str(number), 0, 0, 0, [number]) for number in range(2 * MAX_DELTAS + 1)]
    for number, delta in enumerate(deltas):
        replies.add(b"a", delta)
        if number < MAX_DELTAS:
            replies.add(b"b", delta)
    replies.flush()
    assert all(type(message) is TokenBatch for _, message in sent)
    assert [len(message.deltas) for router, message in sent if router == b"a"] == [MAX_DELTAS, MAX_DELTAS, 1]
    assert [delta for router, message in sent if router == b"a" for delta in message.deltas] == deltas
    assert [message.deltas for router, message in sent if router == b"b"] == [deltas[:MAX_DELTAS]]
    sent.clear()
    replies.flush()
    assert sent == []


def scored(name: str, tokens: int, top: int) -> TokenDelta:
    """A delta with the prompt's logprobs, as large as they get."""
    at = TokenLogprobs(-1.5, 2**30, [2**30] * top, [-1.5] * top)
    return TokenDelta(name, 0, 0, 0, [7], prompt_logprobs=[at] * (tokens - 1))


def test_no_message_is_larger_than_the_bus_carries() -> None:
    """Whoever gets a larger one cuts the connection, and with it all other requests of the router."""
    sent: list[Any] = []
    replies = Replies(lambda _, message: sent.append(message))
    deltas = [scored("a", 4000, 1000), *(scored(str(number), 40, 5000) for number in range(6)), scored("b", 2, 0)]
    for delta in deltas:
        replies.add(b"a", delta)
    replies.flush()
    assert [delta for message in sent for delta in message.deltas] == deltas
    assert len(sent) < 5 and max(len(encode(message)) for message in sent) < MAX_MESSAGE_BYTES


@pytest.mark.parametrize(("tokens", "top", "vocab"), [(1, 0, 9), (300, 0, 9), (300, 1, 9), (40, 70_000, 1000)])
def test_what_the_logprobs_of_a_prompt_take_at_most(tokens: int, top: int, vocab: int) -> None:
    params = SamplingParams(prompt_logprobs=top)
    request = GenerateRequest(request_id="a", prompt_token_ids=[1] * tokens, sampling=params)
    least = len(encode(TokenBatch(deltas=[scored("a", tokens, min(top, vocab))])))
    assert least - 64 <= prompt_scores_bytes(request, vocab) <= 2 * least
