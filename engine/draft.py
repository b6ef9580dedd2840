"""A step that is being planned: what it computes of which request, in the executor's order. Pure."""

from __future__ import annotations

from penstock.engine.plan import SequenceStart, SequenceWork, StepPlan
from penstock.engine.request import Request


class StepDraft:
    """Sequences that decode come first; `owners` are the requests of `work`, in its order."""

    def __init__(self, step: int, owners: list[Request], work: list[SequenceWork]) -> None:
        self.step = step
        self.owners = owners
        self.work = work
        self.num_tokens = sum([item.num_tokens for item in work])
        self._started: list[SequenceStart] = []

    def begin(self, request: Request, num_tokens: int, pages: tuple[int, ...]) -> None:
        """The first work of a request that has joined the batch, and what the executor must know of it."""
        source = request.source
        self._started.append(
            SequenceStart(
                key=request.key,
                tokens=tuple(request.tokens),
                prompt_len=request.prompt_len,
                sampling=source.sampling,
                choice=source.choice,
                eos_token_ids=tuple(source.eos_token_ids),
                scores_prompt=request.scores_prompt,
            )
        )
        self.go_on(request, num_tokens, pages)

    def go_on(self, request: Request, num_tokens: int, new_pages: tuple[int, ...] = ()) -> None:
        """So many tokens more of a request, in pages that it has."""
        start = request.computed
        request.computed = end = start + num_tokens
        request.last_step = self.step
        samples = end == len(request.tokens) + request.pending
        if samples:
            request.pending += 1
        mask = request.constraint.mask if samples and request.constraint is not None else None
        self.work.append(SequenceWork(request.key, start, num_tokens, new_pages, samples, mask))
        self.owners.append(request)
        self.num_tokens += num_tokens

    def plan(self, ended: list[str]) -> StepPlan:
        """The step; `ended`: what the executor must forget before it."""
        return StepPlan(self.step, tuple(ended), tuple(self._started), tuple(self.work))
