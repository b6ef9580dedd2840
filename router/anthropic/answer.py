"""Answers of POST /v1/messages: a message in one piece, or the events message_start … message_stop; and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.common.errors import (
    BadRequest,
    NotFound,
    Overloaded,
    PenstockError,
    QueueTimeout,
    Timeout,
    Unauthorized,
    Unavailable,
)
from penstock.router.answer_format import AnswerFormat, Delta, Said, Usage
from penstock.router.choice import Choice

_json = msgspec.json.Encoder().encode
# The first that fits; what is left is "api_error".
_ERROR_TYPES: tuple[tuple[tuple[type[PenstockError], ...], str], ...] = (
    ((BadRequest,), "invalid_request_error"),
    ((Unauthorized,), "authentication_error"),
    ((NotFound,), "not_found_error"),
    ((QueueTimeout, Unavailable), "overloaded_error"),
    ((Overloaded,), "rate_limit_error"),
    ((Timeout,), "timeout_error"),
)


def anthropic_error(error: PenstockError) -> bytes:
    """An error's body, also the payload of an error event."""
    kind = next((name for types, name in _ERROR_TYPES if isinstance(error, types)), "api_error")
    return _json({"type": "error", "error": {"type": kind, "message": error.message}})


class MessagesFormat(AnswerFormat):
    """Writes one message; requests of this API have one choice. `timeline` is ours."""

    def __init__(self, answer_id: str, model: str) -> None:
        self._answer_id, self._model = answer_id, model
        self._index = -1  # of the newest content block
        self._open: str | int | None = None  # what it holds: "thinking", "text", or the number of a tool call
        self._stop: dict[str, Any] = {}
        self._called = False

    def whole(
        self, choices: Sequence[Choice], said: Sequence[Said], usage: Usage, timeline: list[dict[str, Any]] | None
    ) -> bytes:
        """See `AnswerFormat.whole`."""
        [choice], [output] = choices, said
        content: list[dict[str, Any]] = []
        if output.reasoning:
            content.append({"type": "thinking", "thinking": output.reasoning, "signature": ""})
        if output.content:
            content.append({"type": "text", "text": output.content, "citations": None})
        for call in output.calls:
            content.append(
                {"type": "tool_use", "id": call.call_id, "name": call.name, "input": _arguments(call.arguments)}
            )
        message = self._message(content, usage) | _stop_fields(choice, output.finish_reason, bool(output.calls))
        return _json(message if timeline is None else message | {"timeline": timeline})

    def opening(self, choice: Choice) -> bytes:
        """See `AnswerFormat.opening`."""
        usage = Usage(len(choice.request.prompt_token_ids), 0, choice.cached_tokens)
        return _event("message_start", {"message": self._message([], usage)}) + _event("ping", {})

    def delta(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        """See `AnswerFormat.delta`: blocks begin and end by themselves."""
        events = []
        if delta.reasoning:
            events.append(self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""}))
            events.append(self._piece({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.content:
            events.append(self._block("text", {"type": "text", "text": "", "citations": None}))
            events.append(self._piece({"type": "text_delta", "text": delta.content}))
        self._called = self._called or bool(delta.calls)
        for piece in delta.calls:
            block: dict[str, Any] = {"type": "tool_use", "id": piece.call_id, "name": piece.name, "input": {}}
            events.append(self._block(piece.call, block))
            if piece.arguments:
                events.append(self._piece({"type": "input_json_delta", "partial_json": piece.arguments}))
        if delta.finish_reason is not None:
            self._stop = _stop_fields(choice, delta.finish_reason, self._called)
        return b"".join(events)

    def closing(self, usage: Usage, timeline: list[dict[str, Any]] | None) -> bytes:
        """See `AnswerFormat.closing`."""
        fields: dict[str, Any] = {"delta": self._stop, "usage": _usage(usage)}
        if timeline is not None:
            fields["timeline"] = timeline
        return self._end_block() + _event("message_delta", fields) + _event("message_stop", {})

    def failure(self, error: PenstockError) -> bytes:
        """See `AnswerFormat.failure`."""
        return b"event: error\ndata: " + anthropic_error(error) + b"\n\n"

    def _message(self, content: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def _block(self, kind: str | int, block: dict[str, Any]) -> bytes:
        """What begins a block, unless it is the one that is open."""
        if self._open == kind:
            return b""
        end = self._end_block()
        self._open, self._index = kind, self._index + 1
        return end + _event("content_block_start", {"index": self._index, "content_block": block})

    def _end_block(self) -> bytes:
        if self._open is None:
            return b""
        # Clients join a thinking block's signature from its deltas, too.
        signature = self._piece({"type": "signature_delta", "signature": ""}) if self._open == "thinking" else b""
        self._open = None
        return signature + _event("content_block_stop", {"index": self._index})

    def _piece(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", {"index": self._index, "delta": delta})


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _json({"type": name} | fields))


def _usage(usage: Usage) -> dict[str, int]:
    """In this API cached tokens are not among the input tokens."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _stop_fields(choice: Choice, finish_reason: str | None, called: bool) -> dict[str, Any]:
    """Why it ended. In this API the call of a tool that the client has chosen is no other than one of the model's."""
    reason = choice.text.stop_reason
    if finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if called:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _arguments(text: str) -> dict[str, Any]:
    """A call's input, which is an object here; text that is none (cut by max_tokens) is kept under one key."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": text}
