"""A router app over a fake service, on a real uvicorn: the fake answers as a scripted worker would."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai

from penstock.common.chat_template import ChatTemplate
from penstock.common.config import RouterConfig
from penstock.common.errors import PenstockError, Unavailable
from penstock.common.generation_defaults import GenerationDefaults
from penstock.common.histogram import Histogram
from penstock.common.messages import Finish, GenerateRequest, Spans, TokenDelta, TokenLogprobs, WorkerInfo, WorkerLoad
from penstock.common.tokenizer import Tokenizer
from penstock.router.app import create_app
from penstock.router.first_worker import FirstWorker
from penstock.router.health import WorkerState
from penstock.router.off_loop import OffLoop
from penstock.router.server import RouterServer
from tests.tiny_tokenizers import TEMPLATE, byte_level
from tests.worker_info import worker_info

ANSWER = "Hello 😀 wörld, the water falls."
VOCAB = 404
CONTEXT = 512
NO_REDIS = "redis://127.0.0.1:1/0"
SPANS = Spans(
    queue_ms=1.5, prefill_ms=20.0, transfer_ms=3.0, exposed_transfer_ms=1.0, decode_ms=30.0, transfer_bytes=4096,
    transfer_pages=2, transport="shm", cached_tokens=3, computed_tokens=4,
)  # fmt: skip
Script = Callable[[GenerateRequest], list[TokenDelta | PenstockError]]


def ids_of(text: str) -> list[int]:
    return byte_level().encode(text, add_special_tokens=False)


def scores(request: GenerateRequest, token_id: int) -> TokenLogprobs:
    """The chosen token is second best; the last of the top ones is impossible."""
    wanted = request.sampling.logprobs or 0
    top = [(5, -0.25), (token_id, -0.5), (7, -3.0), (8, float("-inf"))][:wanted]
    return TokenLogprobs(-0.5, 2, [i for i, _ in top], [p for _, p in top])


def delta(request: GenerateRequest, index: int, ids: list[int], finish: Finish | None = None) -> TokenDelta:
    logprobs = None if request.sampling.logprobs is None else [scores(request, i) for i in ids]
    spans = SPANS if finish is not None else None
    scored = None
    if index == 0 and request.wants_prompt_logprobs:
        wanted = request.sampling.prompt_logprobs
        tops = [(9, -0.5), (8, float("-inf"))][:wanted]
        scored = [
            TokenLogprobs(-float(i), 3, [t for t, _ in tops], [p for _, p in tops])
            for i in range(1, len(request.prompt_token_ids))
        ]
    return TokenDelta(request.request_id, 0, request.choice, index, ids, finish, logprobs, spans, scored)


def say(text: str, finish: str = "stop", stop_reason: int | None = None) -> Script:
    """One token a message, then end of sequence; cut to max_tokens, as an engine does."""

    def script(request: GenerateRequest) -> list[TokenDelta | PenstockError]:
        ids = [*ids_of(text), request.eos_token_ids[0]] if finish == "stop" else ids_of(text)
        limit = request.sampling.max_tokens or 10**9
        end = Finish(reason=finish, stop_reason=stop_reason)
        if len(ids) > limit:
            ids, end = ids[:limit], Finish(reason="length")
        return [delta(request, i, [t], end if i == len(ids) - 1 else None) for i, t in enumerate(ids)]

    return script


class FakeService:
    """Plays scripts, `step` deltas at a time; `pause_after` deltas it goes quiet, as a slow worker."""

    def __init__(self) -> None:
        self.script: Script = say(ANSWER)
        self.step = 1
        self.pause_after: int | None = None
        self.refusal: PenstockError | None = None
        self.is_ready = True
        self.known = True
        self.first_worker = FirstWorker(0.0)  # nobody waits long
        self.requests: list[GenerateRequest] = []
        self.tenants: list[str] = []
        self.cancelled: list[tuple[str, int]] = []
        self.cancel_heard = threading.Event()
        self.started = self.stopped = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.quiet: list[Any] = []  # sinks that get nothing more

    async def start(self) -> None:
        self.off_loop = OffLoop()
        self.started += 1

    async def stop(self, drain_s: float) -> None:
        self.stopped += 1
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=drain_s)
        for sink in self.quiet:
            sink.on_error(Unavailable("this router is shutting down"))
        self.off_loop.close()

    async def submit(self, request: GenerateRequest, sink: Any, tenant: str = "") -> None:
        self.requests.append(request)
        self.tenants.append(tenant)
        if self.refusal is not None:
            raise self.refusal
        await asyncio.sleep(0)
        task = asyncio.get_running_loop().create_task(self._play(request, sink))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _play(self, request: GenerateRequest, sink: Any) -> None:
        for position, item in enumerate(self.script(request)):
            if position == self.pause_after:
                self.quiet.append(sink)
                return
            if (request.request_id, request.choice) in self.cancelled:
                return
            if isinstance(item, PenstockError):
                sink.on_error(item)
                return
            sink.on_delta(item)
            if (position + 1) % self.step == 0:
                await asyncio.sleep(0)

    def cancel(self, request_id: str, choice: int) -> None:
        self.cancelled.append((request_id, choice))
        self.cancel_heard.set()

    def model_info(self) -> Any:
        if not self.known:
            return None
        return SimpleNamespace(max_model_len=CONTEXT, vocab_size=VOCAB, eos_token_ids=[2])

    def why_not_ready(self) -> str:
        return "no decode worker takes requests" if self.known else "no worker is known yet"

    def ready(self) -> bool:
        return self.is_ready

    def loads(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        info = worker_info(
            served_models=["tiny"], incarnation="a", page_size=16, max_model_len=CONTEXT, vocab_size=VOCAB
        )
        load = WorkerLoad(running=3, waiting=2, num_pages=100, free_pages=75, transfer_bytes=4096, lent_pages=5)
        return [(info, load)]

    def histograms(self) -> dict[str, Histogram]:
        return {}

    def states(self) -> dict[str, WorkerState]:
        return {"a": WorkerState("stalled", "no step for 30 s")}

    def broken_pairs(self) -> list[tuple[str, str, float]]:
        return [("prefill-0", "decode-0", 1.25)]

    def counters(self) -> dict[str, int]:
        return {"retries": 4, "worker_losses": 1, "in_flight": len(self._tasks)}


class Router:
    """A running app and clients for it."""

    def __init__(self, service: FakeService, url: str, server: RouterServer) -> None:
        self.service, self.url, self.server = service, url, server
        self.http = httpx.Client(base_url=url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=60)

    @property
    def last(self) -> GenerateRequest:
        return self.service.requests[-1]

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)

    def reset(self) -> None:
        self.service.__init__()  # type: ignore[misc]


@contextlib.contextmanager
def running(
    *,
    defaults: GenerationDefaults | None = None,
    template: str = TEMPLATE,
    tokenizer: Tokenizer | None = None,
    send_buffer: int = 0,
    **config: Any,
) -> Iterator[Router]:
    """`send_buffer`: what the kernel holds of an answer, in bytes; 0: as it likes."""
    service = FakeService()
    tokenizer = tokenizer or byte_level()
    config = {"served_model_name": ("tiny", "alias"), "redis_url": NO_REDIS, **config}
    router_config = RouterConfig(model="/models/tiny", **config)
    chat = ChatTemplate(template, tokenizer.special_tokens) if template else None
    app = create_app(service, router_config, tokenizer, chat, defaults)  # type: ignore[arg-type]
    with socket.socket() as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(("127.0.0.1", 0))
        server = RouterServer(app, service, router_config)  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 60
            while not server.started:
                assert time.monotonic() < deadline and thread.is_alive()
                time.sleep(0.005)
            router = Router(service, f"http://127.0.0.1:{listener.getsockname()[1]}", server)
            with router.http, router.openai:
                yield router
        finally:
            server.should_exit = True
            thread.join()
    assert (service.started, service.stopped) in ((1, 1), (0, 1))  # 0: reset by a test
