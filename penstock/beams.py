"""`LLM.beam_search`: what it returns, and the loop that has beams scored by the engine.

A beam is scored by a request for one token. Its prompt and output so far are in the prefix cache but for the last page,
so that all beams share the prompt's pages, and a step computes a page's tokens at most for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from penstock.common.beam_search import BeamSearch
from penstock.common.messages import GenerateRequest, TokenLogprobs
from penstock.common.sampling import SamplingParams
from penstock.engine_run import Run
from penstock.results import Logprob


@dataclass
class BeamSearchSequence:
    """One result. As in vLLM `tokens` and `text` hold the prompt, too; `score` is what results are ordered by."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]  # of the output's tokens: each with the likeliest others
    cum_logprob: float
    score: float
    text: str | None
    finish_reason: str
    stop_reason: int | None
    lora_request: None = None


@dataclass
class BeamSearchOutput:
    """The results of a prompt, the best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)


@dataclass(frozen=True)
class PromptSearch:
    """The search of one prompt; `number` names its requests."""

    number: int
    prompt_token_ids: list[int]
    cache_salt: str
    search: BeamSearch


def beam_request(
    request_id: str, choice: int, prompt: list[int], output: Sequence[int], candidates: int, cache_salt: str
) -> GenerateRequest:
    """The request that scores a beam: one more token, with the `candidates` likeliest."""
    return GenerateRequest(
        request_id=request_id,
        choice=choice,
        prompt_token_ids=prompt,
        output_token_ids=list(output),
        sampling=SamplingParams(
            temperature=0.0, max_tokens=len(output) + 1, logprobs=candidates, ignore_eos=True, seed=0
        ),
        cache_salt=cache_salt,
        queue_timeout_s=float("inf"),
    )


def run_searches(
    begun: Run, prompts: Sequence[PromptSearch], on_finished: Callable[[], object], limit: int | None = None
) -> None:
    """Until every search has ended, `limit` at a time; whatever ends it early, nothing is left where it ran."""
    waiting: dict[str, tuple[PromptSearch, int]] = {}
    scores: dict[int, list[TokenLogprobs | None]] = {}

    def submit(run: Run, prompt: PromptSearch) -> None:
        beams = prompt.search.running
        scores[prompt.number] = [None] * len(beams)
        for choice, beam in enumerate(beams):
            name = f"beams-{prompt.number}-{len(beam.token_ids)}"
            output = beam.token_ids
            source = beam_request(
                name, choice, prompt.prompt_token_ids, output, prompt.search.candidates, prompt.cache_salt
            )
            waiting[run.add(source)] = prompt, choice

    rest = iter(prompts)
    with begun as run:
        for prompt in islice(rest, limit):
            submit(run, prompt)
        while waiting:
            for key, new in run.outputs():
                assert new.logprobs is not None
                prompt, choice = waiting.pop(key)
                mine = scores[prompt.number]
                mine[choice] = new.logprobs[0]
                if all(mine):
                    prompt.search.advance([at for at in mine if at is not None])
                    if prompt.search.running:
                        submit(run, prompt)
                    else:
                        on_finished()
                        for following in islice(rest, 1):
                            submit(run, following)
