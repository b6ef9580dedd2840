"""A worker without a model: real bus, real registration, tokens that a test can foretell."""

from __future__ import annotations

import threading
import time
from collections import deque

import zmq

from penstock.common.bus import BusServer, PeerReplaced, Peers
from penstock.common.messages import (
    Abort,
    Finish,
    GenerateRequest,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    MeasuredRates,
    Spans,
    Submit,
    TokenBatch,
    TokenDelta,
    WorkerLoad,
)
from penstock.common.redis_state import RegistryWriter
from penstock.common.text_probe import TextProbe
from tests.worker_info import worker_info


def oracle(request: GenerateRequest) -> list[int]:
    """The answer to a request: depends on prompt, seed and choice, as a real one does."""
    base = sum(request.prompt_token_ids) + 31 * (request.sampling.seed or 0) + 7 * request.choice
    return [(base + i) % 1000 for i in range(request.sampling.max_tokens or 0)]


class FakeWorker:
    """One token a request a step. `limit` stops every request at that index; `announced` replaces its address."""

    def __init__(
        self,
        redis_url: str,
        worker_id: str,
        role: str = "decode",
        *,
        lease_s: float = 30.0,
        announced: str = "",
        fingerprint: str = "f",
        max_model_len: int = 4096,
        hash_probe: str = "",
        texts: TextProbe = TextProbe(),  # noqa: B008 - frozen
        max_num_seqs: int = 64,
        rates: MeasuredRates = MeasuredRates(),  # noqa: B008 - frozen
    ) -> None:
        self.limit = 1 << 30
        self.step_s = 0.001
        self.steps = 0
        self.answers_heartbeats = True
        self._handed_off = False
        self.fails = ""  # every request, with an error of this code that another worker may not have
        self.local_prefill = False  # whether hand-offs to it fail
        self.rates = rates
        self.cached_tokens = 0  # what it says to have found of every prompt
        self.queued_tokens = 0  # what it says waits for it
        self.submitted: list[GenerateRequest] = []
        self.sources: list[str] = []  # incarnations of workers that it was to fetch prefixes from
        self.aborted: list[tuple[str, int]] = []  # (request id, choice)
        self.prefill_worker: FakeWorker | None = None
        self.first_tokens: deque[tuple[str, GenerateRequest]] = deque()  # (router, request) for a prefill worker
        self.running: dict[tuple[bytes, str, int, int], GenerateRequest] = {}
        self._next_index: dict[tuple[bytes, str, int, int], int] = {}
        self._server = BusServer("127.0.0.1", 0, "")
        self.port = int(self._server.address.rpartition(":")[2])
        self.info = worker_info(
            worker_id,
            f"{worker_id}-{self.port}",
            role,
            address=announced or self._server.address,
            fingerprint=fingerprint,
            num_pages=1000,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            vocab_size=1000,
            eos_token_ids=[2],
            hash_scope="scope",
            hash_probe=hash_probe,
            tokenizer_probe=texts.tokenizer,
            template_probe=texts.template,
            lease_s=lease_s,
        )
        self.peers = Peers(self.info, lease_s)
        self.registry = RegistryWriter(redis_url, "penstock", self.info)
        self._stop = threading.Event()
        self._killed = False
        self._thread = threading.Thread(target=self._run, name=worker_id)
        self._thread.start()

    def kill(self) -> None:
        """As kill -9 would: the socket goes, the lease stays."""
        self._killed = True
        self._stop.set()
        self._thread.join()
        self.registry.close(deregister=False)

    def close(self) -> None:
        """Leave in order; after `kill` it does nothing."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self.registry.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._server.socket.poll(1 if self.running or self.role_is_prefill else 20, zmq.POLLIN)
            now = time.monotonic()
            self._receive(now)
            for event in self.peers.expire(now):
                self._forget(event.identity)
            self._step()
            time.sleep(self.step_s)
        if not self._killed:
            for identity in self.peers:
                self._server.send(identity, Goodbye())
        self._server.close()

    @property
    def role_is_prefill(self) -> bool:
        return self.info.role == "prefill"

    def _receive(self, now: float) -> None:
        for identity, message in self._server.receive():
            if isinstance(message, Hello):
                answer, events = self.peers.hello(identity, message, now)
                self._server.send(identity, answer)
                for event in events:
                    if isinstance(event, PeerReplaced):
                        self._forget(event.identity)
            elif isinstance(message, Heartbeat) and not self.answers_heartbeats:
                self.peers.heartbeat(identity, now)
            elif isinstance(message, Heartbeat) and self.peers.heartbeat(identity, now):
                load = WorkerLoad(
                    running=len(self.running),
                    queued_tokens=self.queued_tokens,
                    num_pages=1000,
                    free_pages=1000,
                    steps=self.steps,
                    rates=self.rates,
                )
                self._server.send(identity, HeartbeatAck(seq=message.seq, load=load))
            elif identity not in self.peers:
                self._server.send(identity, self.peers.unknown())
            elif isinstance(message, Goodbye):
                self.peers.left(identity)
                self._forget(identity)
            elif isinstance(message, Submit):
                self._admit(identity, message)
            elif isinstance(message, Abort):
                self.aborted.append((message.request_id, message.choice))
                self.running.pop((identity, message.request_id, message.choice, message.attempt), None)

    def _admit(self, identity: bytes, submit: Submit) -> None:
        request = submit.request
        self.submitted.append(request)
        if submit.source is not None:
            self.sources.append(submit.source.incarnation)
        if self.fails:
            finish = Finish(reason="error", code=self.fails, message="it fails", retryable=True)
            end = TokenDelta(
                request.request_id, request.attempt, request.choice, len(request.output_token_ids), [], finish
            )
            self._server.send(identity, TokenBatch(deltas=[end]))
            return
        self._handed_off = submit.prefill is not None
        key = (identity, request.request_id, request.choice, request.attempt)
        self.running[key] = request
        self._next_index[key] = len(request.output_token_ids)
        if submit.prefill is not None and self.prefill_worker is not None:
            self.prefill_worker.first_tokens.append((identity.decode().rpartition("/")[0], request))
            self._next_index[key] += 1

    def _forget(self, identity: bytes) -> None:
        for key in [key for key in self.running if key[0] == identity]:
            del self.running[key]

    def _step(self) -> None:
        batches: dict[bytes, list[TokenDelta]] = {}
        while self.first_tokens:
            router_id, request = self.first_tokens.popleft()
            identity = self.peers.identity_of(router_id)
            if identity is not None:
                batches.setdefault(identity, []).append(self._delta(request, len(request.output_token_ids)))
        for key, request in list(self.running.items()):
            index = self._next_index[key]
            if index < min(self.limit, request.sampling.max_tokens or 0):
                batches.setdefault(key[0], []).append(self._delta(request, index))
                self._next_index[key] += 1
                self.steps += 1
            if index + 1 >= (request.sampling.max_tokens or 0):
                del self.running[key]
        for identity, deltas in batches.items():
            self._server.send(identity, TokenBatch(deltas=deltas))

    def _spans(self) -> Spans:
        failed, pages = self._handed_off and self.local_prefill, int(self._handed_off and not self.local_prefill)
        return Spans(
            worker=self.info.worker_id,
            decode_ms=1.0,
            cached_tokens=self.cached_tokens,
            local_prefill=failed,
            transfer_pages=pages,
        )

    def _delta(self, request: GenerateRequest, index: int) -> TokenDelta:
        tokens = oracle(request)
        last = index == len(tokens) - 1
        finish, spans = (Finish(reason="length"), self._spans()) if last else (None, None)
        return TokenDelta(
            request.request_id, request.attempt, request.choice, index, [tokens[index]], finish, None, spans
        )
