"""One streamed request to an OpenAI-compatible server, timed as its client sees it. Used by `penstock bench serve`."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from penstock.bench.serving_metrics import RequestRecord

CHAT = "openai-chat"


@dataclass(frozen=True)
class Question:
    """What to ask: text, or token ids where the route takes them."""

    prompt: str | list[int]
    prompt_len: int
    output_len: int


async def ask(
    session: aiohttp.ClientSession, url: str, backend: str, fields: dict[str, Any], question: Question, request_id: str
) -> RequestRecord:
    """Send it and read the answer to its end; whatever goes wrong is the record's `error`.

    Args:
        fields: what every request of the run says (model, sampling).
        request_id: sent as X-Request-Id.
    """
    body = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    if backend == CHAT:
        body |= {"messages": [{"role": "user", "content": question.prompt}]}
        body |= {"max_completion_tokens": question.output_len}
    else:
        body |= {"prompt": question.prompt, "max_tokens": question.output_len}
    record = RequestRecord(question.prompt_len, start=time.perf_counter())
    last = record.start
    pieces = 0
    try:
        async with session.post(url, json=body, headers={"X-Request-Id": request_id}) as response:
            if response.status != 200:
                record.error = f"{response.status} {response.reason}: {_message(await response.text())}"
                return record
            async for event in _events(response):
                now = time.perf_counter()
                if "error" in event:
                    record.error = _message(json.dumps(event))
                    return record
                text = _text_of(event, backend)
                if text is not None:
                    record.text += text
                    if pieces:
                        record.itl.append(now - last)
                    else:
                        record.ttft = now - record.start
                    pieces, last = pieces + 1, now
                usage = event.get("usage")
                if usage:
                    record.output_len = usage.get("completion_tokens") or 0
                    record.prompt_len = usage.get("prompt_tokens") or record.prompt_len
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"
        return record
    record.latency = last - record.start
    record.output_len = record.output_len or pieces  # a server that gives no usage
    if not pieces:
        record.error = "the stream ended without a token"
    return record


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Payloads of a stream of server-sent events, as each is complete."""
    rest = b""
    async for piece in response.content.iter_any():
        *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            data = b"\n".join(lines)
            if data and data != b"[DONE]":
                yield json.loads(data)


def _text_of(event: dict[str, Any], backend: str) -> str | None:
    """Text of an event with a token in it ("" where a token has none); None for the others: the role, the usage."""
    choices = event.get("choices")
    if not choices:
        return None
    if backend != CHAT:
        text: str = choices[0].get("text") or ""
        return text
    delta = choices[0].get("delta") or {}
    content = delta.get("content")
    if not content and "role" in delta:
        return None
    return content or delta.get("reasoning_content") or delta.get("reasoning") or ""


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200]
