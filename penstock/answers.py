"""Makes `RequestOutput`s of the tokens that an engine or a fleet brings. Pure; `LLM` and `AsyncLLM` share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.common.messages import GenerateRequest, TokenDelta, TokenLogprobs, request_key
from penstock.common.output_text import OutputText
from penstock.common.tokenizer import Tokenizer
from penstock.engine.outputs import Output
from penstock.results import CompletionOutput, Logprob, RequestOutput

New = Output | TokenDelta  # what has come for one choice: from an engine of this process, or over the bus


@dataclass(frozen=True)
class Choice:
    """One output in the making."""

    request: RequestOutput
    output: CompletionOutput
    text: OutputText | None  # None: only token ids are wanted
    source: GenerateRequest

    @property
    def key(self) -> str:
        """Its name in the engine."""
        return request_key(self.source.request_id, self.source.choice, self.source.attempt)


class Answers:
    """Adds tokens to outputs. `tokenizer` names the candidates of logprobs; without one they have no text."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def take(self, choice: Choice, new: New) -> bool:
        """Add what has come to a choice; True when it has ended.

        If that was without `new.finish`, at a stop string, then whoever computes it does not know yet: abort it.
        """
        if new.prompt_logprobs is not None:
            self._add_prompt_logprobs(choice.request, new.prompt_logprobs)
        if new.spans is not None:
            request = choice.request
            found = min(new.spans.cached_tokens, len(choice.source.prompt_token_ids))  # what goes on: output, too
            request.num_cached_tokens = max(request.num_cached_tokens, found)
        output, text = choice.output, choice.text
        if text is None:
            kept = len(new.token_ids)
            if new.finish is not None:
                output.finish_reason, output.stop_reason = new.finish.reason, new.finish.stop_reason
        else:
            output.text += text.push(new.token_ids, new.finish)
            kept = text.kept
            output.finish_reason, output.stop_reason = text.finish_reason, text.stop_reason
        output.token_ids += new.token_ids[:kept]
        if new.logprobs is not None:
            self._add_logprobs(output, new.token_ids, new.logprobs[:kept])
        if output.finish_reason is None:
            return False
        choice.request.finished = all(other.finish_reason for other in choice.request.outputs)
        return True

    def _add_logprobs(
        self, output: CompletionOutput, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> None:
        output.logprobs = output.logprobs or []
        output.cumulative_logprob = output.cumulative_logprob or 0.0
        for token, at in zip(token_ids, logprobs, strict=False):
            output.logprobs.append(self.candidates(token, at))
            output.cumulative_logprob += at.logprob

    def _add_prompt_logprobs(self, request: RequestOutput, logprobs: Sequence[TokenLogprobs]) -> None:
        scored = zip(request.prompt_token_ids[1:], logprobs, strict=True)
        request.prompt_logprobs = [None, *(self.candidates(token, at) for token, at in scored)]

    def candidates(self, token: int, at: TokenLogprobs) -> dict[int, Logprob]:
        """A token and the likeliest others, with their scores."""
        found = {token: Logprob(at.logprob, at.rank, self._name(token))}
        for rank, (top, value) in enumerate(zip(at.top_ids, at.top_logprobs, strict=True), start=1):
            found.setdefault(top, Logprob(value, rank, self._name(top)))
        return found

    def _name(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)
