"""Which links the doctor measures, and measuring them: on CPU this host's, on GPUs each device and its neighbour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from penstock.doctor.facts import LinkRate
from penstock.kv_transfer.base import TransportError
from penstock.kv_transfer.link_rate import LinkSpec, NoAnswer, measure

TIMEOUT_S = 60.0
_CPU_PAGE_BYTES, _CPU_PAGES = 256 << 10, 256
_GPU_PAGE_BYTES, _GPU_PAGES = 2 << 20, 256


def plan(num_gpus: int, *, nixl: bool = True) -> list[tuple[str, LinkSpec]]:
    """(how people call it, link): every transport that could serve workers on this host's devices."""

    def cpu(transport: str) -> LinkSpec:
        return LinkSpec(transport, "cpu", "cpu", _CPU_PAGE_BYTES, _CPU_PAGES, (1, _CPU_PAGES // 2), repeats=3)

    planned = [("shm", cpu("shm")), ("nixl", cpu("nixl")), ("tcp", cpu("tcp"))]
    neighbours = sorted({tuple(sorted((i, (i + 1) % num_gpus))) for i in range(num_gpus)})
    for lender, reader in neighbours:
        link = LinkSpec(
            "nixl",
            reader_device=f"cuda:{reader}",
            lender_device=f"cuda:{lender}",
            page_bytes=_GPU_PAGE_BYTES,
            num_pages=_GPU_PAGES,
            passes=(1, _GPU_PAGES // 2),
        )
        planned += [
            ("cuda_ipc", replace(link, transport="cuda_ipc")),
            ("nixl", link),
            ("nixl write", replace(link, push=True)),
            ("tcp", replace(link, transport="tcp")),
        ]
    return [(label, spec) for label, spec in planned if nixl or spec.transport != "nixl"]


def measure_all(num_gpus: int, tell: Callable[[str], None], *, nixl: bool = True) -> tuple[LinkRate, ...]:
    """Rates of every planned link, without those over NIXL where it does not work at all; `tell` hears what is being
    measured. A transport that gave no answer once is not waited for again: there may be many devices."""
    found = []
    silent: dict[str, str] = {}  # label -> between what
    for label, spec in plan(num_gpus, nixl=nixl):
        between = f"{spec.lender_device} and {spec.reader_device}"
        if label in silent:
            found.append(LinkRate(label, between, error=f"not tried: there was no answer between {silent[label]}"))
            continue
        tell(f"measuring {label} between {between}")
        try:
            page, many = measure(spec, TIMEOUT_S)
        except TransportError as error:
            if isinstance(error, NoAnswer):
                silent[label] = between
            found.append(LinkRate(label, between, error=str(error)))
        else:
            gb_s = many.pages * spec.page_bytes / many.best_s / 1e9
            found.append(LinkRate(label, between, gb_s, page.best_s * 1e6, spec.page_bytes))
    return tuple(found)
