"""The routes of /v1/responses: create, read (also as a stream), cancel, delete. Made by app.py, one object a router.

A response that this router makes in the background is read here as it grows; what others make, and what is over, is
read from the store (store.py), which all routers share.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Sequence
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
from penstock.router.responses.background import EVENT_STREAM, BackgroundResponse, disconnected
from penstock.router.responses.request import NAMES, Item, ResponsesRequest
from penstock.router.responses.store import ResponseKey, ResponseStore, Stored
from penstock.router.translate import in_words_of

_create = msgspec.json.Decoder(ResponsesRequest)
_items = msgspec.json.Decoder(list[Item])
_json = msgspec.json.Encoder().encode
_RESPONSE_ID = re.compile(r"resp_[0-9a-f]{32}")
Headers = list[tuple[bytes, bytes]]
TEND_S = 0.25  # how soon others see how far a response is, and are heard
LOOK_S = 0.05  # how often one that another router makes is looked at, where a client waits for it
GONE = "the router that made it is gone"


class Responses:
    """What a router knows of responses: those that it makes now, and the store of all."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._store = ResponseStore(front.config)
        self._lease_s = front.config.lease_s
        self._running: dict[ResponseKey, BackgroundResponse] = {}
        self._ending: dict[ResponseKey, Stored] = {}  # whose status is final, until they are stored
        self._tending: asyncio.Task[None] | None = None

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
        if self._tending is not None:
            await self._tending
        await self._store.close()

    async def _plan(self, body: bytes, head: RequestHead, front: Front) -> Plan:
        request = decode_request(_create, body)
        model = front.model_name(request.model)
        if request.background and not self._store.max_bytes:
            raise BadRequest(
                "background needs a router that keeps responses (--response-store-mib)", param="background"
            )
        earlier = await self._earlier(head.tenant, request.previous_response_id)
        chat = request.chat([item for turn in earlier for item in _items.decode(turn)])
        response_id = f"resp_{head.request_id}"  # made up here, unlike other answers' ids: nobody can guess it
        key = head.tenant, response_id
        scores = functools.partial(scored_tokens, front.tokenizer)
        ended = functools.partial(self._ended, key, request, earlier)
        format = ResponseFormat(_response(request, response_id, model, front), scores, ended)
        with in_words_of(NAMES):
            plan = await plan_messages(chat, format, len(body), head, front)
        if request.background:
            begin = functools.partial(self._begin, key, BackgroundResponse(format, bool(request.stream)))
            return dataclasses.replace(plan, stream=True, conduct=begin)
        kept = request.stored and self._store.max_bytes > 0
        return dataclasses.replace(plan, conduct=functools.partial(self._run, key)) if kept else plan

    async def _earlier(self, tenant: str, response_id: str | None) -> tuple[bytes, ...]:
        """The turns of the conversation that a response ends."""
        if response_id is None:
            return ()
        field = "previous_response_id"
        key = tenant, response_id
        made_here = await self._made_here(key)
        stored = await self._store.get(key) if _RESPONSE_ID.fullmatch(response_id) else None
        if made_here is not None or (stored is not None and stored.made_elsewhere):
            raise BadRequest(f"{field}: the response {response_id!r} is still in the making", param=field)
        if stored is None:
            raise BadRequest(f"{field}: there is no response {response_id!r} here", param=field)
        if not stored.turns:
            raise BadRequest(f"{field}: the response {response_id!r} was not completed", param=field)
        return stored.turns

    def _ended(
        self, key: ResponseKey, request: ResponsesRequest, earlier: Sequence[bytes], format: ResponseFormat
    ) -> None:
        """A status is final: note what is to be stored, if that is wanted."""
        response = format.response
        if request.stored and self._store.max_bytes:
            turns: tuple[bytes, ...] = ()
            if response["status"] in ("completed", "incomplete"):
                turns = (*earlier, _json(request.items), _json(response["output"]))
            self._ending[key] = Stored(_json(response), turns, bool(request.background and request.stream))

    async def _run(self, key: ResponseKey, reply: Reply, receive: Receive, send: Send, headers: Headers) -> None:
        """Answer the client itself. Before it has all of the answer that is stored: then it may ask for it anywhere."""

        async def stored_first(message: Any) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await self._keep(key)
            await send(message)

        try:
            await reply.run(receive, stored_first)
        finally:
            await self._keep(key)

    async def _keep(self, key: ResponseKey, events: Sequence[bytes] = ()) -> None:
        stored = self._ending.pop(key, None)
        if stored is not None:
            await self._store.keep(key, stored, events)

    # ------------------------------------------------------------ in the background

    async def _begin(
        self,
        key: ResponseKey,
        running: BackgroundResponse,
        reply: Reply,
        receive: Receive,
        send: Send,
        headers: Headers,
    ) -> None:
        """Begin, and answer the client: with the response as it is, or with its events from the first on."""
        try:
            await self._store.begin(key, Stored(_json(running.format.response), streamed=running.streamed))
        except PenstockError as error:
            if reply.over is not None:
                reply.over(error)
            raise
        self._running[key] = running
        running.start(reply, done=functools.partial(self._done, key))
        if self._tending is None or self._tending.done():
            self._tending = asyncio.get_running_loop().create_task(self._tend(), name="tend background responses")
        if running.streamed:
            await running.follow(-1, receive, send, headers)
        else:
            await send_json(send, _json(running.format.response), headers)

    async def _done(self, key: ResponseKey, events: Sequence[bytes]) -> None:
        """These are all its events; they are stored with the response, once."""
        await self._keep(key, events if self._running[key].streamed else ())
        del self._running[key]

    async def _made_here(self, key: ResponseKey) -> BackgroundResponse | None:
        """What this router makes now; of one that has ended nobody hears before it is stored."""
        running = self._running.get(key)
        if running is not None and running.format.is_final:
            await running.over()
            return None
        return running

    async def _tend(self) -> None:
        """Tell the other routers how far responses are, and do what they wish, as long as any is made here."""
        told: dict[ResponseKey, int] = {}
        while self._running:
            for key, running in list(self._running.items()):
                number = len(running.events) if running.streamed else 0
                first = told.get(key, 0)
                events = running.events[first:number]
                if running.format.is_final:
                    continue
                with contextlib.suppress(Unavailable):  # told again the next time
                    wish = await self._store.tend(key, _json(running.format.response), first, events)
                    told[key] = number
                    if wish is not None:
                        running.hang_up()
            await asyncio.sleep(TEND_S)

    # ------------------------------------------------------------ the other routes

    async def _read(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        key = _key(scope)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        stream = query.get("stream", ["false"])[-1].lower() in ("1", "true")
        after = _number(query.get("starting_after", ["-1"])[-1])
        running = await self._made_here(key)
        stored = None if running is not None else await self._found(key)
        streamed = running.streamed if running is not None else stored is not None and stored.streamed
        if stream and not streamed:
            raise BadRequest(
                "only responses created with background=true and stream=true can be streamed", param="stream"
            )
        if running is not None and stream:
            await running.follow(after, receive, send, headers)
        elif running is not None:
            await send_json(send, _json(running.format.response), headers)
        elif stored is not None and stream:
            await self._follow(key, after, receive, send, headers)
        elif stored is not None:
            await send_json(send, stored.body, headers)

    async def _found(self, key: ResponseKey) -> Stored:
        """A response of the store. What nobody makes any more, and has no end, has failed."""
        stored = await self._store.get(key)
        if stored is None:
            raise _unknown(key)
        return dataclasses.replace(stored, body=_lost(stored) or stored.body)

    async def _follow(self, key: ResponseKey, after: int, receive: Receive, send: Send, headers: Headers) -> None:
        """Send the stored events behind number `after`, and those that another router adds, until the last."""
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM + headers})
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            complete = False
            while not complete and not gone.done():
                try:
                    stored = await self._store.get(key)  # first: what it says is over has all its events
                    complete = stored is None or not stored.made_elsewhere
                    events = await self._store.events(key, after)
                    after += len(events)
                    if stored is None:
                        raise _unknown(key)
                    if failed := _lost(stored):
                        events.append(_event("response.failed", after + 1, {"response": msgspec.Raw(failed)}))
                except PenstockError as error:
                    complete, fields = True, {"code": error.code, "message": error.message, "param": error.param}
                    events = [_event("error", after + 1, fields)]
                if events or complete:
                    await send({"type": "http.response.body", "body": b"".join(events), "more_body": not complete})
                if not complete:
                    await asyncio.wait({gone}, timeout=LOOK_S)
        finally:
            gone.cancel()

    async def _cancel(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        key = _key(scope)
        running = self._running.get(key)
        if running is not None:
            await running.cancel()
            await send_json(send, _json(running.format.response), headers)
            return
        if await self._store.wish(key, "cancel") == "told":
            await self._wait_until_over(key)
        stored = await self._found(key)
        response = msgspec.json.decode(stored.body)
        if not response["background"]:
            raise BadRequest("only responses created with background=true can be cancelled")
        if response["status"] != "cancelled":
            raise BadRequest(f"the response {key[1]!r} is over, with status {response['status']!r}")
        await send_json(send, stored.body, headers)

    async def _wait_until_over(self, key: ResponseKey) -> None:
        """Until the router that makes a response has ended it; it is gone when its lease is."""
        deadline = time.monotonic() + self._lease_s + TEND_S
        while (await self._found(key)).made_elsewhere:
            if time.monotonic() > deadline:
                raise Unavailable("the router that makes the response does not end it")
            await asyncio.sleep(LOOK_S)

    async def _delete(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        key = _key(scope)
        known = await self._store.wish(key, "delete")
        running = self._running.get(key)
        if running is not None:
            await running.cancel()
            if known != "told":  # Redis had lost it, or its lease: it has been stored as it ended
                await self._store.wish(key, "delete")
        elif known == "unknown":
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


def _lost(stored: Stored) -> bytes | None:
    """A response that has no end, and nobody makes it any more: as it failed. None for all others."""
    if stored.made_elsewhere:
        return None
    response = msgspec.json.decode(stored.body)
    if response["status"] not in ("queued", "in_progress"):
        return None
    return _json(response | {"status": "failed", "error": {"code": "server_error", "message": GONE}})


def _event(name: str, number: int, fields: dict[str, Any]) -> bytes:
    body = _json({"type": name, "sequence_number": number, **fields})
    return b"event: %b\ndata: %b\n\n" % (name.encode(), body)


def _key(scope: Scope) -> ResponseKey:
    """Which response an address speaks of; another API key's is as unknown as one that never was."""
    key = scope.get("tenant", ""), scope["path_params"]["response_id"]
    if not _RESPONSE_ID.fullmatch(key[1]):
        raise _unknown(key)
    return key


def _unknown(key: ResponseKey) -> NotFound:
    return NotFound(f"there is no response {key[1]!r} here", param="response_id")


def _number(text: str) -> int:
    try:
        return max(int(text), -1)
    except ValueError as error:
        raise BadRequest(f"starting_after must be a number, got {text!r}", param="starting_after") from error
