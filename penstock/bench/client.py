"""One streamed request to an OpenAI-compatible server, timed as its client sees it, and many of them at their times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from penstock.bench.questions import Question
from penstock.bench.serving_metrics import RequestRecord
from penstock.http_client import Client, RequestError

CHAT = "openai-chat"


async def ask(
    client: Client, path: str, backend: str, fields: dict[str, Any], question: Question, request_id: str
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
        async for event in client.stream(path, body, request_id):
            now = time.perf_counter()
            text = _text_of(event, backend)
            if text is not None:
                record.text += text
                if pieces:
                    record.itl.append(now - last)
                else:
                    record.ttft = now - record.start
                pieces, last = pieces + 1, now
            record.timeline = event.get("timeline", record.timeline)
            usage = event.get("usage")
            if usage:
                record.output_len = usage.get("completion_tokens") or 0
                record.prompt_len = usage.get("prompt_tokens") or record.prompt_len
    except RequestError as error:
        record.error = str(error)
        return record
    record.latency = last - record.start
    record.output_len = record.output_len or pieces  # a server that gives no usage
    if not pieces:
        record.error = "the stream ended without a token"
    return record


async def run_load(
    questions: Sequence[Question],
    times: Sequence[float],
    send: Callable[[int, Question], Awaitable[RequestRecord]],
    *,
    max_concurrency: int | None = None,
) -> tuple[list[RequestRecord], float]:
    """(records in the questions' order, seconds from the first request to the last answer).

    Args:
        times: seconds after the beginning at which each is sent, ascending.
        send: asks the question with this number.
        max_concurrency: most that are open at a time; others wait, and their time has not begun.
    """
    limit = asyncio.Semaphore(max_concurrency or max(1, len(questions)))

    async def one(number: int, question: Question) -> RequestRecord:
        async with limit:
            return await send(number, question)

    begun = time.perf_counter()
    tasks = []
    for number, (at, question) in enumerate(zip(times, questions, strict=True)):
        if (wait := begun + at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(number, question)))
    records = await asyncio.gather(*tasks)
    return records, time.perf_counter() - min((record.start for record in records), default=begun)


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
