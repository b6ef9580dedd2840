"""The store of responses against a plain list that forgets by the same two rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.router.responses.store import ResponseStore, Stored

MAX_BYTES, TTL_S = 100, 10.0
_steps = st.tuples(
    st.sampled_from(["put", "get", "pop"]), st.sampled_from("abcde"), st.integers(0, 120), st.floats(0.0, 6.0)
)


@given(st.lists(_steps, max_size=40))
def test_oldest_go_first_and_in_time(steps: list[tuple[str, str, int, float]]) -> None:
    store, now = ResponseStore(MAX_BYTES, TTL_S), 0.0
    model: list[tuple[str, float, int]] = []  # id, end, size; the oldest first
    for action, name, size, pause_s in steps:
        now += pause_s
        model = [entry for entry in model if entry[1] > now or action == "pop"]
        if action == "put":
            store.put(("", name), Stored(b"r" * (size // 2), (b"t" * (size - size // 2),)), now)
            model = [entry for entry in model if entry[0] != name]
            if size <= MAX_BYTES:
                model.append((name, now + TTL_S, size))
            while sum(entry[2] for entry in model) > MAX_BYTES:
                model.pop(0)
        elif action == "get":
            found = store.get(("", name), now)
            expected = [entry[2] for entry in model if entry[0] == name]
            assert ([] if found is None else [found.size_bytes]) == expected
        else:
            assert store.pop(("", name)) == any(entry[0] == name for entry in model)
            model = [entry for entry in model if entry[0] != name]
        assert (len(store), store.size_bytes) == (len(model), sum(entry[2] for entry in model))
        assert store.size_bytes <= MAX_BYTES
