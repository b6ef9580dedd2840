"""POST /v1/chat/completions: from the body to a `Plan`, and the way its answer is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.common.errors import BadRequest
from penstock.common.tokenizer import Tokenizer
from penstock.router.answer_format import AnswerFormat, Said
from penstock.router.choice import Choice, ScoredToken
from penstock.router.choices_format import ChoicesFormat, finite
from penstock.router.front import Front, RequestHead
from penstock.router.protocol import ChatRequest, decode_request
from penstock.router.reply import Plan

_decoder = msgspec.json.Decoder(ChatRequest)


async def plan_chat(body: bytes, head: RequestHead, front: Front) -> Plan:
    """The plan for a body.

    Raises:
        PenstockError: the body is wrong, the template refuses it, the model is unknown, or no worker is known.
    """
    request = decode_request(_decoder, body)
    model, usage = front.model_name(request.model), request.usage_in_stream[0]
    answer_id, show_ids = f"chatcmpl-{head.answer_id}", bool(request.return_token_ids)
    format = ChatFormat(front.tokenizer, answer_id, model, usage, show_ids, request.prompt_logprobs)
    return await plan_messages(request, format, len(body), head, front)


async def plan_messages(
    request: ChatRequest, format: AnswerFormat, size_chars: int, head: RequestHead, front: Front
) -> Plan:
    """The plan for a checked request, whose answer `format` writes; other routes translate their bodies to this one.

    Raises:
        PenstockError: see `plan_chat`.
    """
    request.check_choices(1)
    ids = await front.in_thread(lambda: chat_token_ids(request, front), size_chars)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = (front.defaults.max_new_tokens, "messages")
    return front.plan(request, head, format, [ids], [""], max_tokens, logprobs)


def chat_token_ids(request: ChatRequest, front: Front) -> list[int]:
    """The messages as the template writes them, tokenised; raises BadRequest, or PromptTooLong."""
    if front.template is None:
        raise BadRequest("this model has no chat template; give one with --chat-template", param="messages")
    continues = bool(request.continue_final_message)
    variables = dict(request.chat_template_kwargs or {})
    for reserved in ("messages", "add_generation_prompt", "continue_final_message"):
        if reserved in variables:
            raise BadRequest(f"chat_template_kwargs must not hold {reserved!r}", param="chat_template_kwargs")
    text = front.template.render(
        request.flat_messages(),
        add_generation_prompt=not continues and request.add_generation_prompt is not False,
        continue_final_message=continues,
        variables=variables,
    )
    front.check_length(text, "messages", truncates=request.truncate_prompt_tokens is not None)
    ids = front.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
    if not ids:
        raise BadRequest("the messages give an empty prompt", param="messages")
    return request.truncated(ids, front.model_info().max_model_len)


class ChatFormat(ChoicesFormat):
    """chat.completion objects and their chunks."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    before_text = b',"delta":{"content":'
    after_text = b"}"

    def opening(self, choice: Choice) -> bytes:
        """The role comes first, in a chunk of its own."""
        return self.opening_chunk(choice, "", before_text=b',"delta":{"role":"assistant","content":')

    def choice(self, choice: Choice, said: Said) -> dict[str, Any]:
        """See `ChoicesFormat`."""
        fields: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": said.content, "refusal": None},
            "logprobs": self.logprobs(said.tokens),
            "finish_reason": said.finish_reason,
            "stop_reason": choice.text.stop_reason,
        }
        if self.token_ids:
            fields |= {"token_ids": choice.token_ids}
        return fields

    def top_level(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The prompt is the same for all choices."""
        fields: dict[str, Any] = {}
        if self.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self.scored_prompt(choices[0])
        if self.token_ids:
            fields["prompt_token_ids"] = choices[0].request.prompt_token_ids
        return fields

    def logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        """One entry a token, with the bytes of tokens, for text that is not whole characters."""
        if not tokens:
            return None
        return {"content": scored_tokens(self._tokenizer, tokens), "refusal": None}


def scored_tokens(tokenizer: Tokenizer, tokens: Sequence[ScoredToken]) -> list[dict[str, Any]]:
    """Tokens with their scores, as chats and responses tell them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", errors="replace"), "logprob": finite(logprob), "bytes": list(data)}

    def scored(token: ScoredToken) -> dict[str, Any]:
        scores = token.logprobs
        assert scores is not None, "output tokens are scored"
        top = [entry(i, p) for i, p in zip(scores.top_ids, scores.top_logprobs, strict=True)]
        return entry(token.token_id, scores.logprob) | {"top_logprobs": top}

    return [scored(token) for token in tokens]
