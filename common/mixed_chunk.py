"""How many prompt tokens join a step that also decodes: the engine's rule; routers and the simulator know it."""

from __future__ import annotations

from bisect import bisect_left

SEQUENCES = (4, 8, 16, 24, 32, 48, 64, 128, 256)
"""Chunks are cut for so many sequences beside them, or the next more: steps are captured in these sizes on a GPU."""
_FEW, _EACH = 8, 3


def room_for(sequences: int) -> int:
    """The least of SEQUENCES that holds so many; beyond them just as many."""
    at = bisect_left(SEQUENCES, sequences)
    return SEQUENCES[at] if at < len(SEQUENCES) else sequences


def chunk_beside(few_tokens: int, sequences: int) -> int:
    """Prompt tokens beside so many sequences: `few_tokens` up to 8, and 3 more for each one that `room_for` has beyond.

    With many sequences a step is long anyway, and prompts come as fast as outputs end: a chunk that did not grow would
    soon not keep up with them.
    """
    return few_tokens + _EACH * max(0, room_for(sequences) - _FEW)
