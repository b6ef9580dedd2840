"""An answer by beam search (`use_beam_search`): `n` beams, each step of each a request for one token.

The rules are common/beam_search.py's. The choices are the results, the best first; they run nowhere themselves: each is
told its tokens when the search has ended, so that text, stop strings, scores and usage are made as for any other.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from penstock.common.beam_search import Beam, BeamSearch, BeamSearchParams
from penstock.common.errors import PenstockError
from penstock.common.messages import Finish, GenerateRequest, TokenDelta, TokenLogprobs
from penstock.router.reply import Reply, StreamReply, WholeReply


class _Scoring:
    """The `Sink` of one beam's step."""

    def __init__(self) -> None:
        self.scores: asyncio.Future[TokenLogprobs] = asyncio.get_running_loop().create_future()

    def on_delta(self, delta: TokenDelta) -> None:
        if delta.logprobs and not self.scores.done():
            self.scores.set_result(delta.logprobs[0])

    def on_error(self, error: PenstockError) -> None:
        if not self.scores.done():
            self.scores.set_exception(error)


class _BeamReply(Reply):
    """An answer whose prompts have `n` choices each: the results of a search."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._scoring: dict[tuple[str, int], _Scoring] = {}  # beams that are being scored, by request id and choice

    async def _submit(self) -> None:
        prompts: dict[str, list[int]] = {}
        for index, choice in enumerate(self._choices):
            prompts.setdefault(choice.request.request_id, []).append(index)
        searches = [asyncio.ensure_future(self._search(indices)) for indices in prompts.values()]
        try:
            await asyncio.gather(*searches)
        except asyncio.CancelledError:
            if not self._gone:
                raise
        finally:
            for search in searches:
                search.cancel()
            await asyncio.gather(*searches, return_exceptions=True)
            self._cancel_scoring()

    async def _search(self, indices: list[int]) -> None:
        """Search one prompt, and tell its choices, which stand at `indices`, what was found."""
        request = self._choices[indices[0]].request
        max_tokens = request.sampling.max_tokens or 1
        params = BeamSearchParams(
            beam_width=len(indices),
            max_tokens=max_tokens,
            ignore_eos=request.sampling.ignore_eos,
            length_penalty=self._plan.length_penalty,
        )
        search = BeamSearch(params, request.eos_token_ids, max_tokens)
        step = 0
        while search.running and not self._gone:
            beams = enumerate(search.running)
            sinks = [await self._score(request, step, choice, beam, search.candidates) for choice, beam in beams]
            scored = await asyncio.gather(*(sink.scores for sink in sinks))
            self._scoring = {key: sink for key, sink in self._scoring.items() if not sink.scores.done()}
            search.advance(scored)
            step += 1
        if self._gone:  # heard between two steps there was nothing to cancel, and nothing else would end the search
            return
        for index, found in zip(indices, search.finished, strict=True):
            beam, finish = found.beam, Finish(reason="stop" if found.ended else "length")
            wanted = request.sampling.logprobs
            scores = None if wanted is None else [_with_top(at, wanted) for at in beam.scores]
            delta = TokenDelta(request.request_id, 0, index, 0, list(beam.token_ids), finish, scores)
            self._choices[index].on_delta(delta)

    async def _score(self, request: GenerateRequest, step: int, choice: int, beam: Beam, candidates: int) -> _Scoring:
        source = msgspec.structs.replace(
            request,
            request_id=f"{request.request_id}-beam-{step}",
            choice=choice,
            output_token_ids=list(beam.token_ids),
            sampling=msgspec.structs.replace(
                request.sampling,
                temperature=0.0,
                logprobs=candidates,
                max_tokens=len(beam.token_ids) + 1,
                min_tokens=0,
                ignore_eos=True,
                stop=[],
                stop_token_ids=[],
                prompt_logprobs=None,
            ),
        )
        sink = _Scoring()
        self._scoring[source.request_id, choice] = sink
        await self._service.submit(source, sink, self._plan.tenant)
        return sink

    def _cancel_running(self) -> None:
        """The client has hung up, or the answer is complete."""
        self._cancel_scoring()
        for choice in self._choices:
            if not choice.ended:
                choice.ended = True
                self._metrics.cancelled(len(choice.request.prompt_token_ids), 0)

    def _cancel_scoring(self) -> None:
        for (request_id, choice), sink in self._scoring.items():
            if not sink.scores.done():
                sink.scores.cancel()
                self._service.cancel(request_id, choice)
        self._scoring.clear()


class BeamReply(_BeamReply, WholeReply):
    """The answer in one piece."""


class BeamStreamReply(_BeamReply, StreamReply):
    """The answer as events: they come when the searches of all prompts have ended, each choice's text in one."""


def _with_top(at: TokenLogprobs, count: int) -> TokenLogprobs:
    return TokenLogprobs(at.logprob, at.rank, at.top_ids[:count], at.top_logprobs[:count])
