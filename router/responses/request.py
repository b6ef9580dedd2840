"""Body of POST /v1/responses, and the chat request that it is.

The shapes are those of OpenAI's Responses API, as its Python client's types tell them. Unknown fields are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from penstock.common.errors import BadRequest
from penstock.router.chat_messages import check_count
from penstock.router.known_fields import not_supported
from penstock.router.protocol import ChatRequest, StreamOptions
from penstock.router.tools.request import check_tool_count
from penstock.router.translate import chat_request

MAX_METADATA = 16  # pairs, with keys and values of at most:
MAX_METADATA_KEY = 64  # characters
MAX_METADATA_VALUE = 512
# Chat's field -> the one of this API that it is made of.
NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_AS_GIVEN = (
    "model", "stream", "temperature", "top_p", "parallel_tool_calls", "user", "top_k", "min_p", "seed", "stop",
    "stop_token_ids", "min_tokens", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "include_stop_str_in_output", "skip_special_tokens", "logit_bias", "allowed_token_ids", "bad_words", "priority",
    "cache_salt", "chat_template_kwargs", "structured_outputs", "truncate_prompt_tokens", "truncation_side", "timeline",
)  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"
_object = msgspec.json.Decoder(dict[str, Any])


class Part(msgspec.Struct):
    """A piece of content."""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct, omit_defaults=True):
    """An item of the input, or of an earlier answer: a message, a tool call, what a tool answered, or reasoning."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None


_items = msgspec.json.Decoder(list[Item])


class Tool(msgspec.Struct):
    """A function of the client's; tools that OpenAI's servers run have another type."""

    type: str
    name: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ToolChoice(msgspec.Struct):
    """The function to call."""

    type: str
    name: str | None = None


class TextFormat(msgspec.Struct):
    """What the text of the answer is: any, JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct):
    """How the answer's text is to be. Models here know nothing of how wordy to be: "medium" is as they are."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(msgspec.Struct):
    """How much the model reasons, where its template can tell it.

    Nothing here sums reasoning up: "auto" is the reasoning itself, in the item's content.
    """

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None  # the older name


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/responses; the fields from `top_k` on are vLLM's."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    conversation: Any = None
    prompt: Any = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    timeline: bool | None = None

    def check(self) -> None:
        """Raise BadRequest for what the types alone cannot tell."""
        for field in ("conversation", "prompt"):
            if getattr(self, field) is not None:
                raise not_supported(field)
        if self.truncation == "auto":
            raise not_supported("truncation", "truncation 'auto'")
        if not self.input:
            raise BadRequest("input must not be empty", param="input")
        if self.background and self.store is False:
            raise BadRequest("background needs store=true: else nobody could ask for the answer", param="background")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options is only allowed with stream=true", param="stream_options")
        metadata = self.metadata or {}
        if len(metadata) > MAX_METADATA or any(
            len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE for key, value in metadata.items()
        ):
            limits = f"{MAX_METADATA} pairs of at most {MAX_METADATA_KEY} and {MAX_METADATA_VALUE} characters"
            raise BadRequest(f"metadata must be at most {limits}", param="metadata")
        check_count("input", self.items, (item.content for item in self.items))
        for at, item in enumerate(self.items):
            _check_item(item, f"input[{at}]")
        check_tool_count(self.tools)
        for at, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                raise not_supported(f"tools[{at}].type", f"a tool of type {tool.type!r} (tools[{at}])")
            if not tool.name:
                raise BadRequest(f"tools[{at}].name is required", param=f"tools[{at}].name")
        choice = self.tool_choice
        if isinstance(choice, ToolChoice) and choice.type != "function":
            raise not_supported("tool_choice.type", f"tool_choice of type {choice.type!r}")
        if self.text is not None and self.text.verbosity in ("low", "high"):
            raise not_supported("text.verbosity", f"text.verbosity {self.text.verbosity!r}")
        for field in ("summary", "generate_summary"):
            if getattr(self.reasoning, field, None) in ("concise", "detailed"):
                raise not_supported(f"reasoning.{field}", f"reasoning.{field} other than 'auto'")
        wanted = None if self.text is None else self.text.format
        if wanted is not None and wanted.type == "json_schema" and wanted.schema is None:
            raise BadRequest("text.format.schema is required", param="text.format.schema")

    @property
    def items(self) -> list[Item]:
        """The input as items."""
        return [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    @property
    def stored(self) -> bool:
        """The answer can be asked for later."""
        return self.store is not False

    def chat(self, earlier: Sequence[Item]) -> ChatRequest:
        """The chat request, which goes on from the items of `earlier` turns; raises BadRequest."""
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += chat_messages([*earlier, *self.items])
        fields: dict[str, Any] = {name: getattr(self, name) for name in _AS_GIVEN}
        fields |= {"messages": messages, "max_completion_tokens": self.max_output_tokens}
        if self.top_logprobs or _LOGPROBS in (self.include or ()):
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = _response_format(self.text.format)
        if self.tools:
            fields["tools"] = [{"type": "function", "function": _function(tool)} for tool in self.tools]
            choice = self.tool_choice
            if isinstance(choice, ToolChoice):
                fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
            else:
                fields["tool_choice"] = choice
        return chat_request(fields, NAMES)


def earlier_items(turns: Iterable[bytes]) -> list[Item]:
    """The items of stored turns.

    Calls whose arguments are no JSON object, cut by `max_output_tokens` or as the model wrote them, have none:
    templates want an object, and unlike its own input the client cannot correct what is stored.
    """
    items = [item for turn in turns for item in _items.decode(turn)]
    for item in items:
        if item.type == "function_call" and not _is_object(item.arguments or ""):
            item.arguments = "{}"
    return items


def _is_object(text: str) -> bool:
    try:
        _object.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def chat_messages(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Items as chat messages: reasoning, text and calls that follow each other are one message of the assistant's."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's message that may still grow
    for item in items:
        if item.type == "function_call_output":
            output = item.output if isinstance(item.output, str) else _parts(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
            turn = None
        elif item.type == "message" and item.role != "assistant":
            role = "system" if item.role == "developer" else item.role  # templates know of system alone
            content = item.content if isinstance(item.content, str) else _parts(item.content)
            messages.append({"role": role, "content": content})
            turn = None
        else:
            if turn is None or _ends(turn, item):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _grow(turn, item)
    return messages


def _ends(turn: dict[str, Any], item: Item) -> bool:
    """Reasoning begins a message, and so does text after text or after calls."""
    said = bool(turn["content"]) or "tool_calls" in turn
    return said if item.type != "function_call" else False


def _grow(turn: dict[str, Any], item: Item) -> None:
    if item.type == "reasoning":
        thought = item.content if isinstance(item.content, list) else item.summary
        turn["reasoning"] = turn.get("reasoning", "") + "".join(part.text or "" for part in thought or ())
    elif item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    else:
        parts = [] if isinstance(item.content, str) else item.content or []
        text = item.content if isinstance(item.content, str) else ""
        turn["content"] += text + "".join(part.text or part.refusal or "" for part in parts)


def _check_item(item: Item, where: str) -> None:
    needed = {
        "message": ("role", "content"),
        "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"),
        "reasoning": (),
    }
    for field in needed[item.type]:
        if getattr(item, field) is None:
            raise BadRequest(f"{where}.{field} is required", param=f"{where}.{field}")
    for field in ("content", "output"):
        parts = getattr(item, field)
        for at, part in enumerate(parts if isinstance(parts, list) else ()):
            name = "refusal" if part.type == "refusal" else "text"
            if getattr(part, name) is None:
                named = f"{where}.{field}[{at}].{name}"
                raise BadRequest(f"{named} is required", param=named)


def _parts(parts: Sequence[Part] | None) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part.text or part.refusal or ""} for part in parts or ()]


def _function(tool: Tool) -> dict[str, Any]:
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {name: value for name, value in fields.items() if value is not None}


def _response_format(wanted: TextFormat) -> dict[str, Any] | None:
    if wanted.type != "json_schema":
        return None if wanted.type == "text" else {"type": wanted.type}
    fields = {
        "name": wanted.name or "output",
        "schema": wanted.schema,
        "strict": wanted.strict,
        "description": wanted.description,
    }
    return {"type": "json_schema", "json_schema": {name: value for name, value in fields.items() if value is not None}}
