"""The routes of /v1/responses: create, read (also as a stream), cancel, delete. Made by app.py, one object a router."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

import msgspec
from starlette.routing import Route

from penstock.common.errors import BadRequest, NotFound
from penstock.router.chat import plan_messages, scored_tokens
from penstock.router.endpoints import Generation, Guarded, Scope
from penstock.router.error_bodies import Send, send_json
from penstock.router.front import Front, RequestHead
from penstock.router.protocol import decode_request
from penstock.router.reply import Plan, Receive, Reply
from penstock.router.responses.answer import ResponseFormat
from penstock.router.responses.background import EVENT_STREAM, BackgroundResponse
from penstock.router.responses.request import NAMES, Item, ResponsesRequest
from penstock.router.responses.store import ResponseKey, ResponseStore, Stored
from penstock.router.translate import in_words_of

_create = msgspec.json.Decoder(ResponsesRequest)
_items = msgspec.json.Decoder(list[Item])
_json = msgspec.json.Encoder().encode
Headers = list[tuple[bytes, bytes]]


class Responses:
    """What a router knows of responses: those it keeps, and those it makes in the background."""

    def __init__(self, front: Front) -> None:
        self._front = front
        config = front.config
        self._store = ResponseStore(config.response_store_mib << 20, config.response_ttl_s)
        self._running: dict[ResponseKey, BackgroundResponse] = {}

    def routes(self) -> list[Route]:
        """Their routes."""
        one = "/v1/responses/{response_id}"
        return [
            Route("/v1/responses", Generation(self._front, self._plan), methods=["POST"]),
            Route(one, Guarded(self._front, self._read), methods=["GET"]),
            Route(one, Guarded(self._front, self._delete), methods=["DELETE"]),
            Route(f"{one}/cancel", Guarded(self._front, self._cancel), methods=["POST"]),
        ]

    async def close(self) -> None:
        """End what runs in the background."""
        await asyncio.gather(*(running.cancel() for running in self._running.values()))

    async def _plan(self, body: bytes, head: RequestHead, front: Front) -> Plan:
        request = decode_request(_create, body)
        model = front.model_name(request.model)
        if request.background and not front.config.response_store_mib:
            raise BadRequest(
                "background needs a router that keeps responses (--response-store-mib)", param="background"
            )
        earlier = self._earlier(head.tenant, request.previous_response_id)
        chat = request.chat([item for turn in earlier for item in _items.decode(turn)])
        response_id = f"resp_{head.request_id}"  # made up here, unlike other answers' ids: nobody can guess it
        key = head.tenant, response_id
        scores = functools.partial(scored_tokens, front.tokenizer)
        ended = functools.partial(self._ended, key, request, earlier)
        format = ResponseFormat(_response(request, response_id, model, front), scores, ended)
        with in_words_of(NAMES):
            plan = await plan_messages(chat, format, len(body), head, front)
        if not request.background:
            return plan
        background = functools.partial(self._start, key, BackgroundResponse(format, bool(request.stream)))
        return dataclasses.replace(plan, stream=True, background=background)

    def _earlier(self, tenant: str, response_id: str | None) -> tuple[bytes, ...]:
        """The turns of the conversation that a response ends."""
        if response_id is None:
            return ()
        field = "previous_response_id"
        if (tenant, response_id) in self._running:
            raise BadRequest(f"{field}: the response {response_id!r} is still in the making", param=field)
        stored = self._store.get((tenant, response_id), time.monotonic())
        if stored is None:
            raise BadRequest(f"{field}: there is no response {response_id!r} here", param=field)
        if not stored.turns:
            raise BadRequest(f"{field}: the response {response_id!r} was not completed", param=field)
        return stored.turns

    def _ended(
        self, key: ResponseKey, request: ResponsesRequest, earlier: Sequence[bytes], format: ResponseFormat
    ) -> None:
        """Keep a response whose status is final, if that is wanted."""
        response = format.response
        running = self._running.get(key)
        if not request.stored or (request.background and running is None):  # deleted meanwhile
            return
        turns: tuple[bytes, ...] = ()
        if response["status"] in ("completed", "incomplete"):
            turns = (*earlier, _json(request.items), _json(response["output"]))
        self._store.put(key, Stored(_json(response), turns), time.monotonic())

    # ------------------------------------------------------------ in the background

    async def _start(
        self,
        key: ResponseKey,
        running: BackgroundResponse,
        reply: Reply,
        receive: Receive,
        send: Send,
        headers: Headers,
    ) -> None:
        """Begin, and answer the client: with the response as it is, or with its events from the first on."""
        self._running[key] = running
        running.start(reply, done=functools.partial(self._done, key))
        if running.streamed:
            await running.follow(-1, receive, send, headers)
        else:
            await send_json(send, _json(running.format.response), headers)

    def _done(self, key: ResponseKey) -> None:
        """All events are there: those of a stream are kept with the response."""
        running = self._running.pop(key, None)
        stored = self._store.get(key, time.monotonic())
        if running is not None and running.streamed and stored is not None:
            kept = dataclasses.replace(stored, events=tuple(running.events))
            self._store.put(key, kept, time.monotonic())

    # ------------------------------------------------------------ the other routes

    async def _read(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        key = _key(scope)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        stream = query.get("stream", ["false"])[-1].lower() in ("1", "true")
        after = _number(query.get("starting_after", ["-1"])[-1])
        running, stored = self._running.get(key), self._store.get(key, time.monotonic())
        if running is not None and (running.streamed or not stream):
            if stream:
                await running.follow(after, receive, send, headers)
            else:
                await send_json(send, _json(running.format.response), headers)
        elif stream and (running is not None or (stored is not None and not stored.events)):
            raise BadRequest(
                "only responses created with background=true and stream=true can be streamed", param="stream"
            )
        elif stored is None:
            raise _unknown(key)
        elif stream:
            body = b"".join(stored.events[after + 1 :])
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM + headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await send_json(send, stored.response, headers)

    async def _cancel(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        key = _key(scope)
        running = self._running.get(key)
        if running is not None:
            await running.cancel()
            await send_json(send, _json(running.format.response), headers)
            return
        stored = self._store.get(key, time.monotonic())
        if stored is None:
            raise _unknown(key)
        response = msgspec.json.decode(stored.response)
        if not response["background"]:
            raise BadRequest("only responses created with background=true can be cancelled")
        if response["status"] != "cancelled":
            raise BadRequest(f"the response {key[1]!r} is over, with status {response['status']!r}")
        await send_json(send, stored.response, headers)

    async def _delete(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        key = _key(scope)
        running = self._running.pop(key, None)
        if running is not None:
            await running.cancel()
        elif not self._store.pop(key):
            raise _unknown(key)
        await send_json(send, _json({"id": key[1], "object": "response", "deleted": True}), headers)


def _response(request: ResponsesRequest, response_id: str, model: str, front: Front) -> dict[str, Any]:
    """The fields of a response before anything was generated: what was asked for, as this API repeats it."""
    built = msgspec.to_builtins
    defaults = front.defaults.sampling()
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


def _key(scope: Scope) -> ResponseKey:
    """Which response an address speaks of; another API key's is as unknown as one that never was."""
    return scope.get("tenant", ""), scope["path_params"]["response_id"]


def _unknown(key: ResponseKey) -> NotFound:
    return NotFound(f"there is no response {key[1]!r} here", param="response_id")


def _number(text: str) -> int:
    try:
        return max(int(text), -1)
    except ValueError as error:
        raise BadRequest(f"starting_after must be a number, got {text!r}", param="starting_after") from error
