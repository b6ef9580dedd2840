"""The fields of a response before anything was generated: what was asked for, as this API repeats it."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from penstock.common.generation_defaults import GenerationDefaults
from penstock.router.responses.request import ResponsesRequest


def new_response(
    request: ResponsesRequest, response_id: str, model: str, generation_defaults: GenerationDefaults
) -> dict[str, Any]:
    """All fields, with no output yet."""
    built = msgspec.to_builtins
    defaults = generation_defaults.sampling()
    text = built(request.text) if request.text is not None else {}
    if not text.get("format"):
        text["format"] = {"type": "text"}
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "queued" if request.background else "in_progress",
        "background": bool(request.background),
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": built(request.reasoning) if request.reasoning is not None else {"effort": None, "summary": None},
        "store": request.stored,
        "temperature": defaults.get("temperature", 1.0) if request.temperature is None else request.temperature,
        "text": text,
        "tool_choice": "auto" if request.tool_choice is None else built(request.tool_choice),
        "tools": built(request.tools or []),
        "top_logprobs": request.top_logprobs or 0,
        "top_p": defaults.get("top_p", 1.0) if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }
