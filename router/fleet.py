"""The router's view of its fleet. Pure: the service feeds it what Redis and the links say.

Redis tells addresses, nothing more. A worker is alive exactly while the link to its address has its Welcome, and the
Welcome says who it is; so a restart behind the same address is a new worker, and a Redis outage changes nothing.

All members have one fingerprint, that of the first: two models never answer for each other. Others are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.common.redis_state import Lookup
from penstock.router.dispatch_events import Room, WorkerLeaving
from penstock.router.dispatch_state import WAIT_FOR_WORKER_S
from penstock.router.expected import computing_ms
from penstock.router.health import Health
from penstock.router.policy import DECODE_TOKENS, Candidate, Placement
from penstock.router.rates import H200_LLAMA8B, WorkerRates, measured, typical
from penstock.router.shares import WorkShares

STEP_SLACK = 3.0  # times what a step full of prompts takes is no stall
# A request waits for WAIT_FOR_WORKER_S at most, so none begins on one model and goes on with another.
FINGERPRINT_KEPT_S = WAIT_FOR_WORKER_S + 5.0


@dataclass
class Member:
    """One live worker."""

    worker: WorkerInfo
    load: WorkerLoad
    address: str
    rates: WorkerRates


@dataclass(frozen=True)
class Discovery:
    """What a new listing changes: addresses to link to, and addresses to give up."""

    opened: list[str]
    forgotten: list[str]


class Fleet:
    """Workers by address and by incarnation, with the load this router has reserved at each.

    `model_names` are the names the router serves, its MODEL included; none: it takes any model.
    """

    def __init__(self, model_names: Iterable[str] = (), health: Health | None = None) -> None:
        self.health = health or Health()
        self._names = _short(model_names)
        self._fingerprint = ""  # of all members, and for a while of the last one; "": none yet
        self._left_at = float("-inf")  # when the last member left
        self._addresses: set[str] = set()
        self._members: dict[str, Member] = {}  # by address, while the link is up
        self._refused: dict[str, WorkerInfo] = {}  # by address, while the link is up
        self._reserved: dict[str, int] = {}  # incarnation -> tokens; never 0
        self._prompts: Counter[str] = Counter()  # incarnation -> of those, tokens of prompts to compute
        self._placed: Counter[str] = Counter()  # incarnation -> sequences that this router has there
        self._shares = WorkShares()
        self._typical: dict[str, WorkerRates] = {}  # by role

    def discovered(self, workers: Iterable[WorkerInfo]) -> Discovery:
        """Take a listing from Redis. An address is forgotten only when its link is down as well."""
        listed = {worker.address for worker in workers}
        opened = sorted(listed - self._addresses)
        forgotten = sorted(self._addresses - listed - self._members.keys())
        self._addresses.update(opened)
        self._addresses.difference_update(forgotten)
        for address in forgotten:
            self._refused.pop(address, None)
        return Discovery(opened, forgotten)

    def connected(self, address: str, worker: WorkerInfo, now: float) -> str:
        """The link to `address` is up, and this is who answered. Returns why it is not used, "" for a member."""
        refusal = self._refusal(worker, now)
        if refusal:
            self._refused[address] = worker
            return refusal
        self._refused.pop(address, None)
        self._fingerprint = worker.fingerprint
        rates = self._typical.get(worker.role, H200_LLAMA8B)
        self._members[address] = Member(worker, WorkerLoad(), address, rates)
        self.health.joined(worker, now)
        self._shares.join(worker.incarnation)
        self._shares.keep({member.worker.incarnation for member in self._members.values()})
        return ""

    def disconnected(self, address: str, now: float, *, left: bool = False) -> Member | None:
        """The link is down: the member that it was, if there was one. `left`: it has left on purpose."""
        self._refused.pop(address, None)
        member = self._members.pop(address, None)
        if member is None:
            return None
        if left:
            self.health.left(member.worker.incarnation)
        else:
            self.health.lost(member.worker.incarnation, now)
        self._shares.keep({other.worker.incarnation for other in self._members.values()})
        if not self._members:
            self._left_at = now
        return member

    def acceptable(self, now: float) -> list[tuple[str, WorkerInfo]]:
        """Refused workers, with addresses, that `connected` would take now: the other model's workers are long gone."""
        return [(address, worker) for address, worker in self._refused.items() if not self._refusal(worker, now)]

    def _refusal(self, worker: WorkerInfo, now: float) -> str:
        names = _short((*worker.served_models, worker.model))
        if self._names and names and not self._names & names:
            return f"it serves {', '.join(sorted(names))}, this router {', '.join(sorted(self._names))}"
        kept = bool(self._members) or now - self._left_at < FINGERPRINT_KEPT_S
        if kept and worker.fingerprint != self._fingerprint:
            return f"its fingerprint is {worker.fingerprint!r}, that of this router's workers {self._fingerprint!r}"
        return ""

    def report(self, address: str, load: WorkerLoad, now: float) -> str | None:
        """A worker's own view of its load. Returns its incarnation if it has got on with prompts, or their pages."""
        member = self._members.get(address)
        if member is None:
            return None
        at_work = load.steps > member.load.steps and load.queued_tokens > 0
        at_work = at_work or load.transfer_bytes > member.load.transfer_bytes
        if member.load.rates != load.rates:
            member.rates = measured(load.rates, self._typical.get(member.worker.role, H200_LLAMA8B))
        member.load = load
        self.health.reported(member.worker.incarnation, load, now)
        return member.worker.incarnation if at_work else None

    def reserve(self, incarnation: str, tokens: int, *, prompt: bool = False) -> int:
        """Add to this router's load at a worker, a prompt's or a sequence's; returns the total."""
        total = self._reserved.get(incarnation, 0) + tokens
        if total < 0:
            raise ValueError(f"released more than was reserved at {incarnation}: {total}")
        counts, number = (self._prompts, tokens) if prompt else (self._placed, 1 if tokens > 0 else -1)
        counts[incarnation] += number
        if not counts[incarnation]:
            del counts[incarnation]
        if total:
            self._reserved[incarnation] = total
        else:
            self._reserved.pop(incarnation, None)
        return total

    def release(self, incarnation: str, tokens: int, *, prompt: bool = False) -> int:
        """Take back what `reserve` added (also after the worker is gone); returns the total."""
        return self.reserve(incarnation, -tokens, prompt=prompt)

    def prefill_rate(self, now: float, *, beside: bool) -> float:
        """Prompt tokens a second that workers in use compute; `beside`: decode workers, too, as far as their sequences
        let them. Without prefill workers they do in any case."""
        taking = [m for m in self._members.values() if not m.load.draining]
        usable = [m for m in taking if self.health.usable(m.worker.incarnation, now)]
        if not any(map(_decodes, usable)):  # then requests go to those that are not
            usable += [m for m in taking if _decodes(m)]
        prefill = [m for m in usable if m.worker.role == "prefill"]
        return sum(
            1e3 * tokens / computing_ms(self._candidate(member, None), tokens)
            for member in (usable if beside or not prefill else prefill)
            if (tokens := member.worker.step_tokens)
        )

    def stalled(self, now: float) -> list[tuple[WorkerInfo, str]]:
        """Time passes: workers that make no progress as of now, and why."""
        slack_s = {m.worker.incarnation: self._slack_s(m) for m in self._members.values()}
        return self.health.tick(now, slack_s.__getitem__)

    def _slack_s(self, member: Member) -> float | None:
        """What a step of prompts may take at a worker; None: neither it nor its role's others have measured that."""
        assumed = member.rates.prefill_tokens_per_s == H200_LLAMA8B.prefill_tokens_per_s
        return None if assumed else STEP_SLACK * 1e-3 * member.rates.prefill_ms(member.worker.step_tokens)

    def has_other(self, incarnation: str, now: float) -> bool:
        """Somebody else can do what this worker does, prompts included: requests may be taken from it."""
        others = [w.incarnation for w in self.live("decode") if w.incarnation != incarnation]
        return any(self.health.usable(other, now) for other in others)

    def measure(self) -> None:
        """Now and then: what a worker has not measured itself yet is what others of its role have, else of the fleet: a
        decode worker may have computed no prompt so far."""
        everyone = typical(member.load.rates for member in self._members.values())
        for role in ("prefill", "decode"):
            members = [member for member in self._members.values() if member.worker.role == role]
            self._typical[role] = typical((member.load.rates for member in members), everyone)
            for member in members:
                member.rates = measured(member.load.rates, self._typical[role])

    def give(self, placement: Placement, now: float) -> None:
        """The work of a placement counts as given; how long its output gets is a guess: see `give_more`."""
        prefill = placement.prefill.incarnation if placement.prefill else None
        self.health.began(placement.decode.incarnation, prefill, now)
        self._shares.give((placement.prefill or placement.decode).incarnation, placement.prefill_ms)
        self._shares.give(placement.decode.incarnation, placement.decode_ms)

    def give_more(self, incarnation: str, work_ms: float) -> None:
        """A worker's output is longer (or, below 0, shorter) than was expected."""
        self._shares.give(incarnation, work_ms)

    def hit_share(self) -> float:
        """Of the prompt tokens that live workers looked up in their caches since they started, those they found."""
        queries = sum(member.load.prefix_queries for member in self._members.values())
        return sum(member.load.prefix_hits for member in self._members.values()) / queries if queries else 0.0

    def leaving(self, address: str, now: float, routers: int = 1) -> list[WorkerLeaving]:
        """Decode workers that drain, whenever one that takes requests has told so many routers how much room it has.

        Its own room only: what others told is older, and has not in it what has come to them since.
        """
        draining = [m.worker.incarnation for m in self._members.values() if m.load.draining and _decodes(m)]
        teller = self._members.get(address)
        if not draining or teller is None or not _decodes(teller) or teller.load.draining:  # the first nearly always
            return []
        worker, load = teller.worker, teller.load
        sequences = worker.max_num_seqs - load.running - load.waiting
        well = self.health.state(worker.incarnation, now).state in ("up", "starting")
        if not well or load.held_up or sequences <= 0 or not load.free_pages:
            return []
        others = frozenset(
            one.worker.incarnation for one in self._members.values() if _takes(one) and one is not teller
        )
        room = Room(load.free_pages, worker.page_size, sequences, worker.max_model_len, routers)
        return [WorkerLeaving(one, worker.incarnation, room, others) for one in draining]

    def context(self) -> int:
        """Tokens of a request that every decode worker has room for; 0 without any."""
        return min((worker.max_model_len for worker in self.live("decode")), default=0)

    @property
    def reservations(self) -> Mapping[str, int]:
        """Tokens this router has reserved, by incarnation."""
        return self._reserved

    @property
    def members(self) -> list[Member]:
        """Live workers of both roles."""
        return list(self._members.values())

    def has_choice(self) -> bool:
        """False: every request can only go to one place, so nothing needs to be known of it."""
        return len(self._members) > 1

    def live(self, role: str) -> list[WorkerInfo]:
        """Live workers of a role."""
        return [m.worker for m in self._members.values() if m.worker.role == role]

    def has(self, placement: Placement) -> bool:
        """Whether its workers are live."""
        wanted = {worker.incarnation for worker in (placement.decode, placement.prefill) if worker is not None}
        return wanted <= {member.worker.incarnation for member in self._members.values()}

    def candidates(self, found: Mapping[str, Lookup], now: float, destination: str = "") -> list[Candidate]:
        """Workers for the policy, if any is usable only such; `found` is what Redis said of some of them (nothing while
        it is away). Without a usable prefill worker decode workers compute prompts themselves. `destination` is the
        only decode worker, as long as it takes requests."""
        chosen: set[str] = set()
        for role in ("prefill", "decode"):
            # Draining workers take nothing: beside them nobody must be left out for being colder.
            members = [m for m in self._members.values() if m.worker.role == role and not m.load.draining]
            live = [member.worker.incarnation for member in members]
            if role == "decode" and destination in live:
                live = [destination]
            usable = [incarnation for incarnation in live if self.health.usable(incarnation, now)]
            chosen.update(self.health.choosable(usable, now) if usable else live if role == "decode" else ())
        return [
            self._candidate(member, found.get(member.worker.incarnation))
            for member in self._members.values()
            if member.worker.incarnation in chosen
        ]

    def _candidate(self, member: Member, found: Lookup | None) -> Candidate:
        worker, incarnation = member.worker, member.worker.incarnation
        others = found.reserved_tokens if found else 0
        placed, prompts = self._placed[incarnation], self._prompts[incarnation]
        if others:  # other routers have told one number: what of it is not for their sequences is for prompts
            theirs = max(0, member.load.running - placed)
            placed, prompts = placed + theirs, prompts + max(0, others - theirs * DECODE_TOKENS)
        return Candidate(
            worker,
            member.load,
            held_tokens=found.held_pages * worker.page_size if found else 0,
            reserved_tokens=self._reserved.get(incarnation, 0) + others,
            rates=member.rates,
            given_ms=self._shares.of(incarnation),
            prompt_tokens=prompts,
            placed=placed,
        )


def _decodes(member: Member) -> bool:
    return member.worker.role == "decode"


def _takes(member: Member) -> bool:
    return _decodes(member) and not member.load.draining


def _short(names: Iterable[str]) -> frozenset[str]:
    """Last parts: a model may be mounted elsewhere on another machine, or be a hub id there."""
    return frozenset(short for name in names if (short := PurePath(name).name))
