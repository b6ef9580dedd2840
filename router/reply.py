"""One HTTP answer in the making: submits the choices and has the plan's format write what they say, whole or streamed.

Made by endpoints.py from a `Plan`. Sent as raw ASGI messages; a stream's tokens are written by event_stream.py. Beside
the answer runs a task that waits for the client to hang up.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec import structs

from penstock.common.errors import PenstockError
from penstock.common.messages import GenerateRequest
from penstock.common.timeline import Timeline
from penstock.router.answer_format import AnswerFormat, Delta, Said, Usage
from penstock.router.answer_parser import AnswerParsing
from penstock.router.choice import Choice, ScoredToken
from penstock.router.error_bodies import Send, send_json
from penstock.router.event_stream import EventStream

if TYPE_CHECKING:
    from penstock.router.front import Front

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

Conduct = Callable[["Reply", Receive, Send, list[tuple[bytes, bytes]]], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A validated request: what to submit (in order of the choices' indices) and how to answer."""

    requests: list[GenerateRequest]
    echoes: list[str]  # per choice: prompt text to show before the output
    format: AnswerFormat
    stream: bool
    parsing: AnswerParsing | None = None  # what to tell apart in the answers' text
    usage_in_chunks: bool = False
    timeline: bool = False  # the client asked for it
    tenant: str = ""  # whose share of the fleet it uses
    beams: bool = False  # the choices of a prompt are the results of a beam search
    length_penalty: float = 1.0
    conduct: Conduct | None = None  # runs the reply, and answers the client in its own way


class Reply(ABC):
    """What whole and streamed answers share. `run` either sends a complete answer, or raises before sending anything.

    Raises:
        PenstockError: (`run`) refused or failed before the first byte was sent.
    """

    def __init__(
        self,
        plan: Plan,
        front: Front,
        timeline: Timeline,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        self._plan, self._service, self._metrics = plan, front.service, front.metrics
        self._format, self._timeline, self._headers = plan.format, timeline, headers
        shown = frozenset[int]() if plan.parsing is None else plan.parsing.shown_ids
        tokenizer, service, metrics = front.tokenizer, front.service, front.metrics
        self._choices = [
            Choice(request, index, plan.echoes[index], tokenizer, service, metrics, timeline, self, shown)
            for index, request in enumerate(plan.requests)
        ]
        self._parsers = None if plan.parsing is None else [plan.parsing.start() for _ in plan.requests]
        self._running = len(self._choices)
        self._error: PenstockError | None = None
        self.started = False  # the first bytes are on their way: no other status is possible
        self.over: Callable[[Reply, PenstockError | None], None] | None = (
            None  # called when nothing of it runs any more
        )
        self._gone = False
        self._news = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def failed(self) -> bool:
        """A choice failed after it was submitted (and was counted)."""
        return self._error is not None

    @property
    def choices(self) -> Sequence[Choice]:
        return self._choices

    @property
    def error(self) -> PenstockError | None:
        """What a choice failed with."""
        return self._error

    @property
    def gone(self) -> bool:
        """The client hung up before it had everything."""
        return self._gone and self._running > 0

    async def run(self, receive: Receive, send: Send) -> None:
        """Submit, answer, and leave nothing running behind, whatever happens."""
        watcher = asyncio.get_running_loop().create_task(self._watch(receive))
        failure: PenstockError | None = None
        try:
            await self._submit()
            await self._answer(send)
            if not self.gone and self._error is None:
                self._metrics.answered(self._longest())
        except PenstockError as error:
            failure = error
            raise
        finally:
            watcher.cancel()
            self._cancel_running()
            if self.over is not None:
                self.over(self, failure)
            for choice in self._choices:
                choice.let_go()

    def on_text(self, choice: Choice, text: str, tokens: Sequence[ScoredToken]) -> None:
        """See `Listener`."""
        finish_reason = choice.text.finish_reason
        if self._parsers is None:
            delta = Delta(text, "", (), tokens, finish_reason)
        else:
            delta = structs.replace(self._parsers[choice.index].delta(text, finish_reason), tokens=tokens)
            if delta.reasoning:
                choice.reasoning_tokens = choice.text.num_tokens
        self.on_delta(choice, delta)

    @abstractmethod
    def on_delta(self, choice: Choice, delta: Delta) -> None:
        """What a choice said; may be nothing."""

    def on_failure(self, error: PenstockError) -> None:
        """One choice failed: the whole answer does."""
        if self._error is None:
            self._error = error
            self._metrics.failed(error.code)
            self._cancel_running()
        self._wake()

    @abstractmethod
    async def _answer(self, send: Send) -> None: ...

    async def _submit(self) -> None:
        choices = self._choices
        if len(choices) == 1:
            await self._submit_one(choices[0])
        else:
            outcomes = await asyncio.gather(*(self._submit_one(choice) for choice in choices), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
        self._timeline.mark("routed", time.monotonic())
        if self._gone or self._error is not None:  # a cancel that came before its submit was done may have been missed
            for choice in choices:
                choice.cancel()

    async def _submit_one(self, choice: Choice) -> None:
        try:
            await self._service.submit(choice.request, choice, self._plan.tenant)
        except PenstockError:
            choice.ended = True  # it never ran: nothing to cancel
            raise

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._cancel_running()
        self._wake()

    def _cancel_running(self) -> None:
        for choice in self._choices:
            if not choice.ended:
                choice.cancel()
                self._metrics.cancelled(len(choice.request.prompt_token_ids), choice.text.num_tokens)

    def _longest(self) -> Iterable[int]:
        """Of each prompt, the output tokens of its longest choice."""
        longest: dict[str, int] = {}
        for choice in self._choices:
            request_id = choice.request.request_id
            longest[request_id] = max(longest.get(request_id, 0), choice.text.num_tokens)
        return longest.values()

    def _wake(self) -> None:
        self._news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait_for_news(self) -> None:
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        self._news = False

    def _finished(self) -> tuple[Usage, list[dict[str, Any]] | None]:
        """What is told last: the usage, and the timeline if it was asked for."""
        if not self._plan.timeline:
            return self._usage(), None
        self._timeline.mark("finished", time.monotonic())
        spans = max((choice.spans for choice in self._choices), key=len)
        return self._usage(), self._timeline.entries(spans)

    def _usage(self) -> Usage:
        prompts = {choice.request.request_id: len(choice.request.prompt_token_ids) for choice in self._choices}
        cached = dict.fromkeys(prompts, 0)
        for choice in self._choices:
            request_id = choice.request.request_id
            cached[request_id] = max(cached[request_id], choice.cached_tokens)
        output_tokens = sum(choice.text.num_tokens for choice in self._choices)
        reasoning_tokens = sum(choice.reasoning_tokens for choice in self._choices)
        return Usage(sum(prompts.values()), output_tokens, sum(cached.values()), reasoning_tokens)


class WholeReply(Reply):
    """The answer in one piece."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._said = [Said() for _ in self._choices]

    def on_delta(self, choice: Choice, delta: Delta) -> None:
        """Keep it; the last choice to end wakes the answer."""
        self._said[choice.index].add(delta)
        if choice.ended:
            self._running -= 1
            if self._running == 0:
                self._wake()

    async def _answer(self, send: Send) -> None:
        while self._running and self._error is None and not self._gone:
            await self._wait_for_news()
        if self._gone:
            return
        if self._error is not None:
            raise self._error
        body = self._format.whole(self._choices, self._said, *self._finished())
        self.started = True
        await send_json(send, body, self._headers)


class StreamReply(Reply):
    """The answer as server-sent events.

    The status goes out with the first event, so that a request that fails before its first token has its own status.
    """

    def __init__(self, plan: Plan, front: Front, timeline: Timeline, headers: list[tuple[bytes, bytes]]) -> None:
        super().__init__(plan, front, timeline, headers)
        self._events = EventStream(front.outbox)
        self._opened = [False for _ in self._choices]
        self._plain = self._parsers is None and not plan.usage_in_chunks

    def on_text(self, choice: Choice, text: str, tokens: Sequence[ScoredToken]) -> None:
        """See `Listener`. Most calls bring the text of one token, and cost no more than its event."""
        if tokens or choice.ended or not self._plain or not self._opened[choice.index]:
            super().on_text(choice, text, tokens)
        elif text and not self._events.ended:
            self._events.put(self._format.text(choice, text))

    def on_delta(self, choice: Choice, delta: Delta) -> None:
        """Write an event, unless there is nothing to tell yet."""
        events = self._events
        if events.ended:
            return
        if not self._opened[choice.index]:
            self._open(choice)
        if delta.content or delta.reasoning or delta.calls or delta.tokens or choice.ended:
            usage = None
            if self._plan.usage_in_chunks:
                usage = Usage(len(choice.request.prompt_token_ids), choice.text.num_tokens)
            events.put(self._format.delta(choice, delta, usage))
        if choice.ended:
            self._running -= 1
            if self._running == 0:
                events.put(self._format.closing(*self._finished()), last=True)
        if not self.started:
            self._wake()

    def _open(self, choice: Choice) -> None:
        for opened in self._choices if self._format.opens_together else (choice,):
            if not self._opened[opened.index]:
                self._opened[opened.index] = True
                self._events.put(self._format.opening(opened))

    def on_failure(self, error: PenstockError) -> None:
        """After the first event, an error is an event, too."""
        super().on_failure(error)
        if self.started and not self._events.ended:
            self._events.put(self._format.failure(error), last=True)

    def _wake(self) -> None:
        super()._wake()
        if self._gone:
            self._events.give_up()

    async def _answer(self, send: Send) -> None:
        while not self._events.has_events and self._error is None and not self._gone:
            await self._wait_for_news()
        if self.gone:
            return
        if self._error is not None:
            raise self._error
        self.started = True
        content = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": content + self._headers})
        await self._events.run(send)
