"""Which choices are at which worker, and which move from a leaving worker to another one. Pure; used by dispatch.py.

Each worker is heard of several times a second, which concerns what is at it, or on its way there. The choices of all
workers together are too many to be looked through each time.
"""

from __future__ import annotations

from penstock.router.dispatch_events import Give, Release, Reserve, WorkerLeaving
from penstock.router.dispatch_state import Choice, Key
from penstock.router.policy import Moving, Placement


class Whereabouts:
    """Of a router's choices: an attempt `begin`s, and one of `let_go`, `give_up` and `end` follows."""

    def __init__(self) -> None:
        self._at: dict[str, dict[Key, Choice]] = {}  # by the incarnations of their decode and prefill workers
        self._moving: dict[Key, Choice] = {}  # all that move, and some that have got where they were to go

    def begin(self, choice: Choice, placement: Placement) -> list[Reserve]:
        """An attempt begins; what it weighs, and at which workers."""
        key = choice.key
        for incarnation in _workers(placement):
            self._at.setdefault(incarnation, {})[key] = choice
        return choice.run_at(placement)

    def let_go(self, choice: Choice) -> list[Release | Give]:
        """The attempt, if there is one, is over; what it still weighed, and what it came to."""
        if choice.placement is not None:
            key = choice.key
            for incarnation in _workers(choice.placement):
                here = self._at[incarnation]
                del here[key]
                if not here:
                    del self._at[incarnation]
        return choice.let_go()

    def give_up(self, choice: Choice, kept_tokens: int) -> list[Release | Give]:
        """The same, of one that moves: its worker keeps the pages of so many tokens for the next attempt."""
        assert choice.placement is not None
        choice.moving = Moving(choice.placement.decode, kept_tokens, choice.destination)
        self._moving[choice.key] = choice
        return self.let_go(choice)

    def end(self, choice: Choice) -> list[Release | Give]:
        """The same, and no other attempt follows."""
        self._moving.pop(choice.key, None)
        return self.let_go(choice)

    def at(self, incarnation: str) -> list[Choice]:
        """Those whose attempt has this decode or prefill worker."""
        return list(self._at.get(incarnation, {}).values())

    def on_the_way(self, incarnation: str) -> list[Choice]:
        """Those that are to move to this worker, and have not been heard of there."""
        self._moving = {key: choice for key, choice in self._moving.items() if choice.is_moving}
        return [choice for choice in self._moving.values() if choice.heads_for == incarnation]

    def to_move(self, event: WorkerLeaving) -> list[Choice]:
        """Those at the leaving worker that are to move, from now on, to where there is room for them.

        All routers hear of the same room at once: each fills its share, or moves one request that needs more.
        """
        here = [choice for choice in self.at(event.incarnation) if choice.runs_at(event.incarnation)]
        if not here:
            return []
        room, on_the_way, found = event.room, self.on_the_way(event.destination), []
        sequences, pages = len(on_the_way), sum(room.pages_for(choice.context_tokens) for choice in on_the_way)
        for choice in here:
            failed_there = event.destination in choice.failed and event.others - choice.failed
            if choice.destination or failed_there or choice.most_tokens > room.context:
                continue
            routers = room.routers if sequences else 1
            more = room.pages_for(choice.context_tokens)
            if sequences < room.sequences // routers and pages + more <= room.pages // routers:
                sequences, pages = sequences + 1, pages + more
                choice.destination = event.destination
                self._moving[choice.key] = choice
                found.append(choice)
        return found


def _workers(placement: Placement) -> set[str]:
    decode, prefill = placement.decode, placement.prefill
    return {decode.incarnation} if prefill is None else {decode.incarnation, prefill.incarnation}
