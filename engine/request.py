"""A request inside the engine: one choice of one API request, as tokens, with how far it is.

    tokens    [ prompt ............ | output ......... ]          known tokens
    computed  [ ================> ]                                tokens whose K/V the submitted steps write
    pending                                            [?]         sampled by a submitted step, not read yet

A step computes the tokens in [computed, known + pending); when it reaches the end it samples one more.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from penstock.common.messages import Finish, GenerateRequest, Spans, TokenLogprobs, request_key
from penstock.common.page_hash import next_hash, root_hash


class Status(enum.Enum):
    """Where a request is; docs/request-states.md draws the transitions."""

    WAITING = "waiting"  # no work planned: it holds no pages, or only those that came with it
    RUNNING = "running"  # in the batch
    FINISHED = "finished"


class Constraint(Protocol):
    """What the scheduler must know of an output's form; it is read by engine/constraints.py."""

    @property
    def ready(self) -> bool:
        """Whether it is known what may follow all known tokens."""
        ...

    @property
    def mask(self) -> bytes:
        """The tokens that may, a bit each; empty once the output has ended."""
        ...

    def allows(self, token: int) -> bool:
        """Whether the mask has this token."""
        ...


@dataclass(eq=False, slots=True)
class Request:
    """Mutable state of one request; changed by the scheduler only."""

    source: GenerateRequest
    arrived: float  # clock of the worker, seconds
    status: Status = Status.WAITING
    computed: int = 0
    pending: int = 0
    limit: int = 0  # known tokens, pending ones included, at which its end is certain; set when it is queued
    room: int = 0  # tokens that the pages the executor knows of hold
    last_step: int = 0  # the newest step that computes for it
    has_claim: bool = False  # it waits with pages, or a promise, of its own
    hashes: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`, as far as they were needed
    first_planned: float | None = None
    prefilled: float | None = None
    reported: bool = False  # its spans were given out once
    cached_tokens: int = 0  # known when it was first planned, found here or brought by others
    prompt_tokens: int = 0  # of its first prompt, those that were computed here
    preemptions: int = 0
    finish: Finish | None = None
    constraint: Constraint | None = None  # the form its output must take
    moved_per_token: float = 0.0  # of how many tokens its reader moves the pages while one is computed; 0: not known
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)  # of prompt tokens from the second on
    key: str = field(init=False)
    tokens: list[int] = field(init=False)
    prompt_len: int = field(init=False)
    prompt_end: int = field(init=False)  # computed up to here, it decodes: one token a step
    stop_ids: frozenset[int] = field(init=False)
    eos_ids: frozenset[int] = field(init=False)
    end_ids: frozenset[int] = field(init=False)  # both
    allowed: frozenset[int] | None = None  # the only tokens that may be drawn, if there are such
    banned: dict[int, list[list[int]]] = field(default_factory=dict)  # a token: what it may not stand behind
    has_rules: bool = field(init=False)  # one or the other

    def __post_init__(self) -> None:
        self.key = request_key(self.source.request_id, self.source.choice, self.source.attempt)
        self.tokens = [*self.source.prompt_token_ids, *self.source.output_token_ids]
        self.prompt_len = len(self.source.prompt_token_ids)
        self.stop_ids = frozenset(self.source.sampling.stop_token_ids)
        self.eos_ids = frozenset() if self.source.sampling.ignore_eos else frozenset(self.source.eos_token_ids)
        self.end_ids = self.stop_ids | self.eos_ids
        sampling = self.source.sampling
        if sampling.allowed_token_ids is not None:
            self.allowed = frozenset(sampling.allowed_token_ids)
        for word in sampling.bad_words_token_ids:
            self.banned.setdefault(word[-1], []).append(list(word[:-1]))
        self.has_rules = self.allowed is not None or bool(self.banned)
        self.begin_prompt()

    def begin_prompt(self) -> None:
        """All known tokens are to be computed (again)."""
        self.prompt_end = max(1, len(self.tokens) - 1)

    @property
    def num_known(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return len(self.tokens) - self.prompt_len

    @property
    def scores_prompt(self) -> bool:
        """Whether its prompt's logprobs are still to be told: nothing of it may come from the prefix cache."""
        return not self.reported and self.source.wants_prompt_logprobs

    @property
    def may_go_on(self) -> bool:
        """What may come next is known, and is something. The engine ends it else; a thread may find out at any time."""
        return self.constraint is None or (self.constraint.ready and bool(self.constraint.mask))

    def excludes(self, token: int) -> bool:
        """Whether a token was drawn that must not come next: one always is, also where the form and the rules leave
        none."""
        if self.constraint is not None and not self.constraint.allows(token):
            return True
        if self.allowed is not None and token not in self.allowed:
            return True
        output = self.tokens[self.prompt_len :] if token in self.banned else []
        if any(output[len(output) - len(before) :] == before for before in self.banned.get(token, ())):
            return True
        return self.has_rules and token in self.end_ids and self.num_output < self.source.sampling.min_tokens

    @property
    def num_to_compute(self) -> int:
        return len(self.tokens) + self.pending - self.computed

    @property
    def is_decoding(self) -> bool:
        """What is left to compute is not prompt any more."""
        return self.computed >= self.prompt_end

    def extend_hashes(self, scope: str, page_size: int, num_tokens: int) -> list[bytes]:
        """Hashes of the full pages among the first `num_tokens` tokens, and of any that were needed before."""
        num_pages = num_tokens // page_size
        while len(self.hashes) < num_pages:
            parent = self.hashes[-1] if self.hashes else root_hash(scope, [self.source.cache_salt])
            start = len(self.hashes) * page_size
            self.hashes.append(next_hash(parent, self.tokens[start : start + page_size]))
        return self.hashes

    def tail_hash(self, scope: str, page_size: int, num_tokens: int) -> bytes:
        """Of the last page of the first `num_tokens` tokens, if they fill it in part; else b"". No full page has it."""
        start = num_tokens // page_size * page_size
        if start == num_tokens:
            return b""
        hashes = self.extend_hashes(scope, page_size, start)
        parent = hashes[start // page_size - 1] if start else root_hash(scope, [self.source.cache_salt])
        return next_hash(parent, self.tokens[start:num_tokens])

    def iter_hashes(self, scope: str, page_size: int, num_tokens: int) -> Iterator[bytes]:
        """The same page by page, for callers that stop at the first unknown one: a whole prompt takes milliseconds."""
        for number in range(1, num_tokens // page_size + 1):
            yield self.extend_hashes(scope, page_size, number * page_size)[number - 1]

    def finish_after(self, token: int, max_model_len: int) -> Finish | None:
        """Why the request ends now that `token` has been appended, or None. Source: vLLM's order of the checks."""
        sampling = self.source.sampling
        if self.num_output >= sampling.min_tokens:
            if token in self.eos_ids:
                return Finish(reason="stop")
            if token in self.stop_ids:
                return Finish(reason="stop", stop_reason=token)
        if sampling.max_tokens is not None and self.num_output >= sampling.max_tokens:
            return Finish(reason="length")
        if len(self.tokens) >= max_model_len:
            return Finish(reason="length")
        return None

    def spans(self, now: float) -> Spans:
        """This worker's part of the timeline so far."""
        began = self.first_planned if self.first_planned is not None else now
        prefilled = self.prefilled if self.prefilled is not None else began
        return Spans(
            queue_ms=(began - self.arrived) * 1e3,
            prefill_ms=(prefilled - began) * 1e3,
            decode_ms=(now - prefilled) * 1e3,
            cached_tokens=self.cached_tokens,
            computed_tokens=self.prompt_tokens,
            preemptions=self.preemptions,
        )
