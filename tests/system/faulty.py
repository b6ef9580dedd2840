"""`penstock` for chaos: SIGUSR1 cuts all its bus connections, SIGUSR2 breaks a page of the next copy that it reads."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

# Before the long imports: until it can do more, a signal must not end the process.
signal.signal(signal.SIGUSR1, lambda signum, frame: None)
_to_break: list[int] = []


def _break_next(signum: int, frame: FrameType | None) -> None:
    _to_break.append(signum)


signal.signal(signal.SIGUSR2, _break_next)

from penstock.cli import main  # noqa: E402
from penstock.common.memory import MemoryRegion  # noqa: E402
from penstock.kv_transfer.base import Copy, CopyState  # noqa: E402
from penstock.kv_transfer.region import page_array  # noqa: E402
from penstock.kv_transfer.shm import ShmTransport  # noqa: E402
from penstock.kv_transfer.tcp import TcpCopy, TcpTransport  # noqa: E402
from tests.system.cutting import cut_on_signal  # noqa: E402

_post = ShmTransport.post
_poll = TcpTransport.poll


def _post_or_break(self: ShmTransport, peer: str, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Copy:
    copy = _post(self, peer, src_pages, dst_pages)
    _break(self._region, dst_pages)
    return copy


def _poll_or_break(self: TcpTransport, copy: Copy) -> CopyState:
    state = _poll(self, copy)
    if state is CopyState.DONE:
        assert isinstance(copy, TcpCopy)
        _break(self._region, copy.dst_pages)
    return state


def _break(region: MemoryRegion, landed: Sequence[int]) -> None:
    """Break the first of the pages that have landed, if one is to be broken."""
    if _to_break and landed and region.num_pages > 1:  # the start-up probe has one page: let it pass
        _to_break.pop()
        page_array(region)[landed[0], 3] ^= 0x40  # a high bit of the exponent of the page's first float
        print("broke a page on its way here", flush=True)


if __name__ == "__main__":
    ShmTransport.post = _post_or_break  # type: ignore[method-assign]
    TcpTransport.poll = _poll_or_break  # type: ignore[method-assign]
    cut_on_signal()
    raise SystemExit(main())
