"""`AsyncLLM`: generation for programs with an event loop, each request by itself, tokens as they come. vLLM's names.

    engine = AsyncLLM("MODEL")
    async for output in engine.generate("The river", SamplingParams(max_tokens=20), "request-1"):
        print(output.outputs[0].text)        # all of it so far
    engine.shutdown()

The engine steps in a thread of its own; with `prefill_workers` or `decode_workers` it is a fleet of processes instead.
Both hand tokens over as they come, and answers are made of them as in `LLM`.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from threading import Lock
from typing import Any

from penstock.answers import Choice, New
from penstock.common.sampling import SamplingParams
from penstock.common.tokenizer import Tokenizer
from penstock.engine_args import EngineArgs
from penstock.engine_thread import EngineThread
from penstock.fleet_llm import FleetLLM
from penstock.fleet_thread import FleetThread
from penstock.llm import LLM
from penstock.prompts import Prompt, refuse
from penstock.results import RequestOutput


class AsyncLLM:
    """A model for any number of requests at a time. Use from one event loop or several.

    Args:
        model: Hugging Face directory or hub id.
        options: as for `LLM`.

    Raises:
        ValueError, ModelError, ConfigError: as `LLM`.
    """

    def __init__(self, model: str | PathLike[str], **options: Any) -> None:
        self._llm = LLM(model, **options)
        self._backend: EngineThread | FleetThread = (
            self._llm.thread if isinstance(self._llm, FleetLLM) else EngineThread(self._llm.engine)
        )
        self._streams: dict[str, _Stream] = {}  # by request id
        self._numbers = itertools.count()
        self._ending = weakref.finalize(self, self._backend.close)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> AsyncLLM:
        """As the constructor, with arguments that were put together before."""
        return cls(engine_args.model, **engine_args.options)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt; each item has all that there is of its outputs so far, the last one is `finished`.

        A consumer that is slower than the engine gets fewer items, and misses nothing. One that leaves early, or is
        cancelled, ends the request.

        Raises:
            ValueError: as `LLM.generate`, or a request with this id is running, or `shutdown` was called.
            PenstockError, RuntimeError: what computes it failed.
        """
        refuse(lora_request=lora_request)
        if not self._ending.alive:
            raise ValueError("it is shut down")
        if self._backend.error is not None:
            raise RuntimeError(f"the engine failed: {self._backend.error}")
        self._llm.check_open()
        name = request_id or f"async-{next(self._numbers)}"
        if name in self._streams:
            raise ValueError(f"a request {name!r} is running")
        stream = self._streams[name] = _Stream(self, asyncio.get_running_loop())
        try:
            params = sampling_params or self._llm.get_default_sampling_params()
            stream.begin(
                await asyncio.to_thread(self._llm.intake.choices, prompt, params, priority, name, tokenization_kwargs)
            )
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return
        finally:
            del self._streams[name]
            stream.abort()

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their `generate` gives a last item whose unfinished outputs have the reason "abort"."""
        for name in [request_id] if isinstance(request_id, str) else request_id:
            if name in self._streams:
                self._streams[name].abort()

    def shutdown(self) -> None:
        """Stop; what is running ends in an error. Blocks for a step, or until a fleet's processes are gone."""
        try:
            self._ending()
        finally:
            for stream in list(self._streams.values()):
                stream.fail(RuntimeError("it was shut down"))
        if not isinstance(self._llm, FleetLLM):
            self._llm.close()

    @property
    def is_running(self) -> bool:
        """Neither shut down nor failed."""
        return self._ending.alive and not self.errored

    @property
    def errored(self) -> bool:
        """Whether the engine has failed; nothing more can be generated then."""
        return self._backend.error is not None

    async def check_health(self) -> None:
        """Raise what the engine failed with, if it has."""
        if self._backend.error is not None:
            raise self._backend.error

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises ValueError without one."""
        return self._llm.get_tokenizer()

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self._llm.max_model_len


AsyncLLMEngine = AsyncLLM


class _Stream:
    """One request on its way: tokens come on the backend's thread, and its event loop gets the newest state of it."""

    def __init__(self, engine: AsyncLLM, loop: asyncio.AbstractEventLoop) -> None:
        self._answers, self._backend = engine._llm.answers, engine._backend
        self._loop = loop
        self._changed = asyncio.Event()
        self._lock = Lock()  # of all below: two threads
        self._choices: list[Choice] = []
        self._newest: RequestOutput | Exception | None = None
        self._ended = self._unwanted = False

    def begin(self, choices: list[Choice]) -> None:
        """Have them computed."""
        with self._lock:
            self._choices = choices
            unwanted = self._unwanted
        if unwanted:
            self.abort()
            return
        for choice in choices:
            self._backend.submit(choice.source, partial(self.take, choice))
        with self._lock:
            if self._ended:  # meanwhile: one has failed, and the others may have come after their end
                for choice in choices:
                    self._backend.abort(choice.source)

    async def next(self) -> RequestOutput:
        """The state after what came last, once there is any that was not seen; raises what ended it."""
        await self._changed.wait()
        with self._lock:
            self._changed.clear()
            newest = self._newest
        if isinstance(newest, Exception):
            raise newest
        assert newest is not None
        return newest

    def take(self, choice: Choice, new: New | Exception) -> None:
        """What the backend has for one of the choices."""
        if isinstance(new, Exception):
            self.fail(new)
            return
        with self._lock:
            if self._ended or choice.output.finish_reason is not None:
                return  # tokens that were under way when it ended
            if self._answers.take(choice, new) and new.finish is None:
                self._backend.abort(choice.source)
            self._ended = choice.request.finished
            self._publish(_snapshot(choice.request))

    def fail(self, error: Exception) -> None:
        """Nothing more comes of it."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._publish(error)  # first: who waits for it must hear of it, whatever becomes of the rest
                self._stop_unfinished()

    def abort(self) -> None:
        """Nobody wants more of it."""
        with self._lock:
            self._unwanted = True
            if self._ended or not self._choices:
                return
            self._ended = True
            self._stop_unfinished()
            for choice in self._choices:
                choice.output.finish_reason = choice.output.finish_reason or "abort"
            request = self._choices[0].request
            request.finished = True
            self._publish(_snapshot(request))

    def _stop_unfinished(self) -> None:
        for choice in self._choices:
            if choice.output.finish_reason is None:
                self._backend.abort(choice.source)

    def _publish(self, newest: RequestOutput | Exception) -> None:
        self._newest = newest
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)


def _snapshot(request: RequestOutput) -> RequestOutput:
    """A copy that later tokens do not change."""
    outputs = [
        replace(
            output, token_ids=list(output.token_ids), logprobs=None if output.logprobs is None else [*output.logprobs]
        )
        for output in request.outputs
    ]
    return replace(request, outputs=outputs)
