"""Which worker holds which page, from the page's side: the longest prefix for all workers in one walk. Pure.

It stands for the index in Redis. A page's holders are the bits of one integer, so that a thousand workers are compared
by one `&` a page of the prompt, and only those that hold something others do not are ever looked at one by one.
"""

from __future__ import annotations

from collections.abc import Sequence


class PrefixIndex:
    """Page -> set of workers, as a bit mask."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}

    def add(self, page: int, worker: int) -> None:
        """`worker` holds the page from now on; saying so twice changes nothing."""
        self._holders[page] = self._holders.get(page, 0) | (1 << worker)

    def remove(self, page: int, worker: int) -> None:
        """It does not any more."""
        rest = self._holders.get(page, 0) & ~(1 << worker)
        if rest:
            self._holders[page] = rest
        else:
            self._holders.pop(page, None)

    def __len__(self) -> int:
        """Pages that somebody holds."""
        return len(self._holders)

    def entries(self) -> int:
        """Pairs of a page and a worker that holds it."""
        return sum(mask.bit_count() for mask in self._holders.values())

    def runs(self, pages: Sequence[int], everyone: int) -> list[tuple[int, int]]:
        """(pages held from the first, mask of the workers that hold just so many), the longest first.

        Together the masks are `everyone`, the mask of all workers asked about.
        """
        found: list[tuple[int, int]] = []
        holding, depth = everyone, 0
        for page in pages:
            still = holding & self._holders.get(page, 0)
            if still != holding:
                found.append((depth, holding & ~still))
                holding = still
                if not still:
                    break
            depth += 1
        if holding:
            found.append((depth, holding))
        found.reverse()
        return found


def workers_of(mask: int) -> list[int]:
    """The numbers in a mask, the lowest first."""
    found = []
    while mask:
        lowest = mask & -mask
        found.append(lowest.bit_length() - 1)
        mask ^= lowest
    return found
