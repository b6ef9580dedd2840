"""Configuration: frozen dataclasses, one default in one place. `config_loader` fills them: file < environment < flags.

A field's metadata is its flag's help text. `EngineConfig` is what one engine needs; a worker, the router and the
launcher add their own by inheritance. Derived values are properties, never written back.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from penstock.common.bounds import LARGEST_INT, LONGEST_S, out_of_bounds
from penstock.common.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
ROLES = ("prefill", "decode")
ATTENTION_BACKENDS = ("AUTO", "HOPPER", "CUDNN", "TRITON", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "XFORMERS")
TRANSPORTS = ("auto", "cuda_ipc", "nixl", "shm", "tcp")
CONTENT_FORMATS = ("auto", "string", "openai")
CHECKSUMS = ("all", "sample", "off")
TWO_PHASE_MIXED_CHUNK_TOKENS = 152  # with 8 sequences 160 rows: 7 ms of an 8B model on an H200, decodes alone 5 to 12
MAX_WORKER_ID = 200  # bytes: with what tells its lives and links apart it fits into an identity of ZeroMQ
LARGEST_PORT = 65535
SHORTEST_LEASE_S = 0.1  # Redis counts milliseconds, and three heartbeats have to fit in
MOST_THREADS, MOST_PROCESSES = 1024, 1024  # more than machines have: a slip of the finger would take one down
MOST_BYTES = 1 << 47  # what a process can address
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
ROUTING_POLICIES = ("random", "round-robin", "least-load", "longest-prefix", "cost")


def option(default: Any, help: str, **extra: Any) -> Any:
    """A configuration field. `extra` may hold:

    choices: the values allowed | least, most: those of a number; by default 0, and any (65535 for a port) | positional:
    also the command's argument | excludes: an option that may not be given too | human: sizes such as 4GiB or 32K are
    understood | secret: never shown in logs or by `repr` | several: the flag takes more than one value.
    """
    return field(default=default, repr=not extra.get("secret"), metadata={"help": help, **extra})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine: a model, its KV pool, and the limits of a batch."""

    model: str = option("", "Hugging Face directory or hub id", positional=True)
    dtype: str = option("auto", "weights and KV; auto follows the checkpoint", choices=DTYPES)
    device: str = option("auto", "cpu, cuda, cuda:N, or auto")
    max_model_len: int | None = option(
        None, "longest prompt plus output, in tokens; default: the model's own", human=True, least=2
    )
    max_num_seqs: int = option(256, "most requests in one batch", least=1)
    max_num_batched_tokens: int | None = option(
        None,
        "most tokens in one step: longer prompts are computed in chunks; default: 8192 on a GPU, 2048 on CPU. "
        "Of these a prefill worker uses more than 2048 only for the beginning of a prompt of more than 4096",
        least=1,
    )
    block_size: int | None = option(None, "tokens in a KV page; default: 64 on a GPU, 16 on CPU", least=1)
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory this fleet may use", excludes="kv_cache_memory_bytes"
    )
    kv_cache_memory_bytes: int | None = option(
        None, "size of a worker's KV pool (4GiB); default: measured on a GPU, 1 GiB on CPU", human=True, most=MOST_BYTES
    )
    enable_prefix_caching: bool = option(True, "keep pages of finished requests for prompts that begin alike")
    seed: int = option(0, "seeds the requests that bring no seed of their own", least=-LARGEST_INT)
    load_format: str = option("auto", "auto, or dummy: random weights, no files read", choices=("auto", "dummy"))
    attention_backend: str = option(
        "AUTO",
        "what computes prompts' attention on a GPU; vLLM's names and VLLM_ATTENTION_BACKEND mean the nearest of these",
        choices=ATTENTION_BACKENDS,
    )
    enforce_eager: bool = option(False, "no CUDA graphs: every step is launched op by op")
    cpu_threads: int = option(0, "OpenMP threads of an engine on CPU; 0: cores divided by workers", most=MOST_THREADS)

    def __post_init__(self) -> None:
        _in(self, "dtype", DTYPES)
        _in(self, "attention_backend", ATTENTION_BACKENDS)
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        _in_bounds(self)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """What every process of a fleet must agree on."""

    redis_url: str = option(
        "", "Redis that holds the fleet's state, redis:// or rediss://; serve starts one if empty", secret=True
    )
    namespace: str = option("penstock", "prefix of this fleet's keys in Redis")
    cluster_key: str = option(
        "", "secret of the fleet; needed when the bus leaves this host (encrypts it with CURVE)", secret=True
    )
    lease_s: float = option(10.0, "how long a silent peer keeps what it holds", least=SHORTEST_LEASE_S, most=LONGEST_S)
    served_model_name: tuple[str, ...] = option((), "names clients may use; default: MODEL", several=True)
    log_level: str = option("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))
    log_format: str = option("text", "text, or json: a JSON object a line", choices=("text", "json"))
    enable_log_requests: bool = option(False, "log every request: what it asked for and how it ended, never its text")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(EngineConfig, FleetConfig):
    """One worker process."""

    role: str = "decode"
    tokenizer: str = option("", "where the tokenizer is, if not with the model: outputs with a form follow it")
    worker_id: str = option("", "name of this worker, kept over restarts; default: role and pid")
    bus_host: str = option("127.0.0.1", "address the worker binds and announces")
    bus_port: int = option(0, "port of the worker's bus socket; 0: any")
    metrics_port: int = option(0, "port of the worker's /metrics and /debug pages; 0: any")
    kv_port: int = option(0, "port where other hosts read the worker's pages over TCP; 0: any")
    kv_transport: str = option("auto", "how pages move between workers; auto probes", choices=TRANSPORTS)
    kv_checksum: str = option("all", "compare checksums of moved pages: all, sample (1 in 16), off", choices=CHECKSUMS)
    mixed_chunk_tokens: int | None = option(
        None,
        "prompt tokens in a step that also decodes up to 8 sequences, and 3 more for each one beyond: with fewer, gaps "
        "between tokens are shorter; default: 152 for decode workers that serve starts beside prefill workers, else a "
        "quarter of max_num_batched_tokens",
        least=1,
    )
    memory_share: float = option(1.0, "this worker's part of the device's memory budget")
    drain_s: float = option(30.0, "how long SIGTERM waits for running requests")

    def __post_init__(self) -> None:
        super().__post_init__()
        _in(self, "role", ROLES)
        if len(self.worker_id.encode()) > MAX_WORKER_ID:
            raise ConfigError(f"worker_id may have {MAX_WORKER_ID} bytes at most")
        _in(self, "kv_transport", TRANSPORTS)
        _in(self, "kv_checksum", CHECKSUMS)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(FleetConfig):
    """One router process."""

    model: str = option("", "where tokenizer, chat template and generation_config are", positional=True)
    tokenizer: str = option("", "where the tokenizer is, if not with the model")
    host: str = option("127.0.0.1", "address of the HTTP server")
    port: int = option(8000, "port of the HTTP server")
    router_procs: int = option(
        1,
        "router processes that share the port: one passes on some hundreds of requests a second",
        least=1,
        most=MOST_PROCESSES,
    )
    admin_port: int = option(
        0, "port on loopback where a router process answers for itself alone; the next ports are the other processes'"
    )
    group_ports: tuple[str, ...] = option((), "admin ports of all processes that share the port; the launcher sets it")
    api_key: tuple[str, ...] = option((), "keys clients may use; none: open to all", secret=True, several=True)
    generation_config: str = option("auto", "default sampling: auto (the model's), vllm (neutral), or a directory")
    chat_template: str = option("", "file with a chat template; default: the tokenizer's")
    chat_template_content_format: str = option(
        "auto", "messages' content for the template: string, openai (lists of parts), or auto", choices=CONTENT_FORMATS
    )
    default_chat_template_kwargs: str = option("", "JSON object: variables for the chat template, under the client's")
    enable_auto_tool_choice: bool = option(False, "the model may call tools; needs --tool-call-parser")
    tool_call_parser: str = option("", "format of the model's tool calls (docs/tools.md)")
    tool_parser_plugin: str = option("", "Python file with more tool parsers")
    reasoning_parser: str = option("", "format of the model's reasoning (docs/tools.md)")
    reasoning_parser_plugin: str = option("", "Python file with more reasoning parsers")
    seed: int = option(
        0, "not 0: requests without a seed draw theirs from this one, in order of arrival", least=-LARGEST_INT
    )
    max_inflight: int = option(
        16384,
        "most choices in flight at a port, in equal parts at its processes; more are refused at once with 429",
        least=1,
    )
    max_queued: int = option(
        1024,
        "most requests that wait at a port while the fleet is full, in equal parts at its processes; 429 beyond",
        least=1,
    )
    slo_ttft: float = option(
        0.0,
        "refuse at once, with 429, what would wait longer for its first token, in ms; 0: none",
        most=1e3 * LONGEST_S,
    )
    slo_tpot: float = option(
        0.0, "refuse at once what would get its tokens further apart, in ms; 0: none", most=1e3 * LONGEST_S
    )
    api_key_weights: tuple[str, ...] = option(
        (), "shares of a full fleet, in the order of --api-key (3,1: the first key gets three times the second's)"
    )
    max_attempts: int = option(3, "how often a request is tried when workers are lost", least=1)
    queue_timeout_s: float = option(60.0, "how long a request may wait for room")
    progress_timeout_s: float = option(120.0, "a request without any progress for this long fails")
    write_timeout_s: float = option(
        60.0, "a client that takes nothing of its answer for this long is cut off; 0: never"
    )
    stall_timeout_s: float = option(
        30.0, "a worker that runs requests without a step, or answers no heartbeat, for this long is taken out"
    )
    slow_start_s: float = option(10.0, "how long the share of a worker that has just joined others grows")
    drain_s: float = option(30.0, "how long SIGTERM waits for running requests")
    response_store_mib: int = option(64, "memory in Redis for stored answers of /v1/responses, of all routers; 0: none")
    response_ttl_s: float = option(3600.0, "how long a stored answer of /v1/responses is kept", most=LONGEST_S)
    routing_policy: str = option("cost", "how workers are chosen (docs/routing.md)", choices=ROUTING_POLICIES)
    fetch_prefixes: bool = option(
        True, "cost policy: read a prefix from a worker that has it where computing is slower"
    )
    min_remote_prefill_tokens: int = option(0, "uncached prompt tokens from which a prefill worker is used")
    otlp_traces_endpoint: str = option("", "OpenTelemetry collector that gets a trace of each request (needs [otel])")

    def __post_init__(self) -> None:
        _in_bounds(self)
        _in(self, "routing_policy", ROUTING_POLICIES)
        _in(self, "chat_template_content_format", CONTENT_FORMATS)
        if self.enable_auto_tool_choice and not self.tool_call_parser:
            raise ConfigError("enable_auto_tool_choice needs tool_call_parser")
        if self.router_procs > 1 and self.admin_port + self.router_procs - 1 > LARGEST_PORT:
            raise ConfigError(f"admin_port {self.admin_port} leaves no {self.router_procs} ports up to {LARGEST_PORT}")
        self.weights_by_tenant  # noqa: B018 - raises for weights that are none

    @property
    def own_max_inflight(self) -> int:
        """This process's part of `max_inflight`."""
        return self._part(self.max_inflight)

    @property
    def own_max_queued(self) -> int:
        """This process's part of `max_queued`."""
        return self._part(self.max_queued)

    def _part(self, limit: int) -> int:
        return -(-limit // max(1, len(self.group_ports)))

    @property
    def weights_by_tenant(self) -> dict[str, float]:
        """The weight of every API key's tenant (`tenant_of`). Raises ConfigError."""
        if not self.api_key_weights:
            return {}
        if len(self.api_key_weights) != len(self.api_key):
            raise ConfigError(
                f"api_key_weights has {len(self.api_key_weights)} weights for {len(self.api_key)} keys of api_key"
            )
        try:
            weights = [float(weight) for weight in self.api_key_weights]
        except ValueError:
            weights = []
        if not weights or not all(0 < weight < math.inf for weight in weights):
            raise ConfigError(f"api_key_weights must be numbers above 0, got {','.join(self.api_key_weights)}")
        return {tenant_of(number): weight for number, weight in enumerate(weights)}


@dataclass(frozen=True, kw_only=True)
class ServeConfig(WorkerConfig, RouterConfig):
    """The whole fleet of `penstock serve`: Redis, workers, router. Splits into the configs of its processes."""

    prefill_workers: int = option(
        0, "prefill workers; 0: decode workers compute prompts themselves", most=MOST_PROCESSES
    )
    decode_workers: int = option(1, "decode workers: every request ends on one", least=1, most=MOST_PROCESSES)
    prefill_devices: tuple[str, ...] = option((), "GPUs of the prefill workers, in turn (0,1)")
    decode_devices: tuple[str, ...] = option((), "GPUs of the decode workers, in turn")

    def __post_init__(self) -> None:
        super().__post_init__()
        RouterConfig.__post_init__(self)  # the engine's ends the chain
        for role in ROLES:
            devices, workers = getattr(self, f"{role}_devices"), getattr(self, f"{role}_workers")
            if len(devices) > workers:
                raise ConfigError(f"{role}_devices names {len(devices)} devices for {role}_workers={workers}")

    def router(self) -> RouterConfig:
        """The router's share."""
        return RouterConfig(**{f.name: getattr(self, f.name) for f in fields(RouterConfig)})

    def worker(self, role: str, worker_id: str, device: str, memory_share: float, threads: int) -> WorkerConfig:
        """One worker's share."""
        values = {f.name: getattr(self, f.name) for f in fields(WorkerConfig)}
        values |= {"role": role, "worker_id": worker_id, "device": device, "memory_share": memory_share}
        if self.prefill_workers and self.mixed_chunk_tokens is None:
            values["mixed_chunk_tokens"] = TWO_PHASE_MIXED_CHUNK_TOKENS
        return WorkerConfig(**values | {"cpu_threads": threads, "bus_port": 0, "metrics_port": 0, "kv_port": 0})


def tenant_of(key_number: int) -> str:
    """Who an API key stands for, without the key itself: its place in --api-key."""
    return f"key-{key_number}"


def _in(config: object, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")


def _in_bounds(config: object) -> None:
    """What holds for every option of its kind: numbers and addresses of Redis. Raises ConfigError."""
    for f in fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if type(value) in (int, float):
            any_value = LARGEST_PORT if f.name.endswith("port") else LARGEST_INT if type(value) is int else math.inf
            if wrong := out_of_bounds(value, f.metadata.get("least", 0), f.metadata.get("most", any_value)):
                raise ConfigError(f"{f.name} {wrong}")
    if redis_url := getattr(config, "redis_url", ""):
        _check_redis_url(redis_url)


def _check_redis_url(url: str) -> None:
    """Raises ConfigError, whose message has no secret."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("redis", "rediss", "unix") and (parts.port is None or parts.port > 0)
    except ValueError:  # no port number, say
        usable = False
    if not usable:
        raise ConfigError("redis_url must be redis://HOST:PORT, rediss://HOST:PORT or unix://PATH")
    if parts.query:
        import redis  # only here: who asks for --help does not wait for it

        try:
            redis.ConnectionPool.from_url(url).make_connection()  # which connects later
        except (ValueError, TypeError, redis.RedisError) as error:
            raise ConfigError(f"redis_url has options that cannot be: {error}") from None
