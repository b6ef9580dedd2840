"""Fields of vLLM's and OpenAI's bodies that a route does not have: each asks for nothing there, or is refused.

A field that nobody knows is ignored, as vLLM does; one that a client may rely on never is. Used by protocol.py.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import msgspec

from penstock.common.errors import BadRequest

# Field -> the values that ask for nothing. None asks for nothing everywhere.
_NOWHERE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "container": (),
    "context_management": (),
    "enable_response_messages": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "generate_summary": (),
    "kv_transfer_params": (),
    "logits_processors": ([],),
    "mcp_servers": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"], []),
    "prediction": (),
    "previous_input_messages": ([],),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "thinking_token_budget": (),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
# Fields that some of the routes that generate have, with the values that ask for nothing where they are not.
_NOTHING: tuple[Any, ...] = (False, 0, "", [], {})
_SOMEWHERE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "allowed_token_ids", "bad_words", "chat_template", "chat_template_kwargs", "continue_final_message",
        "documents", "echo", "frequency_penalty", "guided_choice", "guided_grammar", "guided_json",
        "guided_json_object", "guided_regex", "guided_whitespace_pattern", "ignore_eos",
        "include_stop_str_in_output", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens", "messages",
        "min_p", "min_tokens", "presence_penalty", "priority", "prompt", "prompt_logprobs", "reasoning_effort",
        "request_id", "return_token_ids", "return_tokens_as_token_ids", "seed", "stop", "stop_token_ids",
        "stream_options", "structured_outputs", "tools", "top_logprobs", "truncate_prompt_tokens", "truncation_side",
        "use_beam_search",
    ), _NOTHING),
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "best_of": (1,),
    "include_reasoning": (True,),
    "length_penalty": (1.0,),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "repetition_penalty": (1.0,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "timeline": (False,),
    "tool_choice": ("none", "auto"),
    "top_k": (0, -1),
}  # fmt: skip


def refuse_unsupported(kind: Any, fields: dict[str, msgspec.Raw]) -> None:
    """Raise BadRequest for one of a body's fields that asks for something which `kind`, the body's type, has not."""
    foreign = _foreign(kind)
    for field in fields.keys() & foreign.keys():
        value = msgspec.json.decode(fields[field])
        if value is None or value in foreign[field]:
            continue
        if field in _NOWHERE:
            raise not_supported(field)
        raise BadRequest(f"{field} is not a field of this route", param=field)


@functools.cache
def _foreign(kind: Hashable) -> dict[str, tuple[Any, ...]]:
    own = set(getattr(kind, "__struct_fields__", ()))
    generates = "stream" in own  # routes that only count tokens may be sent a whole request
    known = {**_SOMEWHERE, **_NOWHERE} if generates else _NOWHERE
    return {name: values for name, values in known.items() if name not in own}


def not_supported(field: str, what: str = "") -> BadRequest:
    """The error for a known field that asks for something we do not have."""
    return BadRequest(f"{what or field} is not supported yet", param=field)
