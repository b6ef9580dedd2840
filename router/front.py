"""What every request needs: the service, the tokenizer, the names and the defaults. Made once by app.py.

`Front` also holds the steps that completions and chat share: the model's name, tokenising without blocking the event
loop, and the `Plan` of a request whose prompts are token ids.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from penstock.common.chat_template import ChatTemplate
from penstock.common.config import RouterConfig
from penstock.common.errors import BadRequest, NotFound, PromptTooLong, Unavailable
from penstock.common.generation_defaults import GenerationDefaults
from penstock.common.logs import trace_id
from penstock.common.messages import GenerateRequest
from penstock.common.tokenizer import Tokenizer
from penstock.router.answer_format import AnswerFormat
from penstock.router.chat_setup import ChatSetup
from penstock.router.event_stream import Outbox
from penstock.router.metrics import RouterMetrics
from penstock.router.protocol import GenerationRequest
from penstock.router.reply import Plan
from penstock.router.structured import Forms

if TYPE_CHECKING:
    from penstock.router.ended import Observer
    from penstock.router.service import ModelInfo, RouterService
    from penstock.router.tracing import Tracing

TRUNCATED_FROM = 8  # contexts that a prompt may fill before truncate_prompt_tokens
THREAD_FROM_CHARS = 4000  # about 1 ms of tokenising; below, a thread costs more than it frees
_T = TypeVar("_T")


class NoWorkerYet(Unavailable):
    """This router has seen no worker since it started: the request may wait for the first (`endpoints.once_known`)."""


@dataclass(frozen=True, kw_only=True)
class RequestHead:
    """What the HTTP request says outside its body."""

    answer_id: str  # as the client sees it
    request_id: str  # as the workers see it: unique even if a client repeats its X-Request-Id
    timeline: bool
    traceparent: str = ""  # W3C trace context of the caller, as given
    tracestate: str = ""
    tenant: str = ""  # whose API key it came with

    def named(self, asked: str | None) -> str:
        """The id that the answer's is made of: the header's, else the one that the body asks for, else ours."""
        return asked if asked and self.answer_id == self.request_id else self.answer_id

    @property
    def for_log(self) -> dict[str, object]:
        """The `extra` of a record about this request: the workers' id, and the client's where it gave one."""
        client = {} if self.answer_id == self.request_id else {"client_request_id": self.answer_id}
        return {"request_id": self.request_id, **client, **trace_id(self.traceparent)}


@dataclass(frozen=True, kw_only=True)
class Front:
    """Shared by all requests of a router."""

    service: RouterService
    config: RouterConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: GenerationDefaults
    metrics: RouterMetrics
    models: tuple[str, ...]  # names clients may use; the first is shown
    forms: Forms
    chat: ChatSetup = field(default_factory=ChatSetup)
    outbox: Outbox = field(default_factory=Outbox)
    created: int = field(default_factory=lambda: int(time.time()))
    seeds: random.Random = field(default_factory=random.Random)
    observers: Sequence[Observer] = ()  # told of every request that has ended
    tracing: Tracing | None = None  # then also among the observers

    def model_info(self) -> ModelInfo:
        """What the fleet serves; raises NoWorkerYet while no worker is known."""
        info = self.service.model_info()
        if info is None:
            raise NoWorkerYet(self.service.why_not_ready())
        return info

    def model_name(self, asked: str | None) -> str:
        """The name to answer with; raises NotFound for a model that is not served here."""
        if asked is None or asked == "":
            return self.models[0]
        if asked not in self.models:
            raise NotFound(f"The model `{asked}` does not exist.", param="model")
        return asked

    def _encode_word(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def check_length(self, prompt: str | list[int], param: str, *, truncates: bool = False) -> None:
        """Raise PromptTooLong for a prompt that cannot fit whatever its tokens are, before any work is done on it.

        One that will be truncated may be a few times as long.
        """
        context, length = self.model_info().max_model_len, len(prompt)
        if isinstance(prompt, str):
            most, unit = context * self.tokenizer.longest_token_chars, "characters"
        else:
            most, unit = context, "tokens"
        if length > most * (TRUNCATED_FROM if truncates else 1):
            raise PromptTooLong(
                f"This model's maximum context length is {context} tokens: a prompt of {length} {unit} cannot fit.",
                param=param,
            )

    async def check_form(self, request: GenerationRequest, field: str | None = None) -> None:
        """Raise BadRequest for a form that no output can be given; `field` has asked for it, if not the request's."""
        if request.structured_outputs is not None:
            field = field or request.form_field
            await self.forms.check(request.structured_outputs, field)

    async def in_thread(self, work: Callable[[], _T], size_chars: int) -> _T:
        """The result of `work`, computed in a thread if it is long."""
        if size_chars < THREAD_FROM_CHARS:
            return work()
        return await self.service.off_loop.run(work)

    def plan(
        self,
        request: GenerationRequest,
        head: RequestHead,
        format: AnswerFormat,
        prompts: list[list[int]],
        echoes: list[str],
        max_tokens: tuple[int | None, str],
        logprobs: int | None,
    ) -> Plan:
        """The plan for tokenised prompts; choices are ordered by prompt. `max_tokens` is (default, field to blame).

        `check_choices` and `check_length` come before tokenising, so they are the caller's.

        Raises:
            BadRequest: parameters out of range, or a prompt too long, or with tokens that the model lacks.
        """
        info = self.model_info()
        request.check_token_ids(info.vocab_size)
        default, blamed = max_tokens
        if self.tokenizer.largest_id >= info.vocab_size and max(map(max, prompts)) >= info.vocab_size:
            raise BadRequest(
                f"{blamed} has a token that the model lacks: ids are below {info.vocab_size}", param=blamed
            )
        n = request.choices_per_prompt
        request.check_form_size(n * len(prompts))
        asked = request.asked_max_tokens
        if asked is not None and asked < 1:
            field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
            raise BadRequest(f"{field} must be at least 1, got {asked}", param=field)
        budget = min(output_budget(len(ids), asked, default, info.max_model_len, blamed) for ids in prompts)
        # A seed for each prompt: what is drawn follows from seed, choice and position, so equal prompts need two.
        seeds = [self.seeds.getrandbits(63) for _ in prompts]
        sampling = request.sampling(self.defaults, budget, logprobs, seeds[0], info.vocab_size, self._encode_word)
        drawn = sampling.seed == seeds[0]  # and not the client's
        each = [sampling.with_seed(seed) if drawn else sampling for seed in seeds]
        self.metrics.request(n, budget)
        requests = [
            GenerateRequest(
                request_id=head.request_id if len(prompts) == 1 else f"{head.request_id}-{at}",
                choice=choice,
                prompt_token_ids=ids,
                sampling=sampling,
                eos_token_ids=list(info.eos_token_ids),
                cache_salt=request.cache_salt or "",
                queue_timeout_s=self.config.queue_timeout_s,
                priority=request.priority or 0,
                traceparent=head.traceparent,
            )
            for at, (ids, sampling) in enumerate(zip(prompts, each, strict=True))
            for choice in range(n)
        ]
        return Plan(
            requests=requests,
            echoes=[echo for echo in echoes for _ in range(n)],
            format=format,
            stream=bool(request.stream),
            usage_in_chunks=request.usage_in_stream[1],
            timeline=head.timeline or bool(request.timeline),
            tenant=head.tenant,
            beams=bool(request.use_beam_search),
            length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
        )


def output_budget(prompt_tokens: int, asked: int | None, default: int | None, max_model_len: int, param: str) -> int:
    """How many tokens the output may have: what was asked, else `default`, else the rest of the context.

    A `default` of the model is cut to the room that is left; what a client asks for is not.

    Raises:
        PromptTooLong: prompt and output do not fit together; names both numbers.
    """
    room = max_model_len - prompt_tokens
    wanted = asked if asked is not None else min(default or room, max(room, 1))
    wanted = max(wanted, 1)
    total = prompt_tokens + wanted
    if total > max_model_len:
        raise PromptTooLong(
            f"This model's maximum context length is {max_model_len} tokens, but you requested {total} tokens "
            f"({prompt_tokens} in the prompt, {wanted} for the completion).",
            param=param,
        )
    return wanted
