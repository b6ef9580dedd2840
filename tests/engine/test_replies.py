"""A step's deltas on their way to routers: few messages, none too large to be read in one go."""

from __future__ import annotations

from typing import Any

from penstock.common.messages import TokenBatch, TokenDelta
from penstock.engine.replies import MAX_DELTAS, Replies


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
