"""Answers of POST /v1/responses: a response in one piece, or the events response.created … response.completed.

One object builds both: the events tell how the response grows, and `response` is what it has grown to.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from penstock.common.errors import BadRequest, Overloaded, PenstockError
from penstock.router.answer_format import AnswerFormat, CallDelta, Delta, Said, Usage
from penstock.router.choice import Choice, ScoredToken

_json = msgspec.json.Encoder().encode
Scores = Callable[[Sequence[ScoredToken]], list[dict[str, Any]]]


class ResponseFormat(AnswerFormat):
    """Writes one response; requests of this API have one choice.

    `response` holds all fields but the output's; `scores` writes logprobs.
    """

    def __init__(self, response: dict[str, Any], scores: Scores) -> None:
        self._response, self._scores = response, scores
        self._sequence_number = 0
        self._created = False
        self.is_final = False
        self._open: str | int | None = None  # what the newest item is: "reasoning", "message", or a call's number
        self._text: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] = []
        self._unwritten: list[ScoredToken] = []  # whose text has not come yet
        self._finish_reason: str | None = None

    @property
    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        if self._open is not None:
            self._fill_in()
        return self._response

    def whole(
        self, choices: Sequence[Choice], said: Sequence[Said], usage: Usage, timeline: list[dict[str, Any]] | None
    ) -> bytes:
        """See `AnswerFormat.whole`."""
        [choice], [output] = choices, said
        calls = [CallDelta(at, call.arguments, call.call_id, call.name) for at, call in enumerate(output.calls)]
        self.delta(choice, Delta(output.content, output.reasoning, calls, output.tokens, output.finish_reason), None)
        self.closing(usage, timeline)
        return _json(self._response)

    def queued(self) -> bytes:
        """The first events of a response that is made in the background."""
        self._created = True
        return self._lifecycle("created") + self._lifecycle("queued")

    def opening(self, choice: Choice) -> bytes:
        """See `AnswerFormat.opening`."""
        self._response["status"] = "in_progress"
        created = b"" if self._created else self._lifecycle("created")
        self._created = True
        return created + self._lifecycle("in_progress")

    def delta(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        """See `AnswerFormat.delta`: items begin and end by themselves."""
        events = []
        if delta.reasoning:
            events.append(self._begin("reasoning", "rs", {"type": "reasoning", "summary": [], "content": []}))
            events.append(self._piece("reasoning_text.delta", delta.reasoning, {"content_index": 0}))
        if delta.reasoning or delta.calls:
            self._unwritten.clear()
        self._unwritten.extend(delta.tokens)
        if delta.content or (delta.tokens and self._open == "message"):
            events.append(self._begin("message", "msg", {"type": "message", "role": "assistant", "content": []}))
            logprobs = self._scores(self._unwritten)
            self._unwritten.clear()
            self._logprobs += logprobs
            events.append(self._piece("output_text.delta", delta.content, {"content_index": 0, "logprobs": logprobs}))
        for piece in delta.calls:
            fields = {"type": "function_call", "call_id": piece.call_id, "name": piece.name, "arguments": ""}
            events.append(self._begin(piece.call, "fc", fields))
            if piece.arguments:
                events.append(self._piece("function_call_arguments.delta", piece.arguments, {}))
        self._finish_reason = delta.finish_reason
        return b"".join(events)

    def closing(self, usage: Usage, timeline: list[dict[str, Any]] | None) -> bytes:
        """See `AnswerFormat.closing`; a `timeline` becomes a field of the response."""
        status = "completed"
        if self._finish_reason == "length":
            status = "incomplete"
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        events = self._end(status)
        self._response |= {"usage": _usage(usage), "completed_at": int(time.time())}
        if timeline is not None:
            self._response["timeline"] = timeline
        return events + self._final(status)

    def failure(self, error: PenstockError) -> bytes:
        """See `AnswerFormat.failure`; the response says why."""
        kinds = ((BadRequest, "invalid_prompt"), (Overloaded, "rate_limit_exceeded"))
        code = next((code for kind, code in kinds if isinstance(error, kind)), "server_error")
        self._stop("incomplete")
        self._response["error"] = {"code": code, "message": error.message}
        return self._final("failed")

    def cancelled(self) -> None:
        """The response ends as it is; there is no event for that."""
        self._stop("incomplete")
        self._response["status"] = "cancelled"
        self.is_final = True

    def _final(self, status: str) -> bytes:
        self._response["status"] = status
        event = self._lifecycle(status)
        self.is_final = True
        return event

    def _lifecycle(self, name: str) -> bytes:
        return self._event(name, {"response": self._response})

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        self._sequence_number += 1
        return written_event(f"response.{name}", self._sequence_number - 1, fields)

    # ------------------------------------------------------------ the newest item

    def _begin(self, kind: str | int, prefix: str, item: dict[str, Any]) -> bytes:
        """What begins an item, unless it is the one that is open."""
        if self._open == kind:
            return b""
        events = self._end("completed")
        self._open = kind
        self._response["output"].append({"id": f"{prefix}_{uuid.uuid4().hex}", **item, "status": "in_progress"})
        events += self._event("output_item.added", self._at(item=self._response["output"][-1]))
        if isinstance(kind, str):
            events += self._event("content_part.added", self._at(content_index=0, part=self._part()))
        return events

    def _piece(self, name: str, text: str, fields: dict[str, Any]) -> bytes:
        self._text.append(text)
        return self._event(name, {**self._of_item(), **fields, "delta": text})

    def _end(self, status: str) -> bytes:
        """What ends the open item, if there is one."""
        if self._open is None:
            return b""
        item = self._stop(status)
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        if item["type"] == "function_call":
            events = self._event("function_call_arguments.done", {**self._of_item(), "arguments": text})
        else:
            part = {**self._of_item(), "content_index": 0}
            if item["type"] == "reasoning":
                events = self._event("reasoning_text.done", part | {"text": text})
            else:
                logprobs = item["content"][0]["logprobs"]
                events = self._event("output_text.done", part | {"text": text, "logprobs": logprobs})
            events += self._event("content_part.done", part | {"part": item["content"][0]})
        return events + self._event("output_item.done", self._at(item=item))

    def _stop(self, status: str) -> dict[str, Any]:
        """The open item, complete; the empty one if there is none."""
        if self._open is None:
            return {}
        item = self._fill_in()
        item["status"] = status
        self._open, self._text, self._logprobs = None, [], []
        return item

    def _fill_in(self) -> dict[str, Any]:
        """The open item with all of its text so far."""
        item: dict[str, Any] = self._response["output"][-1]
        self._text = ["".join(self._text)]
        if item["type"] == "function_call":
            item["arguments"] = self._text[0]
        else:
            item["content"] = [self._part(self._text[0])]
        return item

    def _part(self, text: str = "") -> dict[str, Any]:
        if self._open == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}

    def _at(self, **fields: Any) -> dict[str, Any]:
        """Fields of an event about an item; one about a part of it names the item, too."""
        where: dict[str, Any] = {"output_index": len(self._response["output"]) - 1}
        return (self._of_item() if "part" in fields else where) | fields

    def _of_item(self) -> dict[str, Any]:
        output = self._response["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}


def written_event(kind: str, number: int, fields: dict[str, Any]) -> bytes:
    """An event as it is sent."""
    body = _json({"type": kind, "sequence_number": number} | fields)
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
