"""Bodies for fuzzing: valid ones of every route, and what a hostile or broken client makes of them."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import msgspec

from penstock.router.anthropic.request import MessagesRequest
from penstock.router.protocol import ChatRequest, CompletionRequest
from penstock.router.responses.request import ResponsesRequest

USER = {"role": "user", "content": "水力? Why does it fill?"}
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
FUNCTION = {"name": "rain", "description": "Rain.", "parameters": PARAMETERS}
CALL = {"id": "c0", "type": "function", "function": {"name": "rain", "arguments": '{"place": "Bergen"}'}}
CHAT: dict[str, Any] = {"messages": [{"role": "system", "content": "Grüße."}, USER], "max_tokens": 6, "seed": 1}
TOOLS: dict[str, Any] = {
    "messages": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c0", "content": "wet"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "max_tokens": 6,
}
SCORED = {"logprobs": True, "top_logprobs": 2, "n": 2, "stop": ["a", "bc"], "logit_bias": {"5": 1.5}}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
MESSAGES: dict[str, Any] = {"messages": [USER], "max_tokens": 6, "system": "Be brief."}
BLOCKS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Ask.", "signature": ""},
                {"type": "tool_use", "id": "t0", "name": "rain", "input": {"place": "Bergen"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t0", "content": "wet"}]},
    ],
    "max_tokens": 6,
    "stop_sequences": ["never"],
    "tools": [{"name": "rain", "input_schema": PARAMETERS}],
}
ITEMS: dict[str, Any] = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
        {"type": "function_call", "call_id": "c0", "name": "rain", "arguments": '{"place": "Bergen"}'},
        {"type": "function_call_output", "call_id": "c0", "output": "wet"},
    ],
    "max_output_tokens": 6,
    "tools": [{"type": "function", **FUNCTION}],
    "text": {"format": {"type": "text"}},
    "metadata": {"a": "b"},
}
COMPLETION: dict[str, Any] = {"prompt": "The river", "max_tokens": 6, "temperature": 0.5}
VALID: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        COMPLETION,
        {"prompt": ["a", "b"], "max_tokens": 3, "n": 2, "echo": True, "logprobs": 2},
        {"prompt": [5, 6, 7], "max_tokens": 3, "prompt_logprobs": 1, "stop_token_ids": [9]},
        {"prompt": [[5, 6], [7]], "max_tokens": 3, "use_beam_search": True, "n": 2},
        {"prompt": "a b", "max_tokens": 3, "request_id": "r", "logprobs": 1, "return_tokens_as_token_ids": True},
    ],
    "/v1/chat/completions": [CHAT, TOOLS, CHAT | SCORED, CHAT | {"messages": PARTS}],
    "/v1/responses": [{"input": "Why?", "max_output_tokens": 6}, ITEMS],
    "/v1/messages": [MESSAGES, BLOCKS],
    "/v1/messages/count_tokens": [{"messages": [USER]}, BLOCKS],
    "/invocations": [COMPLETION, CHAT],
    "/tokenize": [{"prompt": "The river", "return_token_strs": True}, {"messages": [USER]}],
    "/detokenize": [{"tokens": [5, 6, 7]}],
}
# None of them asks for much work where it is allowed.
HOSTILE: list[Any] = [
    None, True, False, 0, 1, 2, -1, 3.5, -0.0, 1e308, -1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63) - 1, 10**40,
    "", "a", "0", "\x00", "\ud800", "\ufeff", "😀" * 20, "x" * 5000, "{% raise %}", "</think>", "<tool_call>",
    "../../etc/passwd", [], [[]], [None], [0], [-1], ["a"], [{}], [2**70], {}, {"a": None}, {"": ""},
    {"type": "text"}, {"type": 7}, {"type": "object"}, {"type": "json_object"}, {"include_usage": True},
    {"$ref": "#"}, {"type": "function", "function": {"name": "rain"}},
]  # fmt: skip
FIELDS = sorted(
    {
        name
        for struct in (CompletionRequest, ChatRequest, ResponsesRequest, MessagesRequest)
        for name in struct.__struct_fields__
    }
    | {"response_format", "structured_outputs", "guided_json", "guided_regex", "suffix", "prompt_embeds"}
)


def mutated(chooser: random.Random, path: str) -> bytes:
    """A body for a route: a valid one, changed up to three times; one in eight is broken below JSON's level."""
    body = copy.deepcopy(chooser.choice(VALID[path]))
    if chooser.random() < 0.3:
        body["stream"] = True
    for _ in range(chooser.choice((0, 1, 1, 1, 2, 3))):
        _change(chooser, body)
    data = json.dumps(body, ensure_ascii=chooser.random() < 0.5).encode("utf-8", "surrogatepass")
    return _broken(chooser, data) if chooser.random() < 0.125 else data


def _change(chooser: random.Random, body: dict[str, Any]) -> None:
    """One change at a random place."""
    kind = chooser.random()
    if kind < 0.35:
        body[chooser.choice(FIELDS)] = copy.deepcopy(chooser.choice(HOSTILE))
        return
    places = list(_places(body))
    if not places:
        return
    holder, key = chooser.choice(places)
    if kind < 0.75:
        holder[key] = copy.deepcopy(chooser.choice(HOSTILE))
    elif kind < 0.85:
        del holder[key]
    elif kind < 0.9:
        holder[key] = [holder[key]]
    elif kind < 0.95:
        holder[key] = {"content": holder[key]}
    else:
        other, name = chooser.choice(places)
        holder[key] = copy.deepcopy(other[name])


def _places(value: Any) -> Any:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _broken(chooser: random.Random, data: bytes) -> bytes:
    at = chooser.randrange(len(data) + 1)
    noise = chooser.randbytes(chooser.randrange(1, 5))
    deep = 100_000
    return chooser.choice(
        [
            data[:at],
            data[:at] + noise + data[at:],
            data[:at] + noise + data[at + len(noise) :],
            data + data,
            b"",
            b"[" * deep,
            b'{"prompt":' * deep,
            b'{"messages":' + b"[" * deep + b"]" * deep + b"}",
            data.replace(b'"a"', b"NaN"),
            data.replace(b"{", b'{"max_tokens":2,"max_tokens":3,', 1),
            msgspec.msgpack.encode({"prompt": "a"}),
        ]
    )
