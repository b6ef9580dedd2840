"""What is told of a request that has ended: to the log (`--enable-log-requests`), and to traces (tracing.py)."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.common.errors import PenstockError
from penstock.common.logs import requests as log
from penstock.common.timeline import Timeline
from penstock.router.choice import Choice
from penstock.router.front import RequestHead
from penstock.router.reply import Reply


@dataclass(frozen=True)
class Ended:
    """A request of a generating route, however it ended; `timeline` has its mark `finished`."""

    head: RequestHead
    path: str
    model: str
    timeline: Timeline
    choices: Sequence[Choice]  # none: refused before anything was submitted
    error: PenstockError | None
    gone: bool  # the client has left

    @classmethod
    def of(
        cls,
        head: RequestHead,
        path: str,
        model: str,
        timeline: Timeline,
        reply: Reply | None,
        error: PenstockError | None,
    ) -> Ended:
        """Now; without a reply it was refused, or its client left before its body was complete."""
        timeline.mark("finished", time.monotonic())
        if reply is None:
            return cls(head, path, model, timeline, (), error, error is None)
        return cls(head, path, model, timeline, reply.choices, error or reply.error, reply.gone)

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once, however many choices it has."""
        return sum({c.request.request_id: len(c.request.prompt_token_ids) for c in self.choices}.values())

    @property
    def output_tokens(self) -> int:
        return sum(choice.text.num_tokens for choice in self.choices)

    @property
    def outcome(self) -> str:
        """The finish reasons of the choices, "abort", or the error's code."""
        if self.error is not None:
            return self.error.code
        if self.gone:
            return "abort"
        return ",".join(sorted({choice.text.finish_reason or "abort" for choice in self.choices}))


class Observer(Protocol):
    """Told of every request once it has ended."""

    def ended(self, request: Ended) -> None: ...


class RequestLog:
    """A record a request, without its text."""

    @staticmethod
    def wanted() -> bool:
        return log.isEnabledFor(logging.INFO)

    def ended(self, request: Ended) -> None:
        marks = request.timeline
        facts: dict[str, object] = {
            "path": request.path,
            "model": request.model,
            "outcome": request.outcome,
            "choices": len(request.choices),
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": request.output_tokens,
        }
        for name, end in (("first_token_ms", "first_token"), ("total_ms", "finished")):
            seconds = marks.between("received", end)
            if seconds is not None:
                facts[name] = round(seconds * 1e3, 3)
        shown = " ".join(f"{name}={value}" for name, value in facts.items())
        log.info("ended: %s", shown, extra=request.head.for_log | facts)
