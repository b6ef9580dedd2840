"""A lender process: `python -m tests.kv_transfer.lender TRANSPORT PAGE_BYTES NUM_PAGES SEED`.

Prints its description as one JSON line, serves until standard input ends, and flips a byte for each line "page offset".
"""

from __future__ import annotations

import json
import os
import sys

from penstock.kv_transfer.mover import PageMover
from penstock.kv_transfer.select import OPENERS
from tests.kv_transfer.pools import Pool


def main() -> None:
    name, page_bytes, num_pages, seed = sys.argv[1], *map(int, sys.argv[2:])
    incarnation = f"lender-{os.getpid()}"
    pool = Pool(page_bytes, num_pages, seed, f"penstock-{incarnation}")
    transport = OPENERS[name](pool.region, incarnation)
    description = transport.description()
    mover = PageMover(pool.region, [transport])
    mover.expect_readers()
    print(json.dumps({"description": description.hex()}), flush=True)
    for line in sys.stdin:
        page, offset = map(int, line.split())
        pool.pages[page, offset] ^= 1
        print("flipped", flush=True)
    assert mover.close()
    pool.close()


if __name__ == "__main__":
    main()
