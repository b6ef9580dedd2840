"""Reading the events that answer.py writes: what other routers show of a response in the making. Pure."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from penstock.router.responses.answer import written_event


class _Event(msgspec.Struct):
    type: str
    response: dict[str, Any] | None = None
    item: dict[str, Any] | None = None
    part: dict[str, Any] | None = None
    delta: str = ""
    logprobs: list[dict[str, Any]] = []


_event = msgspec.json.Decoder(_Event)
_fields = msgspec.json.Decoder(dict[str, Any])


def grown(log: bytes) -> dict[str, Any]:
    """The response that these events, from the first on, have grown to."""
    response: dict[str, Any] = {}
    output: list[dict[str, Any]] = []
    text: list[str] = []  # of the newest item, while it is open
    for event in map(_event.decode, _bodies(log)):
        if event.type.endswith(".delta"):
            text.append(event.delta)
            if event.logprobs:
                output[-1]["content"][0]["logprobs"] += event.logprobs
        elif event.response is not None:
            response, output = event.response, event.response["output"]
        elif event.type == "response.output_item.added" and event.item is not None:
            output.append(event.item)
        elif event.type == "response.content_part.added" and event.part is not None:
            output[-1]["content"] = [event.part]
        elif event.type == "response.output_item.done" and event.item is not None:
            output[-1] = event.item
            text.clear()
    if text:
        item = output[-1]
        holder, field = (item, "arguments") if item["type"] == "function_call" else (item["content"][0], "text")
        holder[field] = "".join(text)
    return response


def merged(log: bytes) -> bytes:
    """Fewer events that tell the same, where nobody counts them: deltas of one item that follow each other are one."""
    written = []
    for _, alike in itertools.groupby(map(_fields.decode, _bodies(log)), key=_mergeable):
        event, *others = alike
        for field, together in (("delta", "".join), ("logprobs", _chained)):
            if others and field in event:
                event[field] = together([one[field] for one in (event, *others)])
        written.append(written_event(event["type"], event["sequence_number"], event))
    return b"".join(written)


def _mergeable(event: dict[str, Any]) -> object:
    """The same for events that can be one."""
    return (event["type"], event["item_id"]) if "delta" in event else event["sequence_number"]


def _chained(lists: list[list[Any]]) -> list[Any]:
    return [one for each in lists for one in each]


def _bodies(log: bytes) -> list[bytes]:
    return [event.partition(b"\ndata: ")[2] for event in log.split(b"\n\n")[:-1]]
