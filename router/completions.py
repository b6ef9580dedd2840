"""POST /v1/completions: from the body to a `Plan`, and the way its answer is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.common.errors import BadRequest
from penstock.router.answer_format import Said
from penstock.router.choice import Choice, ScoredToken
from penstock.router.choices_format import ChoicesFormat, finite
from penstock.router.front import Front, RequestHead
from penstock.router.protocol import CompletionRequest, check_ids, decode_request
from penstock.router.reply import Plan

_decoder = msgspec.json.Decoder(CompletionRequest)


async def plan_completion(body: bytes, head: RequestHead, front: Front) -> Plan:
    """The plan for a body.

    Raises:
        PenstockError: the body is wrong, the model unknown, or no worker known.
    """
    request = decode_request(_decoder, body)
    model = front.model_name(request.model)
    prompts = request.prompts()
    request.check_choices(len(prompts))
    for prompt in prompts:
        front.check_length(prompt, "prompt", truncates=request.truncate_prompt_tokens is not None)
    ids = await _token_ids(prompts, request.add_special_tokens is not False, front)
    whole, context = ids, front.model_info().max_model_len
    ids = [request.truncated(prompt, context) for prompt in whole]
    echoes = ["" for _ in ids]
    if request.echo:
        decode = front.tokenizer.decode
        echoes = [
            p if isinstance(p, str) and kept == all_ else decode(kept)
            for p, kept, all_ in zip(prompts, ids, whole, strict=True)
        ]
    format = CompletionFormat(
        front.tokenizer,
        f"cmpl-{head.named(request.request_id)}",
        model,
        request.usage_in_stream[0],
        bool(request.return_token_ids),
        request.prompt_logprobs,
        bool(request.return_tokens_as_token_ids),
    )
    await front.check_form(request)
    return front.plan(request, head, format, ids, echoes, (None, "prompt"), request.logprobs)


async def _token_ids(prompts: list[str] | list[list[int]], add_special_tokens: bool, front: Front) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if texts:
        encode = front.tokenizer.encode
        ids = await front.in_thread(lambda: [encode(text, add_special_tokens) for text in texts], sum(map(len, texts)))
    else:
        for prompt in ids:
            check_ids(prompt, front.model_info().vocab_size, "prompt")
    if not all(ids):
        raise BadRequest("prompt must not be empty", param="prompt")
    return ids


class CompletionFormat(ChoicesFormat):
    """text_completion objects."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"
    before_text = b',"text":'
    after_text = b""

    def opening(self, choice: Choice) -> bytes:
        """The echoed prompt, if asked for, with its scores, if asked for."""
        if not choice.echo:
            return b""
        return self.opening_chunk(choice, choice.echo, logprobs=self.logprobs(choice.scored_prompt()))

    def choice(self, choice: Choice, said: Said) -> dict[str, Any]:
        """See `ChoicesFormat`."""
        fields: dict[str, Any] = {
            "index": choice.index,
            "text": choice.echo + said.content,
            "logprobs": self.logprobs([*choice.scored_prompt(), *said.tokens] if choice.echo else said.tokens),
            "finish_reason": said.finish_reason,
            "stop_reason": choice.text.stop_reason,
        }
        if self.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self.scored_prompt(choice)
        if self.token_ids:
            fields |= {"token_ids": choice.token_ids, "prompt_token_ids": choice.request.prompt_token_ids}
        return fields

    def logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        """Four lists with one entry a token; the chosen token is always among the top ones, as in vLLM."""
        if not tokens:
            return None
        return {
            "text_offset": [token.offset for token in tokens],
            "token_logprobs": [token.logprobs and finite(token.logprobs.logprob) for token in tokens],
            "tokens": [self._name(token.token_id) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
        }

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        """By text, the likeliest first; of tokens with one text (broken bytes are all U+FFFD) the likeliest."""
        scores = token.logprobs
        if scores is None:
            return None
        top: dict[str, float] = {}
        scored = [*zip(scores.top_logprobs, scores.top_ids, strict=True), (scores.logprob, token.token_id)]
        for logprob, token_id in sorted(scored, reverse=True):
            top.setdefault(self._name(token_id), finite(logprob))
        return top

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.names_ids else self._tokenizer.token_text(token_id)
