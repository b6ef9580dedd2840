"""The routes of /v1/responses: create, read (also as a stream), cancel, delete. Made by app.py, one object a router.

A response that this router makes in the background is read here as it grows; what others make, and what is over, is
read from the store (store.py), which all routers share.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qs

import msgspec
from starlette.routing import Route

from penstock.common.errors import BadRequest, NotFound, PenstockError, Unavailable
from penstock.router.chat import plan_messages, scored_tokens
from penstock.router.endpoints import Generation, Guarded, Scope
from penstock.router.error_bodies import Send, send_json
from penstock.router.front import Front, RequestHead
from penstock.router.protocol import decode_request
from penstock.router.reply import Plan, Receive, Reply
from penstock.router.responses.answer import ResponseFormat
from penstock.router.responses.asked import new_response
from penstock.router.responses.background import TELL_S, BackgroundResponse
from penstock.router.responses.following import StoredLog, any_of, follow
from penstock.router.responses.request import NAMES, ResponsesRequest, earlier_items
from penstock.router.responses.store import ResponseKey, ResponseStore, Stored, unknown
from penstock.router.translate import in_words_of

_create = msgspec.json.Decoder(ResponsesRequest)
_json = msgspec.json.Encoder().encode
_RESPONSE_ID = re.compile(r"resp_[0-9a-f]{32}")
Headers = list[tuple[bytes, bytes]]


class Responses:
    """What a router knows of responses: those that it makes now, and the store of all."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._store = ResponseStore(front.config)
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

    def leave(self) -> None:
        """This router ends: nobody can wait here any longer for what others make."""
        self._store.leave()

    async def close(self) -> None:
        """End what runs in the background."""
        self.leave()
        made = list(self._running.values())
        await asyncio.gather(*(running.cancel() for running in made))
        await asyncio.gather(*(running.gone() for running in made))
        await self._store.close()

    # ------------------------------------------------------------ creating

    async def _plan(self, body: bytes, head: RequestHead, front: Front) -> Plan:
        request = decode_request(_create, body)
        model = front.model_name(request.model)
        if request.background and not self._store.max_bytes:
            raise BadRequest(
                "background needs a router that keeps responses (--response-store-mib)", param="background"
            )
        earlier = await self._earlier(head.tenant, request.previous_response_id)
        chat = request.chat(earlier_items(earlier))
        response_id = f"resp_{head.request_id}"  # made up here, unlike other answers' ids: nobody can guess it
        key = head.tenant, response_id
        scores = functools.partial(scored_tokens, front.tokenizer)
        format = ResponseFormat(new_response(request, response_id, model, front.defaults), scores)
        with in_words_of(NAMES):
            plan = await plan_messages(chat, format, len(body), head, front)
        if not request.stored or not self._store.max_bytes:
            return plan
        stored = functools.partial(_stored, request, earlier, format)
        if request.background:
            made = BackgroundResponse(key, format, bool(request.stream), self._store, stored)
            return dataclasses.replace(plan, stream=True, conduct=functools.partial(self._begin, key, made))
        return dataclasses.replace(plan, conduct=functools.partial(self._run, key, format, stored))

    async def _earlier(self, tenant: str, response_id: str | None) -> tuple[bytes, ...]:
        """The turns of the conversation that a response ends."""
        if response_id is None:
            return ()
        field = "previous_response_id"
        key = tenant, response_id
        made = await self._made_here(key)
        if made is not None and not made.format.is_final:
            raise BadRequest(f"{field}: the response {response_id!r} is still in the making", param=field)
        try:
            _check(key)
            stored = await self._store.get(key) if made is None else made.stored()
        except NotFound as error:
            raise BadRequest(f"{field}: {error.message}", param=field) from error
        if stored.made_elsewhere:
            raise BadRequest(f"{field}: the response {response_id!r} is still in the making", param=field)
        if not stored.turns:
            raise BadRequest(f"{field}: the response {response_id!r} was not completed", param=field)
        return stored.turns

    async def _run(
        self,
        key: ResponseKey,
        format: ResponseFormat,
        stored: Callable[[], Stored],
        reply: Reply,
        receive: Receive,
        send: Send,
        headers: Headers,
    ) -> None:
        """Answer the client itself. Before it has all of the answer that is stored: then it may ask for it anywhere."""

        async def stored_first(message: Any) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await self._store.keep(key, stored())
            await send(message)

        await reply.run(receive, stored_first)

    async def _begin(
        self,
        key: ResponseKey,
        made: BackgroundResponse,
        reply: Reply,
        receive: Receive,
        send: Send,
        headers: Headers,
    ) -> None:
        """Begin in the background, and answer the client: with the response as it is, or with its events."""
        try:
            await made.begin()
        except PenstockError as error:
            if reply.over is not None:
                reply.over(reply, error)
            raise
        self._running[key] = made
        made.start(reply).add_done_callback(lambda _: self._running.pop(key))
        if made.streamed:
            await follow(made, -1, receive, send, headers)
        else:
            await send_json(send, _json(made.format.response), headers)

    # ------------------------------------------------------------ the other routes

    async def _made_here(self, key: ResponseKey) -> BackgroundResponse | None:
        """What this router makes now, or holds for a Redis that is away; of an end nobody hears before it is stored."""
        running = self._running.get(key)
        if running is not None and running.format.is_final:
            await running.over()
            return running if running.held else None
        return running

    async def _read(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        key = _key(scope)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        stream = query.get("stream", ["false"])[-1].lower() in ("1", "true")
        after = _number(query.get("starting_after", ["-1"])[-1])
        found = await self._made_here(key) or await self._store.get(key)
        if not stream:
            body = found.body if isinstance(found, Stored) else _json(found.format.response)
            await send_json(send, body, headers)
        elif not found.streamed:
            raise BadRequest(
                "only responses created with background=true and stream=true can be streamed", param="stream"
            )
        elif isinstance(found, BackgroundResponse):
            await follow(found, after, receive, send, headers)
        else:
            bell = asyncio.Event()
            async with self._store.changes(key, bell):
                await follow(StoredLog(self._store, key, bell), after, receive, send, headers)

    async def _cancel(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        key = _key(scope)
        running = await self._made_here(key)
        if running is not None:
            await running.cancel()
            body = _json(running.format.response)
        else:
            bell = asyncio.Event()
            async with self._store.changes(key, bell):
                if await self._store.wish(key, "cancel") == "told":
                    await self._wait_until_over(key, bell)
            body = (await self._store.get(key)).body
        response = msgspec.json.decode(body)
        if not response["background"]:
            raise BadRequest("only responses created with background=true can be cancelled")
        if response["status"] != "cancelled":
            raise BadRequest(f"the response {key[1]!r} is over, with status {response['status']!r}")
        await send_json(send, body, headers)

    async def _wait_until_over(self, key: ResponseKey, bell: asyncio.Event) -> None:
        """Until the router that makes a response has ended it; it is gone when its lease is."""
        deadline = time.monotonic() + self._store.lease_s + TELL_S
        while True:
            bell.clear()
            if not (await self._store.get(key)).made_elsewhere:
                return
            if time.monotonic() > deadline:
                raise Unavailable("the router that makes the response does not end it")
            await any_of(bell, timeout_s=max(deadline - time.monotonic(), 0.0))

    async def _delete(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        key = _key(scope)
        known = await self._store.wish(key, "delete")
        running = self._running.get(key)
        if running is not None:
            await running.cancel()
            await running.gone()
            if known != "told":  # Redis had lost it, or its lease: it has been stored as it ended
                await self._store.wish(key, "delete")
        elif known == "unknown":
            raise unknown(key)
        await send_json(send, _json({"id": key[1], "object": "response", "deleted": True}), headers)


def _stored(request: ResponsesRequest, earlier: Sequence[bytes], format: ResponseFormat) -> Stored:
    """What is kept of a response whose status is final."""
    response = format.response
    turns: tuple[bytes, ...] = ()
    if response["status"] in ("completed", "incomplete"):
        turns = (*earlier, _json(request.items), _json(response["output"]))
    return Stored(_json(response), turns, bool(request.background and request.stream))


def _key(scope: Scope) -> ResponseKey:
    """Which response an address speaks of; another API key's is as unknown as one that never was."""
    key = scope.get("tenant", ""), scope["path_params"]["response_id"]
    _check(key)
    return key


def _check(key: ResponseKey) -> None:
    if not _RESPONSE_ID.fullmatch(key[1]):
        raise unknown(key)


def _number(text: str) -> int:
    try:
        return max(int(text), -1)
    except ValueError as error:
        raise BadRequest(f"starting_after must be a number, got {text!r}", param="starting_after") from error
