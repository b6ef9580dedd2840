"""Reads a lender's pool until killed: `python -m tests.kv_transfer.endless_reader TRANSPORT PEER DESCRIPTION PAGE_BYTES
NUM_PAGES`, the description in hexadecimal digits. Says so after the first round."""

from __future__ import annotations

import itertools
import os
import sys
import time

from penstock.kv_transfer.mover import PageMover, ReadJob
from penstock.kv_transfer.select import OPENERS
from tests.kv_transfer.pools import Pool


def main() -> None:
    transport, peer, description, page_bytes, num_pages = sys.argv[1:6]
    pool = Pool(int(page_bytes), int(num_pages))
    mover = PageMover(pool.region, [OPENERS[transport](pool.region, f"reader-{os.getpid()}")])
    mover.connect(peer, transport, bytes.fromhex(description))
    pages = range(int(num_pages))
    for turn in itertools.count():
        mover.read(ReadJob(str(turn), peer, transport, pages, pages))
        while not mover.poll_done():
            time.sleep(0.0005)
        if turn == 0:
            print("reading", flush=True)


if __name__ == "__main__":
    main()
