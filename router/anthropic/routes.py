"""POST /v1/messages and /v1/messages/count_tokens: from the body to a `Plan` or a count. Made routes by app.py."""

from __future__ import annotations

import msgspec

from penstock.router.anthropic.answer import MessagesFormat
from penstock.router.anthropic.request import NAMES, MessagesRequest, PromptRequest
from penstock.router.chat import chat_token_ids, plan_messages
from penstock.router.front import Front, RequestHead
from penstock.router.protocol import decode_request
from penstock.router.reply import Plan
from penstock.router.translate import in_words_of

_create = msgspec.json.Decoder(MessagesRequest)
_count = msgspec.json.Decoder(PromptRequest)


async def plan_message(body: bytes, head: RequestHead, front: Front) -> Plan:
    """The plan for a body.

    Raises:
        PenstockError: the body is wrong, the template refuses it, the model is unknown, or no worker is known.
    """
    request = decode_request(_create, body)
    model = front.model_name(request.model)
    format = MessagesFormat(f"msg_{head.answer_id}", model)
    chat = request.chat()
    with in_words_of(NAMES):
        return await plan_messages(chat, format, len(body), head, front)


async def count_tokens(body: bytes, front: Front) -> bytes:
    """How many tokens the prompt has; raises as `plan_message` does."""
    request = decode_request(_count, body)
    front.model_name(request.model)
    chat = request.chat()
    with in_words_of(NAMES):
        ids = await front.in_thread(lambda: chat_token_ids(chat, front), len(body))
    return msgspec.json.encode({"input_tokens": len(ids)})
