"""Outputs made of what engines and fleets say."""

from __future__ import annotations

from penstock.answers import Answers, Choice
from penstock.common.messages import Finish, GenerateRequest, Spans, TokenDelta
from penstock.common.sampling import SamplingParams
from penstock.results import CompletionOutput, RequestOutput


def test_of_a_prompt_no_more_is_cached_than_it_has() -> None:
    """A worker that takes a request over finds the output that another one has left there, too."""
    source = GenerateRequest(request_id="r", prompt_token_ids=[5, 6], sampling=SamplingParams())
    output = CompletionOutput(0)
    request = RequestOutput("r", None, [5, 6], [output])
    said = TokenDelta("r", 1, 0, 0, [7], Finish(reason="length"), spans=Spans(cached_tokens=40))
    assert Answers(None).take(Choice(request, output, None, source), said)
    assert (output.token_ids, request.num_cached_tokens) == ([7], 2)
