"""What the routes answer, as types for the OpenAPI document (openapi.py). Tests decode real answers as these.

The answers themselves are written by the routes' formats; fields that only some requests have are optional here.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Error(msgspec.Struct):
    """What went wrong: `param` names the field, `code` is stable."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct):
    """Every error of the OpenAI routes and of our own."""

    error: Error


class AnthropicError(msgspec.Struct):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct):
    """Every error of the routes under /v1/messages."""

    type: Literal["error"]
    error: AnthropicError


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionUsage(msgspec.Struct):
    """Tokens of completions and chats."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(msgspec.Struct):
    """One text."""

    index: int
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: dict[str, Any] | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion(msgspec.Struct):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage
    timeline: list[dict[str, Any]] | None = None


class ChatFunction(msgspec.Struct):
    """The function that is called; its arguments are JSON in a string."""

    name: str
    arguments: str


class ChatToolCall(msgspec.Struct):
    """A tool call of the model's."""

    id: str
    type: Literal["function"]
    function: ChatFunction


class ChatMessage(msgspec.Struct):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ChatToolCall] | None = None


class ChatChoice(msgspec.Struct):
    """One message."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: dict[str, Any] | None
    token_ids: list[int] | None = None


class ChatCompletion(msgspec.Struct):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    timeline: list[dict[str, Any]] | None = None


class ResponseUsage(msgspec.Struct):
    """Tokens of a response."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class ResponseObject(msgspec.Struct):
    """A response as it is now; what was asked for is repeated in it."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    usage: ResponseUsage | None
    background: bool
    store: bool
    previous_response_id: str | None
    metadata: dict[str, str]


class DeletedResponse(msgspec.Struct):
    """Answer of DELETE /v1/responses/{response_id}."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class MessageUsage(msgspec.Struct):
    """Tokens of a message; cached ones are not among the input tokens."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(msgspec.Struct):
    """Answer of POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    """Answer of POST /v1/messages/count_tokens."""

    input_tokens: int


class Tokenized(msgspec.Struct):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(msgspec.Struct):
    """Answer of POST /detokenize."""

    prompt: str


class ModelCard(msgspec.Struct):
    """A name under which the model is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(msgspec.Struct):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(msgspec.Struct):
    """A decode worker takes requests."""

    status: Literal["ok"]
    workers: dict[str, int]


class Unhealthy(msgspec.Struct):
    """None does."""

    status: Literal["unavailable"]
    reason: str


class Version(msgspec.Struct):
    """Answer of GET /version."""

    version: str


class Load(msgspec.Struct):
    """Choices in flight at this router."""

    server_load: int


class FleetView(msgspec.Struct):
    """The live workers, each with its load, and this router's totals."""

    object: Literal["fleet"]
    time_s: float
    models: list[str]
    router: dict[str, Any]
    workers: list[dict[str, Any]]
