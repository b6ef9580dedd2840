"""POST /v1/chat/completions: from the body to a `Plan`, and the way its answer is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from penstock.common.errors import BadRequest
from penstock.common.structured_outputs import StructuredOutputsParams
from penstock.common.tokenizer import Tokenizer
from penstock.router.answer_format import AnswerFormat, CallDelta, Delta, Said
from penstock.router.chat_messages import ContentForms, Message, template_messages
from penstock.router.choice import Choice, ScoredToken
from penstock.router.choices_format import ChoicesFormat, finite
from penstock.router.front import Front, RequestHead
from penstock.router.protocol import ChatRequest, decode_request
from penstock.router.reasoning.parser import Beginning
from penstock.router.reply import Plan
from penstock.router.tools.forced import forced_schema

MAX_MARKER_CHARS = 256  # of a prompt's end, to see whether the template has begun the reasoning
_json = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(ChatRequest)


async def plan_chat(body: bytes, head: RequestHead, front: Front) -> Plan:
    """The plan for a body.

    Raises:
        PenstockError: the body is wrong, the template refuses it, the model is unknown, or no worker is known.
    """
    request = decode_request(_decoder, body)
    format = ChatFormat(
        front.tokenizer,
        f"chatcmpl-{head.named(request.request_id)}",
        front.model_name(request.model),
        request.usage_in_stream[0],
        bool(request.return_token_ids),
        request.prompt_logprobs,
        bool(request.return_tokens_as_token_ids),
    )
    return await plan_messages(request, format, len(body), head, front)


async def plan_messages(
    request: ChatRequest, format: AnswerFormat, size_chars: int, head: RequestHead, front: Front
) -> Plan:
    """The plan for a checked request, whose answer `format` writes; other routes translate their bodies to this one.

    Raises:
        PenstockError: see `plan_chat`.
    """
    request.check_choices(1)
    use, one_call = request.tool_use(), request.parallel_tool_calls is False
    front.chat.check_tools(use)
    if use.mode in ("required", "named"):
        try:
            forced = StructuredOutputsParams(json=forced_schema(use, one_call))
        except RecursionError as error:
            raise BadRequest("tools: a schema is nested too deep", param="tools") from error
        request.constrain(forced, "tool_choice")
    await front.check_form(request, "tools" if use.mode in ("required", "named") else None)
    prompt = await front.in_thread(lambda: chat_prompt(request, front), size_chars)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = (front.defaults.max_new_tokens, "messages")
    demanded, reasons = request.structured_outputs, True
    if demanded is not None:
        whole = front.chat.after_reasoning(demanded, prompt.beginning)
        request.structured_outputs, reasons = whole or demanded, whole is not None
        await front.check_form(request)
    parsing = front.chat.parsing(
        use,
        prompt.beginning,
        reasons=reasons,
        show_reasoning=request.include_reasoning is not False,
        one_call=one_call,
    )
    plan = front.plan(request, head, format, [prompt.token_ids], [_echo(request)], max_tokens, logprobs)
    return replace(plan, parsing=parsing)


class ChatPrompt(NamedTuple):
    """A conversation as the template writes it, and what a reasoning parser has to know of its end."""

    token_ids: list[int]
    beginning: Beginning


def chat_token_ids(request: ChatRequest, front: Front) -> list[int]:
    """See `chat_prompt`."""
    return chat_prompt(request, front).token_ids


def chat_prompt(request: ChatRequest, front: Front) -> ChatPrompt:
    """The messages as the template writes them, tokenised; raises BadRequest, or PromptTooLong."""
    if front.template is None:
        raise BadRequest("this model has no chat template; give one with --chat-template", param="messages")
    continues = bool(request.continue_final_message)
    messages = template_messages(request.messages or (), front.chat.forms)
    variables = _variables(request, front)
    text = front.template.render(
        messages,
        add_generation_prompt=not continues and request.add_generation_prompt is not False,
        continue_final_message=continues,
        variables=variables,
        tools=request.tools or None,
        documents=request.documents,
    )
    front.check_length(text, "messages", truncates=request.truncate_prompt_tokens is not None)
    ids = front.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
    if not ids:
        raise BadRequest("the messages give an empty prompt", param="messages")
    thinking = variables.get("enable_thinking", variables.get("thinking"))
    beginning = Beginning(
        _text_of(messages[-1]) if continues else text[-MAX_MARKER_CHARS:],
        continues,
        thinking if isinstance(thinking, bool) else None,
    )
    return ChatPrompt(request.truncated(ids, front.model_info().max_model_len), beginning)


def _variables(request: ChatRequest, front: Front) -> dict[str, Any]:
    """What the template may look at, beside the conversation."""
    given = request.chat_template_kwargs or {}
    for reserved in ("messages", "add_generation_prompt", "continue_final_message"):
        if reserved in given:
            raise BadRequest(f"chat_template_kwargs must not hold {reserved!r}", param="chat_template_kwargs")
    variables = {**front.chat.variables, **given}
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
        variables.setdefault("enable_thinking", request.reasoning_effort != "none")
    return variables


def _echo(request: ChatRequest) -> str:
    """What answers begin with: with `echo`, a last message of the assistant's, which they go on from."""
    last = (request.messages or [{}])[-1]
    if not request.echo or last.get("role") != "assistant":
        return ""
    [message] = template_messages([last], ContentForms())
    return _text_of(message)


def _text_of(message: Message) -> str:
    content = message["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _message(said: Said, echo: str) -> dict[str, Any]:
    content = echo + said.content
    bare = bool(said.calls or said.reasoning) and not content
    reasoning = said.reasoning or None
    message: dict[str, Any] = {"role": "assistant", "content": None if bare else content, "refusal": None}
    message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if said.calls:
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in said.calls
        ]
    return message


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.call, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.call, "id": call.call_id, "type": "function", "function": function}


class ChatFormat(ChoicesFormat):
    """chat.completion objects and their chunks."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    before_text = b',"delta":{"content":'
    after_text = b"}"
    opens_together = True  # the openai client's helper takes no stream that begins with a later choice

    def opening(self, choice: Choice) -> bytes:
        """The role comes first, in a chunk of its own, and then what is echoed."""
        role = self.opening_chunk(choice, "", before_text=b',"delta":{"role":"assistant","content":')
        return role + self.opening_chunk(choice, choice.echo) if choice.echo else role

    def said(self, delta: Delta) -> bytes:
        """See `ChoicesFormat`; reasoning has vLLM's name and DeepSeek's."""
        fields: dict[str, Any] = {}
        if delta.reasoning:
            fields |= {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}
        if delta.content:
            fields["content"] = delta.content
        if delta.calls:
            fields["tool_calls"] = [_call_delta(call) for call in delta.calls]
        return b',"delta":' + _json(fields)

    def choice(self, choice: Choice, said: Said) -> dict[str, Any]:
        """See `ChoicesFormat`."""
        fields: dict[str, Any] = {
            "index": choice.index,
            "message": _message(said, choice.echo),
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
        return {"content": scored_tokens(self._tokenizer, tokens, names_ids=self.names_ids), "refusal": None}


def scored_tokens(
    tokenizer: Tokenizer, tokens: Sequence[ScoredToken], *, names_ids: bool = False
) -> list[dict[str, Any]]:
    """Tokens with their scores, as chats and responses tell them; `bytes` are the tokens' also with `names_ids`."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        name = f"token_id:{token_id}" if names_ids else data.decode("utf-8", errors="replace")
        return {"token": name, "logprob": finite(logprob), "bytes": list(data)}

    def scored(token: ScoredToken) -> dict[str, Any]:
        scores = token.logprobs
        assert scores is not None, "output tokens are scored"
        top = [entry(i, p) for i, p in zip(scores.top_ids, scores.top_logprobs, strict=True)]
        return entry(token.token_id, scores.logprob) | {"top_logprobs": top}

    return [scored(token) for token in tokens]
