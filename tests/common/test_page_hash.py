"""Page hashes: fixed for ever (golden), the same in every process, and different whenever anything differs."""

from __future__ import annotations

import struct
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from penstock.common.page_hash import DIGEST_BYTES, next_hash, page_hashes, root_hash

ROOT = Path(__file__).parents[2]
GOLDEN = ["b4078c062505b4410196e35491318d10", "b4050e37fbef295323af4a2c34d47dae"]
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def by_the_book(scope: str, extra: list[str], token_ids: list[int], page_size: int) -> list[bytes]:
    """The definition, written down a second time with nothing of ours."""
    parent = blake2b(scope.encode() + b"".join(b"\x00" + key.encode() for key in extra), digest_size=16).digest()
    hashes = []
    for page in range(len(token_ids) // page_size):
        packed = struct.pack(f"={page_size}i", *token_ids[page * page_size : (page + 1) * page_size])
        parent = blake2b(parent + packed, digest_size=16).digest()
        hashes.append(parent)
    return hashes


def test_golden():
    got = [page.hex() for page in page_hashes(root_hash("model|float32|4", ["salt"]), range(9), 4)]
    assert got == GOLDEN


@given(tokens, st.integers(1, 8))
def test_as_defined(token_ids: list[int], page_size: int):
    got = list(page_hashes(root_hash("s", ["", "x"]), token_ids, page_size))
    assert got == by_the_book("s", ["x"], token_ids, page_size)
    assert all(len(page) == DIGEST_BYTES for page in got)


@given(st.lists(st.integers(0, 100), min_size=8, max_size=30), st.data())
def test_a_token_changes_its_page_and_all_behind_it(token_ids: list[int], data: st.DataObject):
    at = data.draw(st.integers(0, len(token_ids) - 1))
    changed = [t + (i == at) for i, t in enumerate(token_ids)]
    before, after = (list(page_hashes(root_hash("s"), t, 4)) for t in (token_ids, changed))
    assert [a == b for a, b in zip(before, after, strict=True)] == [i < at // 4 for i in range(len(before))]


def test_scope_and_every_extra_key_count():
    roots = [root_hash("a"), root_hash("b"), root_hash("a", ["k"]), root_hash("a", ["k", "l"]), root_hash("a", ["kl"])]
    assert len(set(roots)) == len(roots)
    assert next_hash(roots[0], [1, 2]) != next_hash(roots[1], [1, 2])


def test_every_process_agrees():
    code = "from penstock.common.page_hash import *; print([*page_hashes(root_hash('s'), range(64), 16)][-1].hex())"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert texts == {list(page_hashes(root_hash("s"), range(64), 16))[-1].hex()}
