"""Taps: connections that asked for copies of what passes at a worker's bus socket (`penstock tap`). Pure.

A tap says no Hello. It sends the two frames [b"tap", credit], a decimal number: send me so many more copies. A copy is
the four frames [b"in" or b"out", identity of the peer, payload as it travels, copies missed so far]. Credit bounds
what may wait for a tap that is slow, and a tap that does not renew is forgotten: a worker owes it nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

REQUEST = b"tap"
LEASE_S = 5.0
MAX_CREDIT = 10_000


@dataclass
class _Tap:
    credit: int
    ends_at: float
    missed: int = 0


class Taps:
    """The taps of one worker. False while there is none: then nothing at all is to be done."""

    def __init__(self) -> None:
        self._taps: dict[bytes, _Tap] = {}

    def __len__(self) -> int:
        return len(self._taps)

    def asked(self, identity: bytes, frames: list[bytes], now: float) -> bool:
        """Whether these frames were a tap's request; if so it has been granted."""
        if len(frames) != 2 or frames[0] != REQUEST or not frames[1].isdigit():
            return False
        credit = min(int(frames[1][:9]), MAX_CREDIT)
        missed = self._taps[identity].missed if identity in self._taps else 0
        self._taps[identity] = _Tap(credit, now + LEASE_S, missed)
        return True

    def copies(self, direction: bytes, peer: bytes, payload: bytes, now: float) -> list[tuple[bytes, ...]]:
        """What to send for one message: [identity of a tap, the four frames] each."""
        sends: list[tuple[bytes, ...]] = []
        for identity, tap in list(self._taps.items()):
            if now >= tap.ends_at:
                del self._taps[identity]
            elif tap.credit > 0:
                tap.credit -= 1
                sends.append((identity, direction, peer, payload, b"%d" % tap.missed))
            else:
                tap.missed += 1
        return sends

    def gone(self, identity: bytes) -> None:
        """A tap has left."""
        self._taps.pop(identity, None)
