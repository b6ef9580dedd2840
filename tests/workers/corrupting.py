"""`penstock` with a broken wire: every copy over shared memory flips one bit of each page it delivers."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.cli import main
from penstock.kv_transfer.base import Copy
from penstock.kv_transfer.shm import ShmTransport
from tests.workers.patient import wait_for_sources

_post = ShmTransport.post


def _corrupt(self: ShmTransport, peer: str, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Copy:
    copy = _post(self, peer, src_pages, dst_pages)
    for page in dst_pages if self._region.num_pages > 1 else ():  # the start-up probe has one page: let it pass
        self._pages[page, 3] ^= 0x40  # a high bit of the exponent of the page's first float
    return copy


if __name__ == "__main__":
    wait_for_sources()
    ShmTransport.post = _corrupt  # type: ignore[method-assign]
    raise SystemExit(main())
