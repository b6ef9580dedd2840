"""Answers that are lists of choices: what completions and chat have in common (completions.py, chat.py).

A streamed token is bytes joined around its JSON-encoded text; the parts before and after are made once a request.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from penstock.common.errors import PenstockError
from penstock.common.tokenizer import Tokenizer
from penstock.router.answer_format import AnswerFormat, Delta, Said, Usage
from penstock.router.choice import Choice, ScoredToken
from penstock.router.error_bodies import error_body

_json = msgspec.json.Encoder().encode
NO_LOGPROB = -9999.0  # JSON has no minus infinity
DONE = b"data: [DONE]\n\n"


class ChoicesFormat(AnswerFormat):
    """One request's way of writing; with `usage_field` a last chunk has the usage and the others `null`, as OpenAI's.

    With `token_ids` choices carry the ids of their tokens (vLLM's `return_token_ids`), with `prompt_logprobs` those of
    the prompt's (vLLM's field of this name, in answers that come whole); with `names_ids` scored tokens are called by
    their ids instead of their texts (`return_tokens_as_token_ids`).
    """

    object_name: ClassVar[str]
    chunk_object_name: ClassVar[str]
    before_text: ClassVar[bytes]  # between the choice's index and its text
    after_text: ClassVar[bytes]  # what closes the text

    def __init__(
        self,
        tokenizer: Tokenizer,
        answer_id: str,
        model: str,
        usage_field: bool,
        token_ids: bool = False,
        prompt_logprobs: int | None = None,
        names_ids: bool = False,
    ) -> None:
        created = int(time.time())
        self._tokenizer = tokenizer
        self.token_ids = token_ids
        self.prompt_logprobs = prompt_logprobs
        self.names_ids = names_ids
        self._ids_written: dict[int, int] = {}  # choice -> how many of its ids are in earlier chunks
        self._answer_id, self._created, self._model = answer_id, created, model
        self._usage_field = usage_field
        head = _json({"id": answer_id, "object": self.chunk_object_name, "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":[{"index":'
        self._tail = b'}],"usage":null}\n\n' if usage_field else b"}]}\n\n"
        self._plain_end = b',"logprobs":null,"finish_reason":null' + self._tail
        self._plain = self.after_text + self._plain_end
        self._starts: dict[int, bytes] = {}  # choice -> its chunks up to their text

    @abstractmethod
    def choice(self, choice: Choice, said: Said) -> dict[str, Any]:
        """A choice of an answer in one piece."""

    def said(self, delta: Delta) -> bytes:
        """More than content, between the choice's index and the rest of a chunk."""
        raise NotImplementedError("this route has nothing but content")

    @abstractmethod
    def logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        """Scores in the API's shape; None if there are none."""

    def top_level(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Fields of a whole answer beside its choices."""
        return {}

    def scored_prompt(self, choice: Choice) -> list[dict[str, Any] | None] | None:
        """vLLM's `prompt_logprobs`: for each prompt token, by id, its score and the top ones; None for the first. None
        if the output ended before the prompt was computed: its form allows nothing."""
        if choice.prompt_logprobs is None:
            return None
        token_ids = choice.request.prompt_token_ids
        scored: list[dict[str, Any] | None] = [None]
        for token_id, scores in zip(token_ids[1:], choice.prompt_logprobs, strict=True):
            ranked = [(token_id, scores.logprob, scores.rank)]
            top = list(zip(scores.top_ids, scores.top_logprobs, strict=True))[: self.prompt_logprobs]
            ranked += [(i, logprob, rank) for rank, (i, logprob) in enumerate(top, start=1) if i != token_id]
            text = self._tokenizer.token_text
            scored.append(
                {str(i): {"logprob": finite(p), "rank": rank, "decoded_token": text(i)} for i, p, rank in ranked}
            )
        return scored

    def opening_chunk(
        self, choice: Choice, text: str, before_text: bytes | None = None, logprobs: dict[str, Any] | None = None
    ) -> bytes:
        """An event with text that is not output."""
        before = self.before_text if before_text is None else before_text
        if logprobs is not None:
            ending = b'{"logprobs":%b,"finish_reason":null' % _json(logprobs)
            tail = self.after_text + b"," + ending[1:] + self._tail
            return b"%b%d%b%b%b" % (self._head, choice.index, before, _json(text), tail)
        return b"%b%d%b%b%b" % (self._head, choice.index, before, _json(text), self._plain)

    def delta(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        """See `AnswerFormat.delta`: one chunk."""
        bare = not delta.tokens and delta.finish_reason is None and usage is None and not self.token_ids
        if delta.reasoning or delta.calls:
            start, said = b"%b%d" % (self._head, choice.index), self.said(delta)
        elif bare:
            return self.text(choice, delta.content)
        else:
            start, said = self._start(choice.index), _json(delta.content) + self.after_text
        if bare:
            return b"".join((start, said, self._plain_end))
        ending: dict[str, Any] = {"logprobs": self.logprobs(delta.tokens), "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            ending["stop_reason"] = choice.text.stop_reason
        if self.token_ids:
            ending["token_ids"] = choice.token_ids[self._ids_written.get(choice.index, 0) :]
            self._ids_written[choice.index] = len(choice.token_ids)
        tail = self._tail if usage is None else b'}],"usage":' + _json(usage_fields(usage)) + b"}\n\n"
        return b"".join((start, said, b",", _json(ending)[1:-1], tail))

    def text(self, choice: Choice, text: str) -> bytes:
        """See `AnswerFormat.text`: one chunk, as `delta` writes it."""
        if self.token_ids:
            return super().text(choice, text)
        return b"".join((self._start(choice.index), _json(text), self._plain))

    def _start(self, index: int) -> bytes:
        start = self._starts.get(index)
        if start is None:
            start = self._starts[index] = b"%b%d%b" % (self._head, index, self.before_text)
        return start

    def closing(self, usage: Usage, timeline: list[dict[str, Any]] | None) -> bytes:
        """See `AnswerFormat.closing`: a chunk without choices, if there is something to tell, and the end."""
        extra: dict[str, Any] = {"usage": usage_fields(usage, details=True)} if self._usage_field else {}
        if timeline is not None:
            extra["timeline"] = timeline
        if not extra:
            return DONE
        return b"data: " + _json(self._envelope(self.chunk_object_name, []) | extra) + b"\n\n" + DONE

    def failure(self, error: PenstockError) -> bytes:
        """See `AnswerFormat.failure`."""
        return b"data: " + error_body(error) + b"\n\n" + DONE

    def whole(
        self, choices: Sequence[Choice], said: Sequence[Said], usage: Usage, timeline: list[dict[str, Any]] | None
    ) -> bytes:
        """See `AnswerFormat.whole`."""
        answer = self._envelope(self.object_name, list(map(self.choice, choices, said))) | self.top_level(choices)
        answer["usage"] = usage_fields(usage, details=True)
        if timeline is not None:
            answer["timeline"] = timeline
        return _json(answer)

    def _envelope(self, name: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._answer_id,
            "object": name,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


def usage_fields(usage: Usage, details: bool = False) -> dict[str, Any]:
    """Usage as completions and chat tell it; `details` are in whole answers and at the end of a stream."""
    fields: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    return fields | {"prompt_tokens_details": {"cached_tokens": usage.cached_tokens}} if details else fields


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, NO_LOGPROB)
