"""The whole prefix index, read with plain Redis commands and nothing of ours, as a look-up would count it."""

from __future__ import annotations

import redis


def index_view(client: redis.Redis, namespace: str) -> dict[str, set[bytes]]:
    """Incarnation -> its pages (3 bytes of bucket, 6 of field), of the workers whose slots are alive."""
    slots = client.hgetall(f"{namespace}:slots")
    generation = slots.pop(b"generation", b"")
    view: dict[str, set[bytes]] = {}
    owners: dict[int, str] = {}
    for slot, incarnation in slots.items():
        owner = client.get(f"{namespace}:index:{incarnation.decode()}") or b""
        if owner.split(b":")[:2] == [generation, slot]:
            owners[int(slot)] = incarnation.decode()
            view[incarnation.decode()] = set()
    prefix = f"{namespace}:pages:{generation.decode()}:".encode()
    for key in client.scan_iter(prefix + b"*", count=10_000):
        for field, holders in client.hgetall(key).items():
            numbers = [int.from_bytes(holders[i : i + 2], "big") for i in range(0, len(holders), 2)]
            assert numbers == sorted(set(numbers)) and numbers, "holders are in order, each once"
            for owner_slot in owners.keys() & set(numbers):
                view[owners[owner_slot]].add(key[len(prefix) :] + field)
    return view


def pages_held(client: redis.Redis, namespace: str, incarnation: str) -> int:
    """How many pages the index counts for a worker."""
    return len(index_view(client, namespace).get(incarnation, ()))
