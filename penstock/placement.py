"""Decides where the workers of `penstock serve` run: device, share of its memory, CPU threads. Pure, but for one look
at the machine (`visible_gpus`), which does not import torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.common.config import ServeConfig, WorkerConfig


@dataclass(frozen=True)
class Placement:
    """One worker's place."""

    worker_id: str
    role: str  # "prefill" | "decode"
    device: str
    memory_share: float
    cpu_threads: int

    def config(self, fleet: ServeConfig) -> WorkerConfig:
        """The worker's configuration."""
        return fleet.worker(self.role, self.worker_id, self.device, self.memory_share, self.cpu_threads)


def place_workers(config: ServeConfig, gpus: int, cores: int) -> list[Placement]:
    """Prefill workers, then decode workers.

    A role's devices are used in turn. Without a list, workers go round all GPUs; without a GPU they run on the CPU.
    Workers on one GPU get equal shares of its memory. CPU threads times workers leave a core free for the router.
    """
    ids = [("prefill", i) for i in range(config.prefill_workers)] + [
        ("decode", i) for i in range(config.decode_workers)
    ]
    lists = {"prefill": config.prefill_devices, "decode": config.decode_devices}
    devices = [
        _device(lists[role], index) if lists[role] else _default_device(config.device, gpus, position)
        for position, (role, index) in enumerate(ids)
    ]
    sharing = Counter(devices)
    # One core stays for the router: OpenMP threads beyond the free cores spin on each other, many times slower.
    threads = config.cpu_threads or max(1, (cores - 1) // len(ids))
    return [
        Placement(f"{role}-{index}", role, device, 1.0 if device == "cpu" else 1.0 / sharing[device], threads)
        for (role, index), device in zip(ids, devices, strict=True)
    ]


def visible_gpus(environ: Mapping[str, str], device_folder: Path = Path("/dev")) -> int:
    """Number of NVIDIA GPUs this process may use, from the device files and CUDA_VISIBLE_DEVICES."""
    present = len([path for path in device_folder.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    present = present or int((device_folder / "dxg").exists())  # WSL shows its GPUs as one device
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    listed = [entry.strip() for entry in chosen.split(",")]
    valid = next((i for i, entry in enumerate(listed) if entry in ("", "-1")), len(listed))  # CUDA stops at these
    return min(present, valid)


def _device(devices: Sequence[str], index: int) -> str:
    device = devices[index % len(devices)]
    return f"cuda:{device}" if device.isdigit() else device


def _default_device(asked: str, gpus: int, position: int) -> str:
    if asked not in ("auto", "cuda"):
        return asked
    if gpus == 0:
        return "cpu" if asked == "auto" else asked
    return f"cuda:{position % gpus}"
