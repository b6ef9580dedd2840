"""The messages of a chat request, checked and put into the form that chat templates are written for.

Templates know Hugging Face's conventions: text as a string or a list of parts, arguments of calls as objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from penstock.common.errors import BadRequest

Message = dict[str, Any]
_TEXT_OF_PART = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_arguments = msgspec.json.Decoder(dict[str, Any])
# With the parts of their contents, and calls: each is checked, and a client's turn keeps the others waiting.
MAX_MESSAGES = 16_384


class ContentForms(NamedTuple):
    """What a template can make of a message's content; at least one is true."""

    text: bool = True
    parts: bool = False


def template_messages(messages: Sequence[Message], forms: ContentForms) -> list[Message]:
    """The messages for a template that takes these forms; keys that nothing is known of stay as they came.

    Raises:
        BadRequest: a message is wrong; names the place.
    """
    return [_message(message, f"messages[{at}]", forms) for at, message in enumerate(messages)]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise BadRequest for what `template_messages` would refuse."""
    check_count(
        "messages", messages, (message.get(field) for message in messages for field in ("content", "tool_calls"))
    )
    template_messages(messages, ContentForms())


def check_count(field: str, messages: Sequence[Any], contents: Iterable[Any]) -> None:
    """Raise BadRequest if there are too many messages, with the parts that they have in `contents`."""
    count = len(messages)
    if count <= MAX_MESSAGES:
        count += sum(len(content) for content in contents if isinstance(content, list))
    if count > MAX_MESSAGES:
        raise BadRequest(f"{field}: at most {MAX_MESSAGES} messages and parts, got {count}", param=field)


def _message(message: Message, where: str, forms: ContentForms) -> Message:
    role = message.get("role")
    if not isinstance(role, str):
        raise BadRequest(f"{where}.role must be a string", param=f"{where}.role")
    for field in ("function_call", "audio"):
        if message.get(field):
            raise BadRequest(f"{where}.{field} is not supported yet", param=f"{where}.{field}")
    result = dict(message)
    calls = result.pop("tool_calls", None)
    if calls:
        result["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    if role == "assistant":
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if reasoning is not None:  # templates know it by one of these names
            if not isinstance(reasoning, str):
                raise BadRequest(f"{where}.reasoning_content must be a string", param=f"{where}.reasoning_content")
            result |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), reasoning)
    if role == "tool":
        forms = ContentForms()  # templates take results of tools as text
    result["content"] = _content(message.get("content"), f"{where}.content", forms, may_lack=bool(calls))
    return result


def _content(content: object, where: str, forms: ContentForms, may_lack: bool) -> object:
    if content is None and may_lack:
        return None
    if content is None or isinstance(content, str):
        content = content or ""
        return content if forms.text else [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a string or a list of parts", param=where)
    texts = [_text(part, f"{where}[{at}]") for at, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts] if forms.parts else "\n".join(texts)


def _text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise BadRequest(f"{where} must be a part with a type", param=where)
    if kind not in _TEXT_OF_PART:
        raise BadRequest(f"a content part of type {kind!r} ({where}) is not supported yet", param=where)
    field = _TEXT_OF_PART[kind]
    text = part.get(field)
    if not isinstance(text, str):
        raise BadRequest(f"{where}.{field} must be a string", param=f"{where}.{field}")
    return text


def _tool_calls(calls: object, where: str) -> list[Message]:
    if not isinstance(calls, list):
        raise BadRequest(f"{where} must be a list of calls", param=where)
    return [_tool_call(call, f"{where}[{at}]") for at, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or call.get("type", "function") != "function" or not isinstance(function, dict):
        raise BadRequest(f"{where} must be a call of type 'function'", param=where)
    if not isinstance(function.get("name"), str):
        raise BadRequest(f"{where}.function.name must be a string", param=f"{where}.function.name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = _arguments.decode(arguments) if arguments.strip() else {}
        except (msgspec.DecodeError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        place = f"{where}.function.arguments"
        raise BadRequest(f"{place} must be the text of a JSON object", param=place)
    return {"type": "function"} | call | {"function": function | {"arguments": arguments}}
