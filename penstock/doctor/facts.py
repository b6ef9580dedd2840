"""What the doctor found out about a machine: plain values, filled by probes.py and judged by verdicts.py."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gpu:
    """A CUDA device that this process sees."""

    index: int
    name: str
    memory_gib: float
    free_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class GpuPair:
    """Two visible devices. `nvlinks`: how many NVLinks join them, None if nobody says."""

    first: int
    second: int
    peer_access: bool
    nvlinks: int | None


@dataclass(frozen=True)
class LinkRate:
    """A measured transport. `page_us` is the time of one page alone; with `error` there are no figures."""

    transport: str  # as people know it: "nixl write"
    between: str  # "cpu and cpu", "cuda:0 and cuda:1"
    gb_s: float = 0.0
    page_us: float = 0.0
    page_bytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class RedisFact:
    """`where`: "given" (--redis-url) or "private" (what `serve` would start)."""

    where: str
    version: str = ""
    ping_ms: float | None = None
    error: str = ""


@dataclass(frozen=True)
class PortFact:
    """Whether something could listen there; if not, `error` says why, and `lacks` what: "port" (it is taken),
    "address" (not one of this machine, or not to be bound) or "key" (the bus leaves this host unencrypted)."""

    purpose: str
    host: str
    port: int
    error: str = ""
    lacks: str = ""


@dataclass(frozen=True)
class Facts:
    """All of it. Versions are "" where a package is missing, errors are "" where nothing went wrong."""

    python: tuple[int, int, int]
    versions: dict[str, str]  # by distribution name
    torch_cuda: str = ""  # CUDA version that torch was built for, "" for CPU builds
    torch_error: str = ""
    driver: str = ""  # of NVIDIA, "" without one
    cards: int = 0  # of NVIDIA on the PCI bus, whoever may use them
    hidden: bool = False  # CUDA_VISIBLE_DEVICES names no device
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[GpuPair, ...] = ()
    c_compiler: str = ""
    python_headers: bool = False
    triton_error: str = ""  # from compiling and running a kernel; only where there is a GPU
    nixl_error: str = ""
    ucx_modules: tuple[str, ...] = ()  # UCX transports that NIXL brings: "cma", "cuda", "ib"
    ucx_tls: str = ""  # the variable UCX_TLS
    rdma_devices: tuple[str, ...] = ()
    links: tuple[LinkRate, ...] = ()
    links_skipped: bool = False
    redis: RedisFact = field(default_factory=lambda: RedisFact("private"))
    ports: tuple[PortFact, ...] = ()
    open_files: int = 0  # the most a process may have open, once it has raised its limit; -1: no limit
    shm_free_mib: int = 0
    shm_error: str = ""
    locked_kib: int = 0  # memory that may be pinned; -1: no limit
    cores: int = 1
    memory_gib: float = 0.0

    @property
    def routers_only(self) -> bool:
        """Penstock was installed without its extra `worker`."""
        return not self.versions.get("torch")
