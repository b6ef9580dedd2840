"""POST /tokenize and /detokenize: what the router makes of a text, and of token ids. vLLM's fields and answers."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.common.errors import BadRequest
from penstock.router.chat import chat_token_ids
from penstock.router.front import Front
from penstock.router.protocol import ChatRequest, decode_request

MAX_TOKENS = 1 << 20  # of /detokenize: more than any context holds


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize; with `messages` it is a chat's, and `ChatRequest` reads the rest of it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Raise BadRequest unless there is exactly one thing to tokenise."""
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("give either prompt or messages", param="prompt")


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None

    def check(self) -> None:
        """Raise BadRequest for more tokens than are looked at."""
        if len(self.tokens) > MAX_TOKENS:
            raise BadRequest(f"tokens must hold at most {MAX_TOKENS} ids, got {len(self.tokens)}", param="tokens")


_tokenize = msgspec.json.Decoder(TokenizeRequest)
_detokenize = msgspec.json.Decoder(DetokenizeRequest)
_chat = msgspec.json.Decoder(ChatRequest)


async def tokenize(body: bytes, front: Front) -> bytes:
    """Token ids of a prompt, special tokens added unless told otherwise, or of a chat as its template writes it.

    Raises:
        PenstockError: the body is wrong, the template refuses it, the model is unknown, or no worker is known.
    """
    request = decode_request(_tokenize, body)
    front.model_name(request.model)
    text = request.prompt
    if text is None:
        chat = decode_request(_chat, body)
        ids = await front.in_thread(lambda: chat_token_ids(chat, front), len(body))
    else:
        front.check_length(text, "prompt")
        special = request.add_special_tokens is not False
        ids = await front.in_thread(lambda: front.tokenizer.encode(text, add_special_tokens=special), len(text))
    strings = [front.tokenizer.vocabulary_entry(i) for i in ids] if request.return_token_strs else None
    context = front.model_info().max_model_len
    return msgspec.json.encode({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": strings})


async def detokenize(body: bytes, front: Front) -> bytes:
    """The text of token ids, special tokens included.

    Raises:
        PenstockError: the body is wrong, an id is none of the tokenizer's, or the model is unknown.
    """
    request = decode_request(_detokenize, body)
    front.model_name(request.model)
    vocab_size, ids = front.tokenizer.vocab_size, request.tokens
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise BadRequest(f"tokens must hold ids from 0 to {vocab_size - 1}", param="tokens")
    text = await front.in_thread(lambda: front.tokenizer.decode(ids, skip_special_tokens=False), 4 * len(ids))
    return msgspec.json.encode({"prompt": text})
