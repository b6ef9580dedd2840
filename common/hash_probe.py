"""Do a worker and a router hash prompts alike? Both hash the same prompts, each with its own code, and compare.

A worker announces the digest of its hashes in its `WorkerInfo`; a router computes it from the scope and page size in
there, and uses no worker that comes to another one: it would look for prefixes under names that the worker never gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

from penstock.common.messages import WorkerInfo
from penstock.common.page_hash import page_hashes, root_hash

PROBE_PAGES = 3
PROBE_SALTS = ("", "probe")
MAX_TOKEN = (1 << 31) - 1


def probe_digest(page_size: int, hash_prompt: Callable[[list[int], str], Sequence[bytes]]) -> str:
    """Digest of what `hash_prompt` makes of the probes: (token ids, cache salt) -> page hashes."""
    digest = blake2b(digest_size=16)
    # Tokens of every size a model may have, and a last page that is not full.
    prompt = [(i * 2654435761) % MAX_TOKEN >> i % 31 for i in range(PROBE_PAGES * page_size + page_size // 2)]
    for salt in PROBE_SALTS:
        digest.update(b"".join(hash_prompt(prompt, salt)))
    return digest.hexdigest()


def mismatch(worker: WorkerInfo) -> str:
    """Why a router cannot predict what this worker caches, "" if it can, or if the worker announces no digest."""
    scope, page_size = worker.hash_scope, worker.page_size
    ours = probe_digest(page_size, lambda tokens, salt: list(page_hashes(root_hash(scope, (salt,)), tokens, page_size)))
    if worker.hash_probe in ("", ours):
        return ""
    return (
        f"it hashes prompts differently (scope {scope!r}, pages of {page_size} tokens): the probes give "
        f"{worker.hash_probe} there and {ours} here; run the same version in workers and routers"
    )
