"""Bodies of POST /v1/messages and /v1/messages/count_tokens, and the chat request that each is.

The shapes are those of Anthropic's Messages API, as its Python client's types tell them. Unknown fields are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from penstock.common.errors import BadRequest
from penstock.router.chat_messages import check_count
from penstock.router.known_fields import not_supported
from penstock.router.protocol import ChatRequest
from penstock.router.tools.request import check_tool_count
from penstock.router.translate import chat_request

# Chat's field -> the one of this API that it is made of.
NAMES = {
    "max_completion_tokens": "max_tokens",
    "max_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config",
    "reasoning_effort": "output_config",
    "include_reasoning": "thinking",
    "parallel_tool_calls": "tool_choice",
    "messages": "messages",
}
# Some clients put a line of their own, which changes with every request, before the system prompt: with it no two
# requests would share a prefix.
_BILLING_LINE = "x-anthropic-billing-header"


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    """Text."""

    text: str


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    """Reasoning of an earlier turn; its signature is not looked at."""

    thinking: str


class RedactedThinkingBlock(msgspec.Struct, tag_field="type", tag="redacted_thinking"):
    """Reasoning that cannot be read: dropped."""

    data: str = ""


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A tool call of an earlier turn."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct, tag_field="type", tag="tool_result"):
    """What a tool answered."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


class Message(msgspec.Struct):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct):
    """A tool of the client's; those that Anthropic's servers run have another type."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct):
    """Whether tools are to be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    """Whether the model reasons first, where its template can tell it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class JSONFormat(msgspec.Struct):
    """The answer is JSON of this schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    """How the answer is to be."""

    format: JSONFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class PromptRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/messages/count_tokens: what makes the prompt."""

    messages: list[Message]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JSONFormat | None = None  # the older name of output_config.format
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's

    def check(self) -> None:
        """Raise BadRequest for what the types alone cannot tell."""
        if not self.messages:
            raise BadRequest("messages must hold at least one message", param="messages")
        check_count("messages", self.messages, (message.content for message in self.messages))
        for at, message in enumerate(self.messages):
            _check_blocks(message, f"messages[{at}].content")
        check_tool_count(self.tools)
        for at, tool in enumerate(self.tools or ()):
            if tool.type not in (None, "custom"):
                raise not_supported(f"tools[{at}].type", f"a tool of type {tool.type!r} (tools[{at}])")
            if tool.input_schema is None:
                raise BadRequest(f"tools[{at}].input_schema is required", param=f"tools[{at}].input_schema")
        if self.tool_choice is not None and self.tool_choice.type == "tool" and not self.tool_choice.name:
            raise BadRequest("tool_choice.name is required with type 'tool'", param="tool_choice.name")

    def chat(self) -> ChatRequest:
        """The chat request with this prompt; raises BadRequest."""
        return chat_request(self._chat_fields(), NAMES)

    def _chat_fields(self) -> dict[str, Any]:
        messages = [{"role": "system", "content": system}] if (system := _system(self.system)) else []
        for message in self.messages:
            messages += _chat_messages(message)
        # An answer that has begun is continued.
        continues = self.messages[-1].role == "assistant" and "tool_calls" not in messages[-1]
        return {
            "messages": messages,
            "model": self.model,
            "continue_final_message": True if continues else None,
            "add_generation_prompt": False if continues else None,
            "chat_template_kwargs": self._template_kwargs(),
            **self._tool_fields(),
            **self._output_fields(),
        }

    def _template_kwargs(self) -> dict[str, Any] | None:
        """Templates call the switch by one of two names, and pass over what they do not know."""
        if self.thinking is None or self.thinking.type == "adaptive":
            return self.chat_template_kwargs
        enabled = self.thinking.type == "enabled"
        return {"enable_thinking": enabled, "thinking": enabled, **(self.chat_template_kwargs or {})}

    def _tool_fields(self) -> dict[str, Any]:
        if not self.tools:
            return {}
        fields: dict[str, Any] = {"tools": [{"type": "function", "function": _function(tool)} for tool in self.tools]}
        choice = self.tool_choice
        if choice is None:
            return fields
        if choice.type == "tool":
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            fields["tool_choice"] = "required" if choice.type == "any" else choice.type
        if choice.disable_parallel_tool_use:
            fields["parallel_tool_calls"] = False
        return fields

    def _output_fields(self) -> dict[str, Any]:
        config = self.output_config or OutputConfig()
        wanted = config.format or self.output_format
        fields: dict[str, Any] = {"reasoning_effort": config.effort}
        if wanted is not None:
            json_schema = {"name": "output", "schema": wanted.schema, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return fields


class MessagesRequest(PromptRequest, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    priority: int | None = None  # vLLM's, as all below
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    cache_salt: str | None = None
    structured_outputs: dict[str, Any] | None = None
    truncate_prompt_tokens: int | None = None
    timeline: bool | None = None  # ours

    def _chat_fields(self) -> dict[str, Any]:
        same = (
            "stream", "temperature", "top_k", "top_p", "priority", "seed", "min_p", "repetition_penalty", "ignore_eos",
            "min_tokens", "stop_token_ids", "cache_salt", "structured_outputs", "truncate_prompt_tokens",
            "timeline",
        )  # fmt: skip
        fields = super()._chat_fields() | {name: getattr(self, name) for name in same}
        return fields | {"max_completion_tokens": self.max_tokens, "stop": self.stop_sequences}


def _check_blocks(message: Message, where: str) -> None:
    """Who may say what; an empty list is nothing to answer to."""
    if isinstance(message.content, str):
        return
    if not message.content:
        raise BadRequest(f"{where} must hold at least one block", param=where)
    for at, block in enumerate(message.content):
        of_user, of_assistant = isinstance(block, ToolResultBlock), not isinstance(block, TextBlock | ToolResultBlock)
        if (of_user and message.role != "user") or (of_assistant and message.role != "assistant"):
            field = f"{where}[{at}]"
            raise BadRequest(f"{field}: not in a message with the role {message.role!r}", param=field)


def _system(system: str | list[TextBlock] | None) -> str | list[dict[str, Any]]:
    if isinstance(system, str):
        return system
    return _parts([block for block in system or () if not block.text.startswith(_BILLING_LINE)])


def _parts(blocks: Sequence[TextBlock]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": block.text} for block in blocks]


def _chat_messages(message: Message) -> list[dict[str, Any]]:
    """The chat messages of one turn: tool results are messages of their own and come first."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    results = [_tool_message(block) for block in message.content if isinstance(block, ToolResultBlock)]
    if message.role != "assistant":
        return results + ([{"role": message.role, "content": _parts(texts)}] if texts else [])
    fields: dict[str, Any] = {"role": "assistant", "content": "".join(block.text for block in texts)}
    if thought := [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]:
        fields["reasoning"] = "".join(thought)
    if calls := [block for block in message.content if isinstance(block, ToolUseBlock)]:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _json(call.input)}}
            for call in calls
        ]
    return [fields]


def _tool_message(block: ToolResultBlock) -> dict[str, Any]:
    content = block.content if isinstance(block.content, str) else _parts(block.content or ()) or ""
    if block.is_error:  # chat has no field for it
        content = f"Error: {content}" if isinstance(content, str) else [{"type": "text", "text": "Error:"}, *content]
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _function(tool: Tool) -> dict[str, Any]:
    fields = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
