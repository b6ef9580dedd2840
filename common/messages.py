"""Every message on the bus, in one file. MessagePack maps, tagged by `type`; docs/wire.md tells who sends what when.

A connection begins with the handshake: `Hello` from the side that connects, answered by `Welcome` or `Refused`. Its
outer fields never change, so that any two versions can at least refuse each other; `Welcome.worker` is decoded only
after protocol and fingerprint have been compared.

Protocol versions:
1  first version
2  sampling has logit_bias, allowed_token_ids and bad_words_token_ids, which a worker must not overlook
3  sampling has prompt_logprobs, and the first TokenDelta their answer; requests have a priority
4  prefixes are fetched: Submit and Prefill name a source, workers of any role ask each other with Fetch
5  workers are drained: Drain, and Move, answered with the finish "moved"
6  sampling has structured_outputs, which a worker must not overlook
7  whoever leaves on purpose says Goodbye
8  a ticket names no heartbeat: every answer of the lender proves the lease of the whole session
"""

from __future__ import annotations

import msgspec

from penstock.common.sampling import SamplingParams

PROTOCOL_VERSION = 8


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """Base of everything that travels."""


# ---------------------------------------------------------------- handshake, all links (router and workers -> worker)


class Hello(Message, tag="hello", frozen=True, kw_only=True):
    """First message on a connection, and again whenever the connection was cut."""

    protocol: int
    peer_id: str  # stable over reconnects: the router's or worker's incarnation
    session: int  # grows with each connection of this peer; a newer session ends the older one's requests
    role: str  # "router" | "prefill" | "decode" | "operator"
    fingerprint: str  # "" from a router: it serves whatever the worker serves


class Welcome(Message, tag="welcome", frozen=True, kw_only=True):
    """The worker accepts; `worker` is a MessagePack-encoded `WorkerInfo`."""

    protocol: int
    fingerprint: str
    worker: bytes


class Refused(Message, tag="refused", frozen=True, kw_only=True):
    """The worker does not accept this peer: `code` is "protocol", "fingerprint", "draining" or "unknown" (no Hello)."""

    protocol: int
    code: str
    message: str


class Goodbye(Message, tag="goodbye", frozen=True, kw_only=True):
    """Either side, the last on a connection: I leave on purpose. Ends what a cut would end; nobody need be alarmed."""


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker is. Kept in Redis under its lease, and repeated in `Welcome`."""

    worker_id: str  # a name that outlives restarts: "decode-0"
    incarnation: str  # new at every start
    role: str  # "prefill" | "decode"
    address: str  # tcp://host:port of its bus socket
    fingerprint: str
    model: str  # path or hub id, as given
    served_models: list[str]
    page_size: int  # tokens
    num_pages: int
    page_bytes: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    step_tokens: int = 2048  # of prompts, in one step at most
    mixed_chunk_tokens: int = 0  # of prompts, in a step that also decodes few; 0: as many as in any other
    eos_token_ids: list[int] = []
    hash_scope: str = ""  # root of the page-hash chain: model, dtype, page size
    hash_probe: str = ""  # what the worker's hashing makes of known prompts (common/hash_probe.py)
    tokenizer_probe: str = ""  # and of known texts (common/text_probe.py); "": the worker has no tokenizer
    template_probe: str = ""  # digest of its model's chat template
    transports: dict[str, bytes] = {}  # name -> how a peer reads this worker's pages
    lease_s: float = 10.0
    pid: int = 0
    version: str = ""
    status_url: str = ""  # http://host:port of its /health, /metrics and /debug/ledger


class Heartbeat(Message, tag="heartbeat", frozen=True, kw_only=True):
    """From the connecting side: renews everything this peer holds at the worker (requests, lent pages)."""

    seq: int


class HeartbeatAck(Message, tag="heartbeat_ack", frozen=True, kw_only=True):
    """Answered between two steps, so a late one also tells how long the worker's steps are."""

    seq: int
    load: WorkerLoad


class MeasuredRates(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How fast a worker has been lately (common/rate_estimator.py). 0: not enough of it has happened.

    A step takes decode_step_ms, and decode_sequence_ms and decode_context_ms for each sequence and token of context in
    it; one that computes prompts takes prefill_step_ms instead of decode_step_ms, and the time of their tokens.
    """

    prefill_tokens_per_s: float = 0.0
    prefill_step_ms: float = 0.0
    decode_step_ms: float = 0.0
    decode_sequence_ms: float = 0.0
    decode_context_ms: float = 0.0
    link_bytes_per_s: float = 0.0  # reading pages from other workers
    link_setup_ms: float = 0.0


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot of one worker: gauges for routing, counters (since its start) for metrics and people."""

    running: int = 0
    waiting: int = 0
    deferred: int = 0  # of those that wait: for pages from a prefill worker
    held_up: int = 0  # of those that wait: for room
    queued_tokens: int = 0  # prompt tokens that are still to be computed
    num_pages: int = 0
    free_pages: int = 0  # neither held by nor promised to anybody (cached prefixes included)
    promised_pages: int = 0
    lent_pages: int = 0  # offered to decode workers
    quarantined_pages: int = 0  # may still be written by an unsettled transfer
    forgotten_pages: int = 0  # held for nobody that the worker knows: a leak
    draining: bool = False
    registered: bool = False  # Redis has its lease and its pages
    index_pages: int = 0  # that the worker announces to the prefix index
    index_pending: int = 0  # changes of them that the index has not got yet
    index_losses: int = 0  # times that the index held nothing of this worker any more, and got everything again
    index_repaired: int = 0  # pages that the index had lost, and got again in their turn
    steps: int = 0  # grows while the worker makes progress
    prompt_tokens: int = 0  # computed
    cached_tokens: int = 0  # of prompts computed here, found in the prefix cache
    asked_tokens: int = 0  # prompt tokens asked of other workers: hand-offs and fetches
    received_tokens: int = 0  # of those, whose pages came
    generation_tokens: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there
    preemptions: int = 0
    handoffs: int = 0
    handoff_failures: int = 0  # hand-offs given up; the rest of the prompt was computed locally
    transfer_bytes: int = 0
    transfer_pages: int = 0
    checksum_failures: int = 0
    fetches: int = 0  # prefixes asked of other workers rather than computed
    fetch_failures: int = 0  # of those, given up; the rest of the prefix was computed here
    fetched_tokens: int = 0  # tokens whose pages were read from other workers
    moved: int = 0  # requests given up to other workers, with their pages
    rates: MeasuredRates = MeasuredRates()
    transports: dict[str, str] = {}  # worker id -> what its pages are read with
    expired_loans: int = 0  # prompts whose lent pages were taken back from a reader that was gone
    histograms: dict[str, list[float]] = {}  # name -> counts and sum (common/histogram.py)


# ---------------------------------------------------------------- requests: router -> worker, decode -> prefill


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One choice of one API request, as tokens.

    `output_token_ids` are tokens the client already has (after a worker was lost): the engine computes them like
    prompt, but seeds, penalties, min_tokens and max_tokens count on from them.
    """

    request_id: str
    attempt: int = 0
    choice: int = 0
    prompt_token_ids: list[int]
    output_token_ids: list[int] = []
    sampling: SamplingParams  # `seed` and `max_tokens` are set by the router; `n` is 1
    eos_token_ids: list[int] = []
    cache_salt: str = ""
    queue_timeout_s: float = 60.0  # how long it may wait for room before it is refused
    priority: int = 0  # lower ones are served first; equal ones as they came
    traceparent: str = ""  # W3C trace context, for logs

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt has to be scored: the client has no token yet, and so no scores."""
        return self.sampling.prompt_logprobs is not None and not self.output_token_ids


def request_key(request_id: str, choice: int, attempt: int) -> str:
    """A worker's name for one attempt at one choice; also its page holder."""
    return f"{request_id}:{choice}:{attempt}"


class Submit(Message, tag="submit", frozen=True, kw_only=True):
    """Router -> decode worker: run this request; `prefill` names the prefill worker to use, or None to prefill here.

    Whoever computes the prompt first fetches what `source` holds of it.
    """

    request: GenerateRequest
    prefill: WorkerInfo | None = None
    source: WorkerInfo | None = None


class Abort(Message, tag="abort", frozen=True, kw_only=True):
    """Router -> decode worker, decode -> prefill: stop and free everything of this attempt. Not answered."""

    request_id: str
    attempt: int
    choice: int = 0


class Move(Message, tag="move", frozen=True, kw_only=True):
    """Router -> draining decode worker: stop this attempt as soon as its pages can be fetched, and keep them for that.

    Answered, behind the tokens, with the finish "moved"; the next attempt, elsewhere, has this worker as its source.
    """

    request_id: str
    attempt: int
    choice: int = 0


class Drain(Message, tag="drain", frozen=True, kw_only=True):
    """Operator -> worker: as SIGTERM. Take nothing new, let what runs move or end, then leave."""


class Prefill(Message, tag="prefill", frozen=True, kw_only=True):
    """Decode -> prefill worker, once the decode worker has promised room: compute the prompt and offer its pages."""

    request: GenerateRequest
    router_id: str  # peer_id of the router that gets the first token directly
    held_tokens: int = 0  # leading tokens (whole pages) the decode worker already has: do not offer these
    source: WorkerInfo | None = None  # fetch what it holds of the prompt, rather than compute it
    link_bytes_per_s: float = 0.0  # at which its pages will be read, as measured so far; 0: not known


# ---------------------------------------------------------------- hand-off: prefill <-> decode


class Fetch(Message, tag="fetch", frozen=True, kw_only=True):
    """Worker -> worker that holds a prefix: lend me the pages with these hashes, as far as you cache them.

    Answered with tickets and `FetchDone`; ended with `PagesLanded`, also when the reader gives up.
    """

    request_id: str
    attempt: int
    choice: int = 0
    first_page: int  # of the request, whose hash is the first one
    hashes: list[bytes]


class FetchDone(Message, tag="fetch_done", frozen=True, kw_only=True):
    """Source -> reader, after the last ticket: of the pages asked for these were the first `num_pages`, all it has."""

    request_id: str
    attempt: int
    choice: int = 0
    num_pages: int


class PagesReady(Message, tag="pages_ready", frozen=True, kw_only=True):
    """Lender -> reader: a ticket. These pages are complete and lent to you until `PagesLanded`, or your lease ends.

    Page i of the lists holds tokens [(first_page + i) * page_size, ...) of the request. One list per KV group.
    """

    request_id: str
    attempt: int
    choice: int = 0
    first_page: int
    pages: list[list[int]]  # per KV group: page ids in the lender's pool
    checksums: list[list[int]] = []  # of each page's bytes; [] when this ticket is not checked
    num_tokens: int  # tokens of the request complete after this ticket
    blobs: dict[str, bytes] = {}  # for named extras that are not pages (hidden state, encoder output); none yet


class PrefillDone(Message, tag="prefill_done", frozen=True, kw_only=True):
    """Prefill -> decode, after the last ticket: the first token, already sent to the router.

    With `finish` set the request ended with that token and nothing is to be decoded.
    """

    request_id: str
    attempt: int
    choice: int = 0
    token_ids: list[int]
    finish: Finish | None = None
    spans: Spans | None = None
    held_ms: float = 0.0  # from the first token until this was sent: the last pages were being sealed
    undelivered: TokenDelta | None = (
        None  # the first token's delta, to be relayed: no link to the router, or it is last
    )


class PrefillFailed(Message, tag="prefill_failed", frozen=True, kw_only=True):
    """Prefill -> decode: no pages (more) will come; the decode worker computes what is missing itself."""

    request_id: str
    attempt: int
    choice: int = 0
    code: str
    message: str


class PagesLanded(Message, tag="pages_landed", frozen=True, kw_only=True):
    """Reader -> lender: everything of this attempt is read (or given up); the loan ends."""

    request_id: str
    attempt: int
    choice: int = 0


# ---------------------------------------------------------------- answers: worker -> router


class Finish(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request ended. `reason`: "stop", "length", "abort", "error", or "moved": it is to go on elsewhere (Move).

    `stop_reason` is the stop token id that matched; `code` and `message` are set for "error" (see errors.py);
    `retryable` says that another worker may succeed; `kept_tokens` of one that "moved" are those, from the first, whose
    pages its worker keeps for the next attempt.
    """

    reason: str
    stop_reason: int | None = None
    code: str = ""
    message: str = ""
    retryable: bool = False
    kept_tokens: int = 0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: the chosen token, its rank (1 = most likely), and the top ones in order."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class Spans(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker's part of the request's timeline: durations in milliseconds, bytes, and token counts.

    Sent with a worker's first delta of a request and again, complete, with its last one.
    """

    worker: str = ""  # worker id
    queue_ms: float = 0.0  # waiting at this worker before work began
    prefill_ms: float = 0.0  # first chunk planned until the first token was sampled
    transfer_ms: float = 0.0  # first ticket until the last page landed
    exposed_transfer_ms: float = 0.0  # last chunk computed until the last page landed: what the client could notice
    decode_ms: float = 0.0
    transfer_bytes: int = 0
    transfer_pages: int = 0
    transport: str = ""
    cached_tokens: int = 0  # prompt tokens found in this worker's prefix cache
    computed_tokens: int = 0  # prompt tokens computed by this worker
    preemptions: int = 0
    local_prefill: bool = False  # a decode worker computed (part of) the prompt itself
    checksum_failures: int = 0
    fetch_ms: float = 0.0  # asking another worker for a prefix until its last page landed, or it was given up
    fetch_bytes: int = 0
    fetched_tokens: int = 0
    source: str = ""  # worker id of whom the prefix was fetched from


class TokenDelta(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """New tokens of one choice. `index` counts output tokens from the very first attempt."""

    request_id: str
    attempt: int
    choice: int
    index: int
    token_ids: list[int]
    finish: Finish | None = None
    logprobs: list[TokenLogprobs] | None = None
    spans: Spans | None = None  # with a worker's first and last delta of the request
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first token, if asked for: of all but the first


class TokenBatch(Message, tag="tokens", frozen=True, kw_only=True):
    """New tokens of one step for one router: all of them, or a part."""

    deltas: list[TokenDelta]


AnyMessage = (
    Hello
    | Welcome
    | Refused
    | Goodbye
    | Heartbeat
    | HeartbeatAck
    | Submit
    | Abort
    | Move
    | Drain
    | Prefill
    | Fetch
    | FetchDone
    | PagesReady
    | PrefillDone
    | PrefillFailed
    | PagesLanded
    | TokenBatch
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)
_worker_decoder = msgspec.msgpack.Decoder(WorkerInfo)


def encode(message: Message | WorkerInfo) -> bytes:
    """MessagePack bytes of a message (or of the `WorkerInfo` inside `Welcome`)."""
    return _encoder.encode(message)


def decode(payload: bytes) -> AnyMessage:
    """The message in `payload`.

    Raises:
        msgspec.ValidationError, msgspec.DecodeError: not one of ours; the peer should be refused, not crash us.
    """
    message: AnyMessage = _decoder.decode(payload)
    return message


def decode_worker_info(payload: bytes) -> WorkerInfo:
    """The inner payload of `Welcome`, or a worker's record in Redis; raises as `decode`."""
    return _worker_decoder.decode(payload)
